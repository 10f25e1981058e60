"""The running parts of the pipeline. They are plain classes: with or without a cluster, they do the same."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ffdist.data.order import SampleOrder
from ffdist.ff.keyed import generator
from ffdist.ff.negatives import draw_wrong_labels
from ffdist.ff.network import Architecture
from ffdist.pipeline.device import Take, Way, taking
from ffdist.pipeline.schedule import Evaluate, Train
from ffdist.pipeline.source import Drawn, Shard, Source

State = dict[str, dict[str, Tensor]]
"""Tensors by what they belong to (`layer_1`, ..., `readout`, `negatives`) and name."""


class Report(NamedTuple):
    """What comes home of a chunk."""

    metrics: Tensor
    """Of a stage `[K, layers, len(METRICS)]`, of the readout loss and error `[K, 2]`; float32."""
    compute_s: float
    """Time spent on the chunk."""
    wait_s: float
    """Time since the chunk before, spent waiting for this one and unpacking it."""
    negatives_wait_s: float = 0.0
    """The part of it in which the negatives were being made; 0 but in the first stage."""
    packing_s: float = 0.0
    """The part of it in which the process was at work, packing what goes out and unpacking what comes in."""
    queued_s: float = 0.0
    """The part of it in which the stage could have gone on, and others had the processors; 0 where it is not told."""
    begun_at: float = 0.0
    """Time of day at which the chunk was here, in seconds; 0 where it is not told."""


class _Clock:
    """Splits a stage's time into computing and waiting; the first chunk starts it."""

    def __init__(self) -> None:
        self._zero_at = time.time() - time.perf_counter()  # one clock for all: read apart, two disagree under load
        self._free_since: tuple[float, float, float] | None = None
        self._begun, self._wait_s, self._packing_s, self._queued_s = 0.0, 0.0, 0.0, 0.0

    def begin(self) -> None:
        """Notes that a chunk is here."""
        times = _times()
        self._begun = times[0]
        if self._free_since is not None:
            gap = (now - before for now, before in zip(times, self._free_since, strict=True))
            self._wait_s, self._packing_s, self._queued_s = gap

    def report(self, metrics: Tensor, shards: Sequence[Shard] = ()) -> Report:
        compute_s = self.free() - self._begun
        begun_at = self._zero_at + self._begun
        until_made_s = begun_at - max((shard.made_at for shard in shards), default=-math.inf)
        making_s = sum(shard.make_s for shard in shards)
        negatives_wait_s = max(0.0, min(making_s, self._wait_s - until_made_s))
        return Report(metrics, compute_s, self._wait_s, negatives_wait_s, self._packing_s, self._queued_s, begun_at)

    def free(self) -> float:
        """Notes that whatever the stage did is done: evaluations are neither computing on a chunk nor waiting."""
        self._free_since = _times()
        return self._free_since[0]


def _times() -> tuple[float, float, float]:
    """Returns the time, and for how much of it this process has worked, and this thread queued for a processor."""
    queued_s = 0.0
    with suppress(OSError):  # Linux alone tells it
        queued_s = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.perf_counter(), time.process_time(), queued_s


