"""Predicted labels from goodness (Hinton 2022, section 3.3), and errors from labels.

Shapes: `L` layers, `N` samples, `C` classes.
"""

import torch
from torch import Tensor


def total_goodness(goodness: Tensor, layers: range) -> Tensor:
    """Sums each layer's goodness for every label over the layers that predict: `[L, N, C] -> [N, C]`.

    Args:
        goodness: Goodness of all layers.
        layers: Layers that predict, counted from 0. The label with the greatest total is predicted.
    """
    return goodness[layers.start : layers.stop].sum(0)


def best_layers(goodness: Tensor, labels: Tensor) -> range:
    """Returns the consecutive layers, counted from 0, whose summed goodness predicts labels with the least error.

    Of those with equal errors, it chooses the fewest layers, and of these the last ones.

    Args:
        goodness: Goodness of all layers `[L, N, C]`.
        labels: True labels `[N]`.
    """

    def rank(layers: range) -> tuple[float, int, int]:
        return error(total_goodness(goodness, layers).argmax(-1), labels), len(layers), -layers.start

    stops = range(1, len(goodness) + 1)
    return min((range(start, stop) for stop in stops for start in range(stop)), key=rank)


def error(predicted: Tensor, labels: Tensor) -> float:
    """Returns the fraction of samples `[N]` whose predicted label is wrong, in [0, 1]."""
    return (predicted != labels).double().mean().item()


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts samples by true label (row) and predicted label (column): `[N], [N] -> [C, C]`, int64."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
