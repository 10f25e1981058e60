"""A plain Forward-Forward loop, as common PyTorch ports of the paper write it, to compare with."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffdist.pipeline.runner import torch_threads
from ffdist.training.prepare import Prepared

THRESHOLD, LEARNING_RATE = 2.0, 0.001
"""Threshold of the mean of squares, and learning rate of Adam, in such ports."""
NORM_EPSILON = 1e-4
"""Added to the norm of a row, so that a row of zeros is not divided by 0."""
NUM_TEST_SAMPLES = 1000
"""Number of samples whose labels are predicted at once."""


class PlainLayer(nn.Linear):
    """A ReLU layer that trains on its own loss by autograd."""

    def __init__(self, num_inputs: int, num_units: int) -> None:
        super().__init__(num_inputs, num_units)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

    def forward(self, rows: Tensor) -> Tensor:
        """Returns activations `[..., H]` of rows `[..., D]`, which are normalized first."""
        return super().forward(rows / (rows.norm(dim=-1, keepdim=True) + NORM_EPSILON)).relu()

    def train_minibatch(self, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Makes one update; returns the activations of positive and negative rows `[B, H]` after it."""
        margins = [self(rows).square().mean(1) - THRESHOLD for rows in (positive, negative)]
        loss = F.softplus(torch.cat((-margins[0], margins[1]))).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return self(positive).detach(), self(negative).detach()


class Progress(NamedTuple):
    """How far a loop came."""

    seconds: float
    """Time of the training alone."""
    test_error: float


class PlainLoop:
    """Trains dense layers on images with true and with wrong labels, in this process, in float32.

    Args:
        num_units: Units of each layer.
        prepared: Images, and the order of those for training. The first C pixels show the label.
    """

    def __init__(self, num_units: list[int], prepared: Prepared) -> None:
        self._order, self._classes, self._num_steps = prepared.order, prepared.architecture.classes, 0
        torch.manual_seed(self._order.seed)
        self._images = {split: part.float() / 255 for split, part in prepared.dataset.samples.items()}
        self._labels = prepared.dataset.labels
        sizes = [self._images["train"].shape[1], *num_units]
        self._layers = [PlainLayer(*pair) for pair in zip(sizes, num_units, strict=False)]

    def _show(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns images whose first C pixels show labels."""
        images = images.clone()
        images[:, : self._classes] = F.one_hot(labels, self._classes).float()
        return images

    def train_minibatch(self) -> None:
        """Trains all layers on the next minibatch."""
        epoch, first = divmod(self._num_steps, self._order.num_minibatches)
        (indices,) = self._order.indices(epoch, first, 1)
        images, labels = self._images["train"][indices], self._labels["train"][indices]
        wrong = (labels + torch.randint(1, self._classes, labels.shape)) % self._classes
        positive, negative = self._show(images, labels), self._show(images, wrong)
        for layer in self._layers:
            positive, negative = layer.train_minibatch(positive, negative)
        self._num_steps += 1

    @torch.no_grad()
    def test_error(self) -> float:
        """Returns the fraction of test samples whose label with the highest goodness of all layers is wrong."""
        wrong = 0
        batches = (torch.split(part["test"], NUM_TEST_SAMPLES) for part in (self._images, self._labels))
        for images, labels in zip(*batches, strict=True):
            goodness = [self._goodness(self._show(images, labels * 0 + label)) for label in range(self._classes)]
            wrong += int((torch.stack(goodness).argmax(0) != labels).sum())
        return wrong / len(self._labels["test"])

    def _goodness(self, rows: Tensor) -> Tensor:
        goodness = torch.zeros(len(rows))
        for layer in self._layers:
            rows = layer(rows)
            goodness += rows.square().mean(1)
        return goodness

    def train(self, seconds: float) -> float:
        """Trains for some time; returns samples per second."""
        num_steps, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not num_steps:
            self.train_minibatch()
            num_steps += 1
        return num_steps * self._order.batch_size / elapsed

    def train_to_error(self, error: float, seconds: float) -> Progress:
        """Trains until an epoch after which the test error is at most `error`, or for some time."""
        trained_s = 0.0
        while True:
            start = time.perf_counter()
            for _ in range(self._order.num_minibatches):
                self.train_minibatch()
            trained_s += time.perf_counter() - start
            if (test_error := self.test_error()) <= error or trained_s >= seconds:
                return Progress(trained_s, test_error)


def serve_plain(
    num_units: list[int], prepared: Prepared, threads: int
) -> Callable[[tuple[float, float | None]], float | Progress]:
    """Returns a function that trains a loop in this process; other arguments are those of `PlainLoop`.

    From seconds and None it returns samples per second; from seconds and a test error, the progress towards this error.
    """
    loop = PlainLoop(num_units, prepared)

    def train(message: tuple[float, float | None]) -> float | Progress:
        seconds, error = message
        with torch_threads(threads):
            return loop.train(seconds) if error is None else loop.train_to_error(error, seconds)

    return train
