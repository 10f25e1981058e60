"""Where the stream starts: images become rows, and samples get their negatives."""

import torch
from torch import Tensor

from ffdist.data.order import SampleOrder
from ffdist.ff.labels import neutral, one_hot
from ffdist.ff.negatives import KINDS
from ffdist.ff.network import Architecture
from ffdist.pipeline.schedule import Evaluate, Train


class NegativeSource:
    """Makes the negatives of whole chunks, ahead of need.

    Args:
        kind: A key of `KINDS`.
        labels: True labels of the training set `[N]`, int64.
        classes: Number of classes.
        order: SampleOrder of the training set.
    """

    def __init__(self, kind: str, labels: Tensor, classes: int, order: SampleOrder) -> None:
        self._negatives, self._order = KINDS[kind](labels, classes, order.seed), order
        self._epoch, self._labels = -1, labels

    def make(self, chunk: Train) -> Tensor:
        """Returns the labels that the chunk's negatives show `[K, B]`, int64."""
        if chunk.epoch != self._epoch:
            self._epoch, self._labels = chunk.epoch, self._negatives.labels(chunk.epoch)
        return self._labels[self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)]


class Source:
    """Turns uint8 images and labels into the rows that the first layer reads; part of the first stage.

    Args:
        architecture: Says how a row shows its label.
        images: uint8 images of each split `[N, D]`.
        labels: True labels of the training set `[N]`, int64.
        order: SampleOrder of the training set.
    """

    def __init__(
        self, architecture: Architecture, images: dict[str, Tensor], labels: Tensor, order: SampleOrder
    ) -> None:
        self._architecture, self._images, self._labels, self._order = architecture, images, labels, order

    def train(self, chunk: Train, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a chunk's signal, positive then negative rows `[K, 2B, D]`, and its neutral rows `[K, B, D]`."""
        classes = self._architecture.classes
        samples = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        images = self._images["train"][samples]
        claims = one_hot(torch.cat((self._labels[samples], negatives), 1), classes)
        rows = self._architecture.rows(torch.cat((images, images), 1), claims)
        return rows, self._architecture.rows(images, neutral(samples.shape, classes))

    def evaluate(self, block: Evaluate) -> tuple[Tensor, Tensor]:
        """Returns a block's rows with every label `[n, C, D]`, and its neutral rows `[n, D]`."""
        classes = self._architecture.classes
        images = self._images[block.split][block.first : block.first + block.num_samples]
        claims = one_hot(torch.arange(classes).expand(len(images), -1), classes)
        rows = self._architecture.rows(images.unsqueeze(1), claims)
        return rows, self._architecture.rows(images, neutral((len(images),), classes))
