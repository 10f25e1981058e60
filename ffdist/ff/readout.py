"""The readout: a softmax on the normalized neutral activities of the hidden layers, trained beside them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffdist.ff.update import READOUT_UPDATE, Update


class Readout(nn.Module):
    """One linear layer and a softmax (Hinton 2022, section 3.3), in float32. No gradient goes back to the layers.

    Args:
        features: Summed widths of the layers that it reads.
        classes: Number of classes C.
        update: How its parameters follow the gradient.
    """

    def __init__(self, features: int, classes: int, *, update: Update = READOUT_UPDATE) -> None:
        super().__init__()
        self.update = update
        self.weight = nn.Parameter(torch.zeros(classes, features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(classes), requires_grad=False)
        self.register_buffer("weight_gradient", torch.zeros_like(self.weight))
        self.register_buffer("bias_gradient", torch.zeros_like(self.bias))
        self.weight_gradient: Tensor
        self.bias_gradient: Tensor

    def forward(self, activities: list[Tensor]) -> Tensor:
        """Returns logits `[..., C]` from each read layer's normalized activities `[..., H]`, lowest layer first."""
        return F.linear(self._rows(activities), self.weight, self.bias)

    def _rows(self, activities: list[Tensor]) -> Tensor:
        return torch.cat([part.to(self.weight.dtype) for part in activities], -1)

    def train_minibatch(self, activities: list[Tensor], labels: Tensor, *, gain: float = 1.0) -> Tensor:
        """Makes one update on the cross-entropy.

        Args:
            activities: Normalized neutral activities `[B, H]` of each read layer, lowest first.
            labels: True labels `[B]`, int64.
            gain: Factor on the learning rate.

        Returns:
            Loss in nats and error in [0, 1], both before the update `[2]`, float32.
        """
        rows = self._rows(activities)
        logits = F.linear(rows, self.weight, self.bias)
        metrics = torch.stack((F.cross_entropy(logits, labels), (logits.argmax(1) != labels).float().mean()))
        direction = F.one_hot(labels, len(self.bias)) - logits.softmax(1)
        self.update.ascend(
            self.weight, self.weight_gradient, direction.t() @ rows, gain=gain, batch=len(rows), decay=True
        )
        self.update.ascend(self.bias, self.bias_gradient, direction.sum(0), gain=gain, batch=len(rows), decay=False)
        return metrics
