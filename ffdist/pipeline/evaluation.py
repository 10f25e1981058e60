"""The errors of a network on a split, by goodness, by readout, and per layer."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ffdist.ff.architecture import Architecture
from ffdist.ff.classify import confusion_matrix, error, total_goodness

MAX_WORST_CLASSES = 5
"""Largest number of classes whose errors are printed."""


class Evaluation(NamedTuple):
    """How well a network does on a split; errors in [0, 1]."""

    goodness_error: float | None
    """Every label tried; the one with the most goodness over the predicting layers wins. None where none is."""
    readout_error: float | None
    """One pass with the neutral label, or without any. None without a readout."""
    layer_errors: list[float] | None
    """Error by the goodness of each layer alone; None if no label is tried."""
    confusion: Tensor
    """Samples by true label (row) and label predicted by goodness, else by the readout (column) `[C, C]`."""
    goodness: Tensor
    """Each layer's goodness for every label `[L, N, C]`, -inf for one that is not tried; `[L, N, 0]` where none is."""

    @property
    def chief_error(self) -> float:
        """The error by goodness, else by the readout."""
        error = self.readout_error if self.goodness_error is None else self.goodness_error
        assert error is not None, "without a readout, layers predict"
        return error

    @property
    def class_errors(self) -> list[float | None]:
        """Fraction of the samples of each class that `confusion` counts as wrong; None for a class without samples."""
        counts = zip(self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True)
        return [(samples - correct) / samples if samples else None for correct, samples in counts]

    @property
    def balanced_error(self) -> float:
        """Mean of `class_errors` over the classes with samples, so that all of them count equally."""
        errors = [error for error in self.class_errors if error is not None]
        return sum(errors) / len(errors)

    def value(self, metric: str) -> float:
        """Returns an error by its name in `training.stop.metric`; `error` is the chief error."""
        return float(getattr(self, "chief_error" if metric == "error" else metric))

    def describe(self) -> str:
        """Returns the errors as text."""
        return format_errors(self.goodness_error, self.readout_error)


def format_errors(goodness_error: float | None, readout_error: float | None) -> str:
    """Returns the errors as text; one that is None is left out."""
    errors = {"goodness": goodness_error, "readout": readout_error}
    return ", ".join(f"{error:.2%} by {name}" for name, error in errors.items() if error is not None)


def format_class_errors(errors: Sequence[float | None], names: Sequence[str]) -> str:
    """Returns the classes with the largest errors as text that follows another; empty if there is no error.

    Args:
        errors: Error of each class; None for a class without samples.
        names: Names of the classes; may be empty.
    """
    wrong = [(error, label) for label, error in enumerate(errors) if error]
    worst = sorted(wrong, key=lambda pair: -pair[0])[:MAX_WORST_CLASSES]
    texts = [f"{names[label] if names else label} {error:.2%}" for error, label in worst]
    return f"; worst classes: {', '.join(texts)}" if texts else ""


def evaluate(goodness: Tensor, readout_labels: Tensor | None, labels: Tensor, architecture: Architecture) -> Evaluation:
    """Computes the errors of a network on a split.

    Args:
        goodness: Of each layer for every label `[L, N, C]`; `[L, N, 0]` if no label was tried.
        readout_labels: Labels predicted by the readout `[N]`; None without one.
        labels: True labels `[N]`.
        architecture: Architecture of the network.
    """
    readout_error, classes = None if readout_labels is None else error(readout_labels, labels), architecture.classes
    if not goodness.shape[-1]:
        assert readout_labels is not None, "without a readout, layers predict"
        return Evaluation(None, readout_error, None, confusion_matrix(readout_labels, labels, classes), goodness)
    goodness_labels = total_goodness(goodness, architecture.predicting_layers).argmax(-1)
    return Evaluation(
        goodness_error=error(goodness_labels, labels),
        readout_error=readout_error,
        layer_errors=[error(layer.argmax(-1), labels) for layer in goodness],
        confusion=confusion_matrix(goodness_labels, labels, classes),
        goodness=goodness,
    )
