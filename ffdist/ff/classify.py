"""From goodness to a label (Hinton 2022, section 3.3), and from labels to errors."""

import torch
from torch import Tensor


def goodness_prediction(goodness: Tensor) -> Tensor:
    """Returns the label with the greatest goodness, summed over layers: `[L, N, C] -> [N]`."""
    return goodness.sum(0).argmax(-1)


def error(predicted: Tensor, labels: Tensor) -> float:
    """Returns the share of samples `[N]` whose predicted label is wrong, in [0, 1]."""
    return (predicted != labels).double().mean().item()


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts samples by true label (row) and predicted label (column): `[N], [N] -> [C, C]`, int64."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
