"""What the driver orders, and in which order: a pure function of the run's shape.

epoch 0             epoch 1                       end
T0 T1 T2 .. Tn | T0 T1 T2 .. Tn E0 E1 .. Em S | ... S E0 .. Ep
trained in chunks; cut at    validation, then a     last state,
epoch ends                   state at its cut       then test set
"""

from collections.abc import Iterator
from typing import NamedTuple

from ffdist.ff.network import Architecture
from ffdist.ff.update import rate_gain

EVALUATION_ROWS = 2200
"""Most rows of an evaluation block; fixed, because the shape of a product decides the order of its sums."""


class Train(NamedTuple):
    """A chunk: `num_minibatches` consecutive minibatches of one epoch, one update each."""

    epoch: int
    first: int
    """First minibatch, counted within the epoch."""
    num_minibatches: int
    step: int
    """First minibatch, counted from the start of training."""
    gain: float
    """The schedule's factor on the learning rates."""
    layer: int | None = None
    """The only hidden layer that learns, counted from 0; None for all."""


class Evaluate(NamedTuple):
    """A block of an evaluation on fixed weights: samples `first` to `first + num_samples` of a split."""

    split: str
    first: int
    num_samples: int
    last: bool
    """Whether the split ends with this block."""


class Position(NamedTuple):
    """A place between two chunks, from which a run can go on."""

    epoch: int = 0
    minibatch: int = 0
    """Of that epoch, the first that is still to be learned from; past the last while the epoch is not evaluated."""


class Snapshot(NamedTuple):
    """The state of everything that a run keeps, exactly here in the stream."""

    position: Position
    step: int
    """Minibatches done, counted from the start of training."""


Order = Train | Evaluate | Snapshot


def evaluation_block(architecture: Architecture) -> int:
    """Returns the samples of a block, each of which makes a row a label tried, and one for the readout."""
    tried = len(architecture.tried) if architecture.labels_shown else 0
    return max(1, EVALUATION_ROWS // (1 + tried))


def evaluation(split: str, samples: int, block: int) -> Iterator[Evaluate]:
    """Cuts a split into blocks of at most `block` samples; every sample is kept."""
    for first in range(0, samples, block):
        yield Evaluate(split, first, min(block, samples - first), first + block >= samples)


def schedule(
    *,
    epochs: int,
    minibatches: int,
    chunk_size: int,
    greedy_layers: int | None = None,
    validation_samples: int,
    test_samples: int,
    evaluate_every: int,
    evaluation_block: int,
    start: Position = Position(),  # noqa: B008, a tuple
) -> Iterator[Order]:
    """Yields everything that a run asks of its stages, in order.

    Args:
        epochs: Passes over the training set in which a layer learns.
        minibatches: Minibatches an epoch.
        chunk_size: Most minibatches a chunk; changes speed and nothing else.
        greedy_layers: Number of layers that learn one after the other, each for all its epochs; None where all learn
            at every minibatch.
        validation_samples: Size of the validation split; 0 evaluates nothing before the end.
        test_samples: Size of the test split.
        evaluate_every: Epochs from one validation to the next; the last epoch is always validated.
        evaluation_block: Samples an evaluation block; the same for every run, so that sums are.
        start: Where the run stands.
    """
    length = epochs * (greedy_layers or 1)
    for epoch in range(start.epoch, length):
        layer = epoch // epochs if greedy_layers else None
        gain = rate_gain(epoch % epochs, epochs)
        for first in range(start.minibatch if epoch == start.epoch else 0, minibatches, chunk_size):
            count = min(chunk_size, minibatches - first)
            yield Train(epoch, first, count, epoch * minibatches + first, gain, layer)
        done, last = epoch + 1, epoch + 1 == length
        due = bool(validation_samples) and (last or done % evaluate_every == 0)
        if due:
            yield from evaluation("validation", validation_samples, evaluation_block)
        if due or last:
            yield Snapshot(Position(done), done * minibatches)
    yield from evaluation("test", test_samples, evaluation_block)
