"""Negative data. Each kind says, for every sample of the training set, what its negative is in a given epoch."""

from typing import Protocol

import torch
from torch import Tensor

from ffdist.ff.keyed import generator


class Negatives(Protocol):
    """What a kind of negatives offers."""

    def labels(self, epoch: int) -> Tensor:
        """Returns the label shown in each sample's negative `[N]`, int64, for the given epoch."""


class WrongLabel:
    """A wrong class for every sample, each of the C - 1 equally likely, drawn afresh each epoch.

    Shuffling the labels would show the true one in a case of C.

    Args:
        true_labels: `[N]`, int64.
        classes: Number of classes C.
        seed: The run's seed.
    """

    def __init__(self, true_labels: Tensor, classes: int, seed: int) -> None:
        self._true_labels, self._classes, self._seed = true_labels, classes, seed

    def labels(self, epoch: int) -> Tensor:
        """Returns the wrong labels `[N]` of an epoch."""
        draw = generator(self._seed, "negatives", epoch)
        step = torch.randint(1, self._classes, self._true_labels.shape, generator=draw)
        return (self._true_labels + step) % self._classes


KINDS = {"wrong_label": WrongLabel}
"""Kinds of negatives, by the name that `negatives.kind` gives."""
