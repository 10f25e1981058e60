"""Readouts: softmax classifiers on the normalized activations of the hidden layers, trained at the same time.

Shapes: `B` samples of a minibatch, `H` units of a layer, `C` classes.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffdist.ff.forms import Form
from ffdist.ff.optimizers import READOUT_UPDATE, Learner, Update

READOUTS = ("joint", "per_layer", "none")
"""Kinds of readouts: one for all read layers, one for each of them, and none."""
GRADIENT_TOLERANCE = 1e-5
"""Largest entry of the gradient of the cross-entropy, in nats, at which `fit` ends."""


class Readout(Learner):
    """A linear layer and a softmax (Hinton 2022, section 3.3), in float32. It sends no gradient to the layers.

    Args:
        features: Sum of the numbers of units of the layers that it reads.
        classes: Number of classes C.
        update: How its parameters follow the gradient.
        forms: Form of the activations of each layer, and of what is read of them after average pooling; empty if
            nothing is pooled. A stage may have pooled them.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        update: Update = READOUT_UPDATE,
        forms: Sequence[tuple[Form, Form]] = (),
    ) -> None:
        super().__init__(update)
        self._forms = tuple(forms)
        self.weight = nn.Parameter(torch.zeros(classes, features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(classes), requires_grad=False)
        self.add_optimizer_state()

    def forward(self, activations: list[Tensor]) -> Tensor:
        """Returns logits `[..., C]` from the normalized activations `[..., H]` of each read layer, in order."""
        return F.linear(self.rows(activations), self.weight, self.bias)

    def rows(self, activations: list[Tensor]) -> Tensor:
        """Returns what is read of the activations `[..., H]` of each layer, as one row `[..., features]`."""
        if not self._forms:
            return torch.cat(activations, -1).to(self.weight.dtype)
        parts = zip(activations, self._forms, strict=True)
        return torch.cat(
            [form.pool(part, to) if part.shape[-1] == form.size else part for part, (form, to) in parts], -1
        )

    def train_minibatch(
        self, activations: list[Tensor], labels: Tensor, *, lr_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Makes one update on the cross-entropy.

        Args:
            activations: Normalized activations `[B, H]` of each read layer, first layer first.
            labels: True labels `[B]`, int64.
            lr_scale: Factor on the learning rate.

        Returns:
            The logits `[B, C]`; and the loss in nats and the error in [0, 1] `[2]`, float32; all before the update.
        """
        rows = self.rows(activations)
        logits = F.linear(rows, self.weight, self.bias)
        metrics = loss_and_error(logits, labels)
        direction = (F.one_hot(labels, len(self.bias)) - logits.softmax(1)) / len(rows)
        self.ascend({"weight": direction.t() @ rows, "bias": direction.sum(0)}, lr_scale=lr_scale)
        return logits, metrics

    def fit(
        self, rows: Tensor, labels: Tensor, *, iterations: int = 500, step: Callable[[], object] = lambda: None
    ) -> float:
        """Minimizes the cross-entropy with the same weight decay, by L-BFGS.

        Args:
            rows: Normalized activations of all read layers, concatenated `[N, features]`, float32.
            labels: True labels `[N]`, int64.
            iterations: Largest number of evaluations of the loss.
            step: Called for each evaluation.

        Returns:
            The largest absolute entry of the gradient at the end, in nats.
        """
        parameters = (self.weight, self.bias)
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=iterations,
            max_eval=iterations,
            tolerance_grad=GRADIENT_TOLERANCE,
            line_search_fn="strong_wolfe",
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
        largest = max(parameter.grad.abs().max().item() for parameter in parameters if parameter.grad is not None)
        self.weight.grad = self.bias.grad = None
        return largest


class LayerReadouts(nn.ModuleDict):
    """A readout for each read layer, by the number of the layer, counted from 0. Their logits are summed."""

    def forward(self, activations: list[Tensor]) -> Tensor:
        """Returns logits `[..., C]` from the normalized activations `[..., H]` of each read layer, in order."""
        return sum_logits([readout([part]) for readout, part in zip(self.values(), activations, strict=True)])


def sum_logits(logits: Sequence[Tensor]) -> Tensor:
    """Sums the logits of layers `[..., C]`, one after the other, so that the result does not depend on stages."""
    return reduce(torch.add, logits)


def loss_and_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy in nats and the error in [0, 1] `[2]`, float32.

    Args:
        logits: `[B, C]`.
        labels: True labels `[B]`, int64.
    """
    return torch.stack((F.cross_entropy(logits, labels), (logits.argmax(1) != labels).float().mean()))
