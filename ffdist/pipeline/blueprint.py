"""What decides the parts of a run, and how much travels between them at once."""

from collections.abc import Callable
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple

from ffdist.data.order import SHARD_SAMPLES, SampleOrder
from ffdist.ff.network import Architecture
from ffdist.ff.update import OPTIMIZERS
from ffdist.pipeline.schedule import EVALUATION_ROWS, evaluation_block
from ffdist.pipeline.source import NegativePlan, NegativeSource
from ffdist.pipeline.stage import ReadoutStage, Stage

FLOAT32_BYTES = 4
SPARE = 3
"""Chunks under way beside one for each stage: in the readout, and on their way."""
CHUNK, CHUNK_S, CHUNK_BYTES = 20, 0.35, 2**25
"""Minibatches of a chunk whose costs are not known; the time that one is to take of the slowest stage, so that calls
and their messages take little beside it; and the most that it may fill of a message."""


class Parts(NamedTuple):
    """What a run consists of; plain objects or actors that hold them."""

    negatives: list[Any]
    stages: list[Any]
    readout: Any
    writer: Any
    """Has `write(snapshot, *states)`."""


class Blueprint(NamedTuple):
    """What decides the parts, apart from the data."""

    architecture: Architecture
    order: SampleOrder
    negatives: NegativePlan
    jitter: int
    """Most pixels that a training image is shifted in either direction."""
    stage_layers: list[range]
    measure_every: int
    """Minibatches between two in which MEASURED is."""
    device: str
    """Where layers and readout live, as torch names it."""

    chunk_size: int = CHUNK
    """Most minibatches that travel together."""
    max_in_flight: int = 1
    """Orders under way at once."""

    def paced(
        self,
        chunk_size: int | Literal["auto"],
        max_in_flight: int | Literal["auto"],
        *,
        minibatch_s: float | None = None,
        most: int | None = None,
    ) -> "Blueprint":
        """Decides how much travels at once; none of it changes a result.

        Args:
            chunk_size: Minibatches of a chunk; `auto`: what takes the slowest stage CHUNK_S.
            max_in_flight: Orders under way at once; `auto`: as many as keep every stage busy.
            minibatch_s: Time that the slowest stage takes for a minibatch, where it is known.
            most: Minibatches that `auto` may not exceed.
        """
        delay, busy = self.negatives.prediction_delay, len(self.stage_layers) + SPARE
        wanted = round(CHUNK_S / minibatch_s) if minibatch_s else CHUNK
        limits = most or wanted, delay // busy if delay else wanted, CHUNK_BYTES // self._minibatch_bytes
        size = max(1, min(wanted, *limits)) if chunk_size == "auto" else chunk_size
        size, window = min(size, self.order.minibatches), busy if max_in_flight == "auto" else max_in_flight
        # No order waits for labels that are drawn in one under way.
        return self._replace(chunk_size=size, max_in_flight=min(window, delay // size) if delay else window)

    @property
    def _minibatch_bytes(self) -> int:
        """Bytes of the largest message between stages, for each minibatch in it."""
        architecture, rows = self.architecture, self.negatives.per_sample + self.architecture.labels_shown
        return self.order.batch_size * rows * max(architecture.widths[1:]) * architecture.compute_dtype.itemsize

    @property
    def bytes_in_flight(self) -> int:
        """Bound of what messages and states take while all orders of the window are under way; two may be snapshots."""
        architecture, order, negatives = self.architecture, self.order, self.negatives
        samples = order.batch_size * self.chunk_size, evaluation_block(architecture)
        signals = samples[0] * (negatives.per_sample + architecture.labels_shown), EVALUATION_ROWS - samples[1]
        # What the readout reads waits for the last layer; the signal is in two places at most.
        values = (
            read * sum(architecture.widths[1:]) + 2 * signal * max(architecture.widths[1:])
            for read, signal in zip(samples, signals, strict=True)
        )
        messages = self.max_in_flight * max(values) * architecture.compute_dtype.itemsize
        ahead = (self.max_in_flight + negatives.ahead) * samples[0]
        made = (ahead + 2 * min(SHARD_SAMPLES, order.samples)) * negatives.sample_bytes  # whole shards at both ends
        kept = 1 + len(OPTIMIZERS[architecture.rule.update.optimizer].slots)
        states = min(2, self.max_in_flight) * kept * FLOAT32_BYTES * sum(architecture.weights)
        return messages + made + states

    def assemble(self, make: Callable[..., Any], images: Any, labels: Any, writer: Any) -> Parts:
        """Makes all parts: the stages in order, the readout, the negatives.

        Args:
            make: Makes an object of a class from its arguments, or an actor that holds one.
            images: uint8 images of each split, or a reference to them.
            labels: Labels of the training set, or a reference to them.
            writer: Of snapshots.
        """
        architecture, order, negatives = self.architecture, self.order, self.negatives
        source = (negatives, self.jitter, images, labels)
        return Parts(
            stages=[
                make(Stage, architecture, layers, order, self.measure_every, self.device, *first)
                for layers, first in zip(self.stage_layers, chain([source], repeat(())), strict=False)
            ],
            readout=make(ReadoutStage, architecture, labels, order, bool(negatives.prediction_delay), self.device),
            negatives=[
                make(NegativeSource, negatives, images, labels, architecture, order) for _ in range(negatives.num_parts)
            ],
            writer=writer,
        )
