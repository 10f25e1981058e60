"""The description of a run's actors, and how much travels between them at once."""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple

from ffdist.data.order import SHARD_SAMPLES, SampleOrder
from ffdist.ff.architecture import Architecture
from ffdist.pipeline.schedule import evaluation_block
from ffdist.pipeline.source import NegativePlan, NegativeSource
from ffdist.pipeline.stage import ReadoutStage, Stage

LABEL_BYTES = 8
MAX_UNWRITTEN = 2
"""Largest number of snapshots that are taken and not yet written."""
SPARE_CHUNKS = 3
"""Chunks in flight in addition to one per stage: in the readout, and in transfer."""
DEFAULT_CHUNK = 20
"""Minibatches per chunk if costs are not measured."""
CHUNK_S = 0.35
"""Time that the slowest stage should take for a chunk, so that the overhead of calls and messages is small."""
MAX_CHUNK_BYTES = 2**25
"""Largest message of a chunk."""


class Actors(NamedTuple):
    """The actors of a run: Ray actors, or plain objects of the same classes."""

    negatives: list[Any]
    stages: list[Any]
    readout: Any
    """None if the network has no readout."""
    writer: Any
    """Has `write(snapshot, *states)`."""


class Blueprint(NamedTuple):
    """Describes the actors of a run, apart from the data."""

    architecture: Architecture
    order: SampleOrder
    negatives: NegativePlan
    stage_layers: list[range]
    """Layers of each stage, counted from 0."""
    measure_every: int
    """Interval of the minibatches in which MEASURED is measured."""
    device: str
    """Device of layers and readout, as torch names it."""

    chunk_size: int = DEFAULT_CHUNK
    """Largest number of minibatches in a chunk."""
    max_in_flight: int = 1
    """Number of commands in flight."""

    def with_pace(
        self,
        chunk_size: int | Literal["auto"],
        max_in_flight: int | Literal["auto"],
        *,
        minibatch_s: float | None = None,
        most: int | None = None,
    ) -> "Blueprint":
        """Returns a blueprint with a chunk size and a number of commands in flight. Neither changes a result.

        Args:
            chunk_size: Minibatches per chunk; `auto`: so many that the slowest stage takes CHUNK_S.
            max_in_flight: Commands in flight; `auto`: enough to keep every stage busy.
            minibatch_s: Time that the slowest stage takes for a minibatch, if it is known.
            most: Upper bound of `auto`, in minibatches.
        """
        delay, busy = self.negatives.prediction_delay, len(self.stage_layers) + SPARE_CHUNKS
        wanted = round(CHUNK_S / minibatch_s) if minibatch_s else DEFAULT_CHUNK
        limits = (
            most or wanted,
            delay // busy if delay else wanted,
            MAX_CHUNK_BYTES // max(1, *(self.bytes_out(layers) for layers in self.stage_layers)),
        )
        size = max(1, min(wanted, *limits)) if chunk_size == "auto" else chunk_size
        size, window = min(size, self.order.num_minibatches), busy if max_in_flight == "auto" else max_in_flight
        # No command waits for labels that are drawn by one in flight.
        return self._replace(chunk_size=size, max_in_flight=min(window, delay // size) if delay else window)

    def bytes_out(self, layers: Sequence[int]) -> int:
        """Returns the bytes of a minibatch that a stage sends to the next stage and to the readout."""
        architecture, last = self.architecture, layers[-1]
        is_last = last + 1 == len(architecture.layers)
        values = 0 if is_last else self._signal_passes * architecture.widths[1 + last]
        values += sum(self._read_values(layer, layers) for layer in layers)
        return values * self.order.batch_size * architecture.compute_dtype.itemsize

    @property
    def _signal_passes(self) -> int:
        """Number of passes in the signal of a minibatch. The pass for a joint readout is sent separately."""
        architecture = self.architecture
        return self.negatives.per_sample + architecture.has_neutral + (architecture.readout_kind != "joint")

    def _read_values(self, layer: int, layers: Sequence[int]) -> int:
        """Returns the number of values in a row of the readout pass that a stage sends after a layer.

        Pooled ones and logits are float32, which may be two values of the compute type.
        """
        architecture = self.architecture
        is_sent_on = layer == layers[-1] and layer + 1 < len(architecture.layers)
        if is_sent_on and architecture.readout_kind == "joint":
            return architecture.widths[1 + layer]
        if layer not in architecture.read_layers or not architecture.has_readout:
            return 0
        if architecture.readout_kind == "per_layer":
            return 4 // architecture.compute_dtype.itemsize * architecture.classes
        form, to = architecture.read_forms[layer - architecture.read_layers.start]
        return form.size if form.shape == to.shape else 4 // architecture.compute_dtype.itemsize * to.size

    @property
    def bytes_in_flight(self) -> int:
        """Upper bound of messages and states in the object store: all commands in flight, and two snapshots."""
        architecture, order, negatives = self.architecture, self.order, self.negatives
        chunk, block = order.batch_size * self.chunk_size, evaluation_block(architecture)
        num_tried = len(architecture.tried) if architecture.labels_shown else 0
        signals = chunk * self._signal_passes, block * (num_tried + (architecture.readout_kind != "joint"))
        read_values = sum(self._read_values(layer, layers) for layers in self.stage_layers for layer in layers)
        widest = max((architecture.widths[1 + layers[-1]] for layers in self.stage_layers[:-1]), default=0)
        # The readout's rows wait for the last layer; at most two copies of the signal exist.
        values = max(
            samples * read_values + 2 * signal * widest for samples, signal in zip((chunk, block), signals, strict=True)
        )
        messages = self.max_in_flight * values * architecture.compute_dtype.itemsize
        prefetched = (self.max_in_flight + negatives.prefetch_chunks) * chunk
        stored = (
            prefetched + 2 * min(SHARD_SAMPLES, order.num_samples)
        ) * negatives.sample_bytes  # whole shards at both ends
        drawn = LABEL_BYTES * (order.num_samples + order.batch_size * (negatives.prediction_delay or 0))
        return messages + stored + drawn + MAX_UNWRITTEN * sum(architecture.state_bytes)

    def assemble(self, make: Callable[..., Any], samples: Any, labels: Any, writer: Any) -> Actors:
        """Creates all actors: the stages in order, the readout, the negatives.

        Args:
            make: Creates an object of a class from its arguments, or an actor of it.
            samples: Samples of each split, or a reference to them.
            labels: Labels of the training set, or a reference to them.
            writer: Writes snapshots.
        """
        architecture, order, negatives = self.architecture, self.order, self.negatives
        source = (negatives, samples, labels)
        needed_labels = labels if architecture.needs_labels else None
        readout = (ReadoutStage, architecture, labels, order, bool(negatives.prediction_delay), self.device)
        return Actors(
            stages=[
                make(Stage, architecture, layers, order, self.measure_every, self.device, needed_labels, *first)
                for layers, first in zip(self.stage_layers, chain([source], repeat(())), strict=False)
            ],
            readout=make(*readout) if architecture.has_readout else None,
            negatives=[
                make(NegativeSource, negatives, samples, labels, architecture, order)
                for _ in range(negatives.num_actors)
            ],
            writer=writer,
        )
