"""The errors of a network on a split, by goodness, by readout, and per layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from ffdist.ff.classify import confusion_matrix, error, goodness_prediction
from ffdist.pipeline.runner import Evaluated


class Evaluation(NamedTuple):
    """How well a network does on a split; errors in [0, 1]."""

    goodness_error: float
    """Every label tried; the one with the most goodness over the predicting layers wins."""
    readout_error: float
    """One pass with the neutral label."""
    layer_errors: list[float]
    """By the goodness of each layer alone."""
    confusion: Tensor
    """Samples by true label (row) and label predicted by goodness (column) `[C, C]`."""


def evaluate(blocks: list[Evaluated], labels: Tensor, *, classes: int, predict_from: int) -> Evaluation:
    """Puts the blocks of an evaluation together.

    Args:
        blocks: All of them, in order.
        labels: True labels of the split `[N]`.
        classes: Number of classes.
        predict_from: First layer, counted from 1, that goodness looks at.
    """
    goodness = torch.cat([torch.cat(block.goodness) for block in blocks], 1)
    by_goodness = goodness_prediction(goodness[predict_from - 1 :])
    return Evaluation(
        goodness_error=error(by_goodness, labels),
        readout_error=error(torch.cat([block.predicted for block in blocks]), labels),
        layer_errors=[error(goodness_prediction(layer.unsqueeze(0)), labels) for layer in goodness],
        confusion=confusion_matrix(by_goodness, labels, classes),
    )
