"""The readout: a softmax on the normalized neutral activities of the hidden layers, trained beside them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ffdist.ff.optimizers import READOUT_UPDATE, Learner, Update

FITTED = 1e-5
"""Slope of the cross-entropy, in nats, at which a fit is done."""


class Readout(Learner):
    """One linear layer and a softmax (Hinton 2022, section 3.3), in float32. No gradient goes back to the layers.

    Args:
        features: Summed widths of the layers that it reads.
        classes: Number of classes C.
        update: How its parameters follow the gradient.
    """

    def __init__(self, features: int, classes: int, *, update: Update = READOUT_UPDATE) -> None:
        super().__init__(torch.zeros(classes, features), torch.zeros(classes), update)

    def forward(self, activities: list[Tensor]) -> Tensor:
        """Returns logits `[..., C]` from each read layer's normalized activities `[..., H]`, lowest layer first."""
        return F.linear(self._rows(activities), self.weight, self.bias)

    def _rows(self, activities: list[Tensor]) -> Tensor:
        return torch.cat(activities, -1).to(self.weight.dtype)

    def train_minibatch(
        self, activities: list[Tensor], labels: Tensor, *, lr_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Makes one update on the cross-entropy.

        Args:
            activities: Normalized neutral activities `[B, H]` of each read layer, lowest first.
            labels: True labels `[B]`, int64.
            lr_scale: Factor on the learning rate.

        Returns:
            The logits `[B, C]`; and loss in nats and error in [0, 1] `[2]`, float32; all before the update.
        """
        rows = self._rows(activities)
        logits = F.linear(rows, self.weight, self.bias)
        metrics = torch.stack((F.cross_entropy(logits, labels), (logits.argmax(1) != labels).float().mean()))
        direction = (F.one_hot(labels, len(self.bias)) - logits.softmax(1)) / len(rows)
        self.ascend(direction.t() @ rows, direction.sum(0), lr_scale=lr_scale)
        return logits, metrics

    def fit(
        self, rows: Tensor, labels: Tensor, *, iterations: int = 500, step: Callable[[], None] = lambda: None
    ) -> float:
        """Finds the weights of the least cross-entropy, with the same decay of the weights, by L-BFGS.

        Args:
            rows: Normalized activities of all read layers, side by side `[N, features]`, float32.
            labels: True labels `[N]`, int64.
            iterations: Most evaluations of all rows.
            step: Called after each.

        Returns:
            The steepest slope that is left, in nats; the smaller, the nearer to the best weights.
        """
        parameters = (self.weight, self.bias)
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=iterations, max_eval=iterations, tolerance_grad=FITTED, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            step()
            logits = F.linear(rows, self.weight, self.bias)
            error = (logits.softmax(1) - F.one_hot(labels, len(self.bias))) / len(rows)
            self.weight.grad = error.t() @ rows + self.update.weight_decay * self.weight
            self.bias.grad = error.sum(0)
            return F.cross_entropy(logits, labels) + self.update.weight_decay / 2 * self.weight.square().sum()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        closure()
        slope = max(parameter.grad.abs().max().item() for parameter in parameters if parameter.grad is not None)
        self.weight.grad = self.bias.grad = None
        return slope
