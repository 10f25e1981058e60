"""What decides the parts of a run, and how much travels between them at once."""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple

from ffdist.data.order import SHARD_SAMPLES, SampleOrder
from ffdist.ff.network import Architecture
from ffdist.pipeline.schedule import EVALUATION_ROWS, evaluation_block
from ffdist.pipeline.source import NegativePlan, NegativeSource
from ffdist.pipeline.stage import ReadoutStage, Stage

LABEL_BYTES = 8
UNWRITTEN = 2
"""Most snapshots that are taken and not yet written."""
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
        limits = (
            most or wanted,
            delay // busy if delay else wanted,
            CHUNK_BYTES // max(self.bytes_out(layers) for layers in self.stage_layers),
        )
        size = max(1, min(wanted, *limits)) if chunk_size == "auto" else chunk_size
        size, window = min(size, self.order.minibatches), busy if max_in_flight == "auto" else max_in_flight
        # No order waits for labels that are drawn in one under way.
        return self._replace(chunk_size=size, max_in_flight=min(window, delay // size) if delay else window)

    def bytes_out(self, layers: Sequence[int]) -> int:
        """Returns the bytes of a minibatch that a stage passes on: to the next one, and to the readout."""
        architecture, last = self.architecture, layers[-1]
        is_last = last + 1 == len(architecture.layers)
        rows = self.negatives.per_sample + architecture.labels_shown
        values = 0 if is_last else rows * architecture.widths[1 + last]
        values += sum(architecture.widths[1 + layer] for layer in layers if self._is_read(layer, layers))
        return values * self.order.batch_size * architecture.compute_dtype.itemsize

    def _is_read(self, layer: int, layers: Sequence[int]) -> bool:
        """Says whether the rows that the readout reads leave a stage above one of its layers."""
        goes_on = layer == layers[-1] and layer + 1 < len(self.architecture.layers)
        return goes_on or layer + 1 >= self.architecture.predict_from

    @property
    def bytes_in_flight(self) -> int:
        """Upper bound of the messages and states in the object store while the window is full, with two snapshots."""
        architecture, order, negatives = self.architecture, self.order, self.negatives
        chunk, block = order.batch_size * self.chunk_size, evaluation_block(architecture)
        signals = chunk * (negatives.per_sample + architecture.labels_shown), EVALUATION_ROWS - block
        read = [layer for layers in self.stage_layers for layer in layers if self._is_read(layer, layers)]
        read_values = sum(architecture.widths[1 + layer] for layer in read)
        widest = max((architecture.widths[1 + layers[-1]] for layers in self.stage_layers[:-1]), default=0)
        # What the readout reads waits for the last layer; the signal is in two places at most.
        values = max(
            samples * read_values + 2 * signal * widest for samples, signal in zip((chunk, block), signals, strict=True)
        )
        messages = self.max_in_flight * values * architecture.compute_dtype.itemsize
        ahead = (self.max_in_flight + negatives.ahead) * chunk
        made = (ahead + 2 * min(SHARD_SAMPLES, order.samples)) * negatives.sample_bytes  # whole shards at both ends
        drawn = LABEL_BYTES * (order.samples + order.batch_size * (negatives.prediction_delay or 0))
        return messages + made + drawn + UNWRITTEN * self.state_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of everything that layers and readout keep, as a snapshot takes it."""
        return sum(self.architecture.state_bytes)

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