def layer_name(index: int) -> str:
    """Names a layer, counted from 0, as states and metrics do."""
    return f"layer_{index + 1}"


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns everything that a module keeps, in main memory; what lies there already is not copied."""
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


class Stage:
    """A run of layers, each trained on its own loss as chunks pass.

    What the readout reads of a minibatch, its neutral rows, travels apart from the signal, the other rows. Where no
    label is shown the positive rows are what it reads, and the signal holds the negative ones.

    Args:
        architecture: The whole network.
        layers: The layers held here, counted from 0.
        order: SampleOrder of the training set.
        measure_every: Minibatches between two in which MEASURED is.
        device: Where the layers live, as torch names it. What travels is always in main memory.
        source: What turns images into rows, in the first stage.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: range,
        order: SampleOrder,
        measure_every: int,
        device: str,
        *source: Any,
    ) -> None:
        self._layers = {index: architecture.layer(index).to(device) for index in layers}
        for layer in self._layers.values():
            layer.refresh()
        self._source = Source(architecture, order, device, *source) if source else None
        self._measure_every, self._device, self._batch = measure_every, device, order.batch_size
        self._take_steps = self._steps()
        self._clock = _Clock()
        self._labels_shown, self._is_last = architecture.labels_shown, layers.stop == len(architecture.layers)
        self._by_class = architecture.by_class
        read = range(architecture.predict_from - 1, len(architecture.layers))
        self._read_travels = [index in read or (index == layers[-1] and not self._is_last) for index in layers]

    def _steps(self) -> Take:
        return taking(self._device, made_there=self._source is not None)

    def train(self, chunk: Train, *message: Any) -> list[Report | Tensor | None]:
        """Trains on a chunk, minibatch after minibatch.

        Args:
            chunk: What to train on.
            *message: In the first stage what `Source.train` takes; elsewhere, from the stage before, the signal
                `[K, S, D]` and the rows that the readout reads `[K, B, D]`. Never written to.

        Returns:
            The report; the signal `[K, S, H]` for the next stage; what the readout reads `[K, B, H]` of each layer.
            None stands for what nobody reads. Activities are those at the weights with which a minibatch arrived.
        """
        self._clock.begin()
        shards = [part for part in message if isinstance(part, Shard)]
        # Positive rows first: without labels they are those that the readout reads.
        rows = message if self._labels_shown else message[::-1]
        parts = self._source.train(chunk, *message) if self._source else rows
        done = range(chunk.step + 1, chunk.step + 1 + chunk.num_minibatches)
        ways = [Way(chunk.gain, chunk.layer, step % self._measure_every == 0) for step in done]
        metrics, *made = self._take_steps(self._step, parts, ways)
        passed = None if self._is_last else made.pop()
        reads = [made.pop(0) if travels else None for travels in self._read_travels]
        return [self._clock.report(metrics, shards), passed, *reads]

    def _step(self, parts: Sequence[Tensor], way: Way) -> list[Tensor]:
        """Trains on the rows of a minibatch; returns metrics, what the readout reads of each layer, and the signal."""
        rows = self._source.rows(parts) if self._source else torch.cat(list(parts))
        batch, metrics, made = self._batch, [], []
        signal_rows, read_rows = slice(None, -batch), slice(-batch, None)
        if not self._labels_shown:
            signal_rows, read_rows = slice(batch, None), slice(None, batch)
        for (index, layer), travels in zip(self._layers.items(), self._read_travels, strict=True):
            (rows, _), layer_metrics = layer.train_minibatch(
                rows,
                batch=batch,
                negatives=len(rows) // batch - 1 - self._labels_shown,
                gain=way.gain if way.layer in (None, index) else None,
                measure=way.measure,
            )
            metrics.append(layer_metrics)
            made += [rows[read_rows]] * travels
        return [torch.stack(metrics), *made, *([] if self._is_last else [rows[signal_rows]])]

    def evaluate(self, block: Evaluate, *message: Tensor) -> list[Tensor | None]:
        """Passes a block through, at fixed weights.

        Args:
            block: What to evaluate.
            *message: Nothing in the first stage; elsewhere the rows with every label tried `[n, T, D]` (none where no
                label is shown) and those that the readout reads `[n, D]`.

        Returns:
            Each layer's goodness for every label `[layers, n, C]`, -inf for one that is not tried; then as `train`
            does, `[n, T, H]` and `[n, H]` of each layer.
        """
        claims, read = self._source.evaluate(block) if self._source else message
        rows = torch.cat((claims, read.unsqueeze(1)), 1).to(self._device)
        goodness, reads = [], []
        for layer, travels in zip(self._layers.values(), self._read_travels, strict=True):
            rows, layer_goodness = layer(rows)
            goodness.append(layer_goodness[:, :-1])
            reads.append(rows[:, -1].cpu().contiguous() if travels else None)
        passed = None if self._is_last else rows[:, :-1].cpu().contiguous()
        self._clock.free()
        return [self._by_class(torch.stack(goodness).cpu()), passed, *reads]

    def state(self) -> State:
        """Returns everything that the layers learned, as `state_of` does, and the labels that negatives are to show."""
        state = {layer_name(index): state_of(layer) for index, layer in self._layers.items()}
        if self._source and self._source.hard_labels:
            state["negatives"] = self._source.hard_labels.state()
        self._clock.free()
        return state

    def restore(self, state: State) -> None:
        """Takes up where a state was taken; of labels for negatives only where there are any."""
        for index, layer in self._layers.items():
            layer.load_state_dict(state[layer_name(index)])
        self._take_steps = self._steps()  # a graph knows the copies of weights before
        if self._source and self._source.hard_labels and "negatives" in state:
            self._source.hard_labels.restore(state["negatives"])


class ReadoutStage:
    """The readout, trained beside the layers as their activities stream by.

    Args:
        architecture: The whole network.
        labels: True labels of the training set `[N]`, int64.
        order: SampleOrder of the training set.
        draws: Whether it draws wrong labels, for hard negatives.
        device: Where it lives, as torch names it.
    """

    def __init__(
        self, architecture: Architecture, labels: Tensor, order: SampleOrder, draws: bool, device: str
    ) -> None:
        self._readout, self._labels, self._order = architecture.readout().to(device), labels, order
        self._draws, self._device, self._clock = draws, device, _Clock()
        self._draw_wrong_labels = partial(draw_wrong_labels, untrained=architecture.untrained)
        self._take_steps = taking(device)

    def train(self, chunk: Train, *read: Tensor) -> tuple[Report, Drawn | None]:
        """Trains on a chunk from the activities `[K, B, H]` of each read layer, lowest first.

        Returns:
            The report; and each sample's wrong label, drawn from what the readout took it for before its update.
        """
        self._clock.begin()
        labels = self._labels[self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)]
        ways = [Way(chunk.gain)] * chunk.num_minibatches
        logits, metrics = self._take_steps(self._step, (*read, labels), ways)
        drawn = None
        if self._draws:
            draws = (generator(self._order.seed, "hard labels", step) for step in count(chunk.step))
            drawn = Drawn(chunk, torch.stack([*map(self._draw_wrong_labels, logits, labels, draws)]))
        return self._clock.report(metrics), drawn

    def _step(self, parts: Sequence[Tensor], way: Way) -> Sequence[Tensor]:
        """Trains on what is read of a minibatch and its labels, the last part; returns logits and metrics."""
        *read, labels = parts
        return self._readout.train_minibatch(read, labels, gain=way.gain)

    def evaluate(self, *read: Tensor) -> Tensor:
        """Returns the predicted labels `[n]` from the activities `[n, H]` of each read layer."""
        predicted: Tensor = self._readout([part.to(self._device) for part in read]).argmax(-1).cpu()
        self._clock.free()
        return predicted

    def state(self) -> State:
        """Returns everything that the readout learned, as `state_of` does."""
        return {"readout": state_of(self._readout)}

    def restore(self, state: State) -> None:
        """Takes up where a state was taken."""
        self._readout.load_state_dict(state["readout"])
