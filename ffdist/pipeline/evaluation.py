"""The errors of a network on a split, by goodness, by readout, and per layer."""

from typing import NamedTuple

from torch import Tensor

from ffdist.ff.classify import confusion_matrix, error, total_goodness
from ffdist.ff.network import Architecture


class Evaluation(NamedTuple):
    """How well a network does on a split; errors in [0, 1]."""

    goodness_error: float | None
    """Every label tried; the one with the most goodness over the predicting layers wins. None where none is."""
    readout_error: float
    """One pass with the neutral label, or without any."""
    layer_errors: list[float] | None
    """Error by the goodness of each layer alone; None if no label is tried."""
    confusion: Tensor
    """Samples by true label (row) and label predicted by goodness, else by the readout (column) `[C, C]`."""
    goodness: Tensor
    """Each layer's goodness for every label `[L, N, C]`, -inf for one that is not tried; `[L, N, 0]` where none is."""

    @property
    def chief_error(self) -> float:
        """The error by goodness, else by the readout: what chooses the best checkpoint."""
        return self.readout_error if self.goodness_error is None else self.goodness_error

    def describe(self) -> str:
        """Returns the errors as text."""
        return format_errors(self.goodness_error, self.readout_error)


def format_errors(goodness_error: float | None, readout_error: float) -> str:
    """Returns the errors as text; the goodness error is left out if it is None."""
    by_goodness = "" if goodness_error is None else f"{goodness_error:.2%} by goodness, "
    return f"{by_goodness}{readout_error:.2%} by readout"


def evaluate(goodness: Tensor, readout_labels: Tensor, labels: Tensor, architecture: Architecture) -> Evaluation:
    """Computes the errors of a network on a split.

    Args:
        goodness: Of each layer for every label `[L, N, C]`; `[L, N, 0]` if no label was tried.
        readout_labels: Labels predicted by the readout `[N]`.
        labels: True labels `[N]`.
        architecture: Architecture of the network.
    """
    readout_error, classes = error(readout_labels, labels), architecture.classes
    if not goodness.shape[-1]:
        return Evaluation(None, readout_error, None, confusion_matrix(readout_labels, labels, classes), goodness)
    goodness_labels = total_goodness(goodness, architecture.predict_from).argmax(-1)
    return Evaluation(
        goodness_error=error(goodness_labels, labels),
        readout_error=readout_error,
        layer_errors=[error(layer.argmax(-1), labels) for layer in goodness],
        confusion=confusion_matrix(goodness_labels, labels, classes),
        goodness=goodness,
    )
