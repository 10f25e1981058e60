"""The commands of the driver, in their order: a pure function of the run's shape.

epoch 0             epoch 1                       end
T0 T1 T2 .. Tn | T0 T1 T2 .. Tn E0 E1 .. Em S | ... S E0 .. Ep
trained in chunks,           validation, then       last snapshot,
split at epoch ends          a snapshot             then test set
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ffdist.ff.architecture import Architecture

EVALUATION_ROWS = 2200
"""Largest number of rows in an evaluation block. It is fixed, because the shape of a product determines the order of
its sums."""


class Train(NamedTuple):
    """Trains on a chunk: `num_minibatches` consecutive minibatches of one epoch, one update each."""

    epoch: int
    first: int
    """First minibatch, counted within the epoch."""
    num_minibatches: int
    step: int
    """First minibatch, counted from the start of training."""
    lr_scale: float
    """Factor on the learning rates."""
    layer: int | None = None
    """The only layer that is trained, counted from 0; None for all."""


class Evaluate(NamedTuple):
    """Evaluates a block: samples `first` to `first + num_samples` of a split, on fixed weights."""

    split: str
    first: int
    num_samples: int
    last: bool
    """Whether this is the last block of the split."""


class Position(NamedTuple):
    """A position between two chunks, from which a run can be resumed."""

    epoch: int = 0
    minibatch: int = 0
    """First minibatch of that epoch that is not done; past the last one until the epoch is evaluated."""


class Snapshot(NamedTuple):
    """Takes the state of all actors, exactly at this position."""

    position: Position
    step: int
    """Minibatches done, counted from the start of training."""


Command = Train | Evaluate | Snapshot


def evaluation_block(architecture: Architecture) -> int:
    """Returns the number of samples in a block. Each makes one row per label that is tried, and one for the readout."""
    tried = len(architecture.tried) if architecture.labels_shown else 0
    return max(1, min(EVALUATION_ROWS, architecture.max_rows) // (1 + tried))


def evaluation(split: str, samples: int, block: int) -> Iterator[Evaluate]:
    """Splits an evaluation into blocks of at most `block` samples."""
    for first in range(0, samples, block):
        yield Evaluate(split, first, min(block, samples - first), first + block >= samples)


def schedule(
    *,
    lr_scales: Sequence[float],
    minibatches: int,
    chunk_size: int,
    greedy_layers: int | None = None,
    validation_samples: int,
    test_samples: int,
    validate_every_epochs: int,
    evaluation_block: int,
    start: Position = Position(),  # noqa: B008, a tuple
) -> Iterator[Command]:
    """Yields all commands of a run, in their order.

    Args:
        lr_scales: Factor on the learning rates in each of the epochs in which a layer is trained.
        minibatches: Minibatches per epoch.
        chunk_size: Largest number of minibatches in a chunk; affects speed only.
        greedy_layers: Number of layers that are trained one after the other, each for all its epochs; None to train all
            layers at every minibatch.
        validation_samples: Size of the validation split; 0 for no validation.
        test_samples: Size of the test split.
        validate_every_epochs: Epochs from one validation to the next; the last epoch is always validated.
        evaluation_block: Samples per evaluation block.
        start: Where to start.
    """
    epochs = len(lr_scales)
    num_epochs = epochs * (greedy_layers or 1)
    for epoch in range(start.epoch, num_epochs):
        layer = epoch // epochs if greedy_layers else None
        lr_scale = lr_scales[epoch % epochs]
        for first in range(start.minibatch if epoch == start.epoch else 0, minibatches, chunk_size):
            count = min(chunk_size, minibatches - first)
            yield Train(epoch, first, count, epoch * minibatches + first, lr_scale, layer)
        done, last = epoch + 1, epoch + 1 == num_epochs
        due = bool(validation_samples) and (last or done % validate_every_epochs == 0)
        if due:
            yield from evaluation("validation", validation_samples, evaluation_block)
        if due or last:
            yield Snapshot(Position(done), done * minibatches)
    yield from evaluation("test", test_samples, evaluation_block)
