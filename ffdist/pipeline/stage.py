"""Stages and the readout. They are plain classes, which run in this process or in Ray actors."""

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
from ffdist.ff.layers import Minibatch, Passes
from ffdist.ff.negatives import draw_wrong_labels
from ffdist.ff.network import Architecture
from ffdist.pipeline.executor import Executor, StepMode, make_executor
from ffdist.pipeline.schedule import Evaluate, Train
from ffdist.pipeline.source import Drawn, Shard, Source

State = dict[str, dict[str, Tensor]]
"""Tensors by owner (`layer_1`, ..., `readout`, `negatives`) and name."""


class Report(NamedTuple):
    """Metrics and times of a chunk."""

    metrics: Tensor
    """Of a stage `[K, layers, metrics]`; of the readout, loss and error `[K, 2]`; float32."""
    compute_s: float
    """Time spent on the chunk."""
    wait_s: float
    """Time since the previous chunk, waiting for this one and deserializing it."""
    negatives_wait_s: float = 0.0
    """The part of it in which the negatives were being made; 0 except in the first stage."""
    serialization_s: float = 0.0
    """The part of it in which the process serialized and deserialized messages."""
    queued_s: float = 0.0
    """The part of it in which the stage was ready but other processes had the CPUs; 0 if unknown."""
    begun_at: float = 0.0
    """When the chunk had arrived, in seconds since 1970; 0 if unknown."""


class _Clock:
    """Splits a stage's time into computing and waiting; the first chunk starts it."""

    def __init__(self) -> None:
        self._zero_at = time.time() - time.perf_counter()  # one clock for all times: two differ under load
        self._free_since: tuple[float, float, float] | None = None
        self._begun, self._wait_s, self._serialization_s, self._queued_s = 0.0, 0.0, 0.0, 0.0

    def begin(self) -> None:
        """Notes the arrival of a chunk."""
        times = _times()
        self._begun = times[0]
        if self._free_since is not None:
            gap = (now - before for now, before in zip(times, self._free_since, strict=True))
            self._wait_s, self._serialization_s, self._queued_s = gap

    def report(self, metrics: Tensor, shards: Sequence[Shard] = ()) -> Report:
        compute_s = self.free() - self._begun
        begun_at = self._zero_at + self._begun
        until_made_s = begun_at - max((shard.made_at for shard in shards), default=-math.inf)
        making_s = sum(shard.make_s for shard in shards)
        negatives_wait_s = max(0.0, min(making_s, self._wait_s - until_made_s))
        return Report(
            metrics, compute_s, self._wait_s, negatives_wait_s, self._serialization_s, self._queued_s, begun_at
        )

    def free(self) -> float:
        """Notes the end of any call. Evaluations count neither as computing on a chunk nor as waiting."""
        self._free_since = _times()
        return self._free_since[0]


def _times() -> tuple[float, float, float]:
    """Returns the time, the CPU time of this process, and the time that this thread waited for a CPU."""
    queued_s = 0.0
    with suppress(OSError):  # only Linux has it
        queued_s = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.perf_counter(), time.process_time(), queued_s


def layer_name(index: int) -> str:
    """Returns the name of a layer, counted from 0, in states and metrics."""
    return f"layer_{index + 1}"


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns the state of a module in host memory; tensors that are there already are not copied."""
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


class Stage:
    """Consecutive layers, each trained on its own loss.

    The pass for the readout (the neutral one) is sent separately from the other passes (the signal). If no label is
    shown, the readout uses the positive pass, and the signal consists of the negative ones, of which there may be none.

    Shapes: `K` minibatches of a chunk, `P` passes, `S` passes of the signal, `B` samples of a minibatch, `D` inputs,
    `H` units.

    Args:
        architecture: The whole network.
        layers: Layers of this stage, counted from 0.
        order: SampleOrder of the training set.
        measure_every: Interval of the minibatches in which MEASURED is measured.
        device: Device of the layers, as torch names it. Messages are always in host memory.
        labels: Labels of the training set `[N]`, if the objective needs them.
        source: Arguments of `Source`, in the first stage.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: range,
        order: SampleOrder,
        measure_every: int,
        device: str,
        labels: Tensor | None,
        *source: Any,
    ) -> None:
        self._layers = {index: architecture.layer(index).to(device) for index in layers}
        for layer in self._layers.values():
            layer.refresh()
        self._source = Source(architecture, order, device, *source) if source else None
        self._measure_every, self._device, self._order, self._labels = measure_every, device, order, labels
        self._drawing = [index for index, layer in self._layers.items() if layer.draws]
        self._execute = self._make_executor()
        self._clock = _Clock()
        self._labels_shown, self._is_last = architecture.labels_shown, layers.stop == len(architecture.layers)
        self._by_class, self._scores_classes = architecture.by_class, architecture.objective.scores_classes
        read = architecture.read_layers
        is_sent_on = [index == layers[-1] and not self._is_last for index in layers]
        self._is_read_sent = [index in read or is_sent for index, is_sent in zip(layers, is_sent_on, strict=True)]
        # What only the readout reads is pooled here; what the next stage reads as well is pooled by the readout.
        self._pools = [index in read and not is_sent for index, is_sent in zip(layers, is_sent_on, strict=True)]
        self._pool_read = architecture.pool_read

    def _make_executor(self) -> Executor:
        return make_executor(self._device, inputs_on_device=self._source is not None)

    def train(self, chunk: Train, *message: Any) -> list[Report | Tensor | None]:
        """Trains on a chunk, minibatch after minibatch.

        Args:
            chunk: The chunk.
            *message: In the first stage, the arguments of `Source.train`; otherwise the signal `[K, S, B, D]` of the
                previous stage and its pass for the readout `[K, B, D]`. They are not modified.

        Returns:
            The report; the signal for the next stage `[K, S, B, H]`; and the pass for the readout of each layer
            `[K, B, H]`; None for those that are not used. All are computed with the weights before the update.
        """
        self._clock.begin()
        shards = [part for part in message if isinstance(part, Shard)]
        inputs = self._source.train(chunk, *message) if self._source else list(message)
        if self._labels is not None:
            labels = self._labels[self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)]
            inputs.append(labels.to(self._device) if self._source else labels)
        for index in self._drawing:
            draw, batch = self._layers[index].draw, self._order.batch_size
            steps = range(chunk.step, chunk.step + chunk.num_minibatches)
            noise = torch.stack([draw(batch, generator(self._order.seed, "noise", index, step)) for step in steps])
            inputs.append(noise.to(self._device) if self._source else noise)
        steps_done = range(chunk.step + 1, chunk.step + 1 + chunk.num_minibatches)
        modes = [StepMode(chunk.lr_scale, chunk.layer, step % self._measure_every == 0) for step in steps_done]
        metrics, *outputs = self._execute(self._step, inputs, modes)
        signal = None if self._is_last else outputs.pop()
        reads = [outputs.pop(0) if is_sent else None for is_sent in self._is_read_sent]
        return [self._clock.report(metrics, shards), signal, *reads]

    def _step(self, inputs: Sequence[Tensor], mode: StepMode) -> list[Tensor]:
        """Trains on a minibatch; returns metrics, the pass for the readout of each layer, and the signal."""
        num_drawn, labels = len(self._drawing), None
        inputs, drawn = inputs[: len(inputs) - num_drawn], inputs[len(inputs) - num_drawn :]
        noise = dict(zip(self._drawing, drawn, strict=True))
        if self._labels is not None:
            *inputs, labels = inputs
        if self._source:
            rows = self._source.rows(inputs)
            passes = Passes(len(rows) - 1 - self._labels_shown, self._labels_shown)
        else:
            signal, read = inputs
            passes = Passes(len(signal) - self._labels_shown, self._labels_shown)
            rows = passes.join(signal, read)
        metrics, reads = [], []
        for (index, layer), is_sent, pools in zip(self._layers.items(), self._is_read_sent, self._pools, strict=True):
            (rows, _), layer_metrics = layer.train_minibatch(
                Minibatch(rows, passes, labels, noise.get(index)),
                lr_scale=mode.lr_scale if mode.layer in (None, index) else None,
                measure=mode.measure,
            )
            metrics.append(layer_metrics)
            read = rows[passes.readout]
            reads += [self._pool_read(index, read) if pools else read] * is_sent
        return [torch.stack(metrics), *reads, *([] if self._is_last else [rows[passes.others]])]

    def evaluate(self, block: Evaluate, *message: Tensor) -> list[Tensor | None]:
        """Evaluates a block, at fixed weights.

        Args:
            block: The block.
            *message: Nothing in the first stage; otherwise the rows with every label that is tried `[n, T, D]` (none if
                no label is shown) and those for the readout `[n, D]`.

        Returns:
            The goodness or class scores of each layer for every label `[layers, n, C]`, -inf for labels that are not
            tried; then, as in `train`, the signal `[n, T, H]` and the rows for the readout `[n, H]` of each layer.
        """
        claims, read = self._source.evaluate(block) if self._source else message
        rows = torch.cat((claims, read.unsqueeze(1)), 1).to(self._device)
        goodness, reads = [], []
        for (index, layer), is_sent, pools in zip(self._layers.items(), self._is_read_sent, self._pools, strict=True):
            rows, scores = layer(rows)
            goodness.append(scores[:, -1] if self._scores_classes else scores[:, :-1])
            read = self._pool_read(index, rows[:, -1]) if pools else rows[:, -1]
            reads.append(read.cpu().contiguous() if is_sent else None)
        signal = None if self._is_last else rows[:, :-1].cpu().contiguous()
        self._clock.free()
        return [self._by_class(torch.stack(goodness).cpu()), signal, *reads]

    def state(self) -> State:
        """Returns the state of the layers and of hard labels, as `state_of` does."""
        state = {layer_name(index): state_of(layer) for index, layer in self._layers.items()}
        if self._source and self._source.hard_labels:
            state["negatives"] = self._source.hard_labels.state()
        self._clock.free()
        return state

    def restore(self, state: State) -> None:
        """Restores a state."""
        for index, layer in self._layers.items():
            layer.load_state_dict(state[layer_name(index)])
        self._execute = self._make_executor()  # graphs refer to earlier copies of the weights
        if self._source and self._source.hard_labels and "negatives" in state:
            self._source.hard_labels.restore(state["negatives"])


class ReadoutStage:
    """The readout, trained at the same time as the layers, on their activities.

    Args:
        architecture: The whole network.
        labels: True labels of the training set `[N]`, int64.
        order: SampleOrder of the training set.
        draws: Whether it draws wrong labels for hard negatives.
        device: Device of the readout, as torch names it.
    """

    def __init__(
        self, architecture: Architecture, labels: Tensor, order: SampleOrder, draws: bool, device: str
    ) -> None:
        self._readout, self._labels, self._order = architecture.readout().to(device), labels, order
        self._draws, self._device, self._clock = draws, device, _Clock()
        self._draw_wrong_labels = partial(draw_wrong_labels, untrained=architecture.untrained)
        self._execute = make_executor(device)

    def train(self, chunk: Train, *read: Tensor) -> tuple[Report, Drawn | None]:
        """Trains on a chunk, from the activations `[K, B, H]` of each read layer, first layer first.

        Returns:
            The report; and a wrong label for each sample, drawn from the readout's prediction before the update.
        """
        self._clock.begin()
        labels = self._labels[self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)]
        modes = [StepMode(chunk.lr_scale)] * chunk.num_minibatches
        logits, metrics = self._execute(self._step, (*read, labels), modes)
        drawn = None
        if self._draws:
            sources = (generator(self._order.seed, "hard labels", step) for step in count(chunk.step))
            drawn = Drawn(chunk, torch.stack([*map(self._draw_wrong_labels, logits, labels, sources)]))
        return self._clock.report(metrics), drawn

    def _step(self, inputs: Sequence[Tensor], mode: StepMode) -> Sequence[Tensor]:
        """Trains on the activations and labels of a minibatch; returns logits and metrics."""
        *read, labels = inputs
        return self._readout.train_minibatch(read, labels, lr_scale=mode.lr_scale)

    def evaluate(self, *read: Tensor) -> Tensor:
        """Returns the predicted labels `[n]` from the activations `[n, H]` of each read layer."""
        predicted: Tensor = self._readout([part.to(self._device) for part in read]).argmax(-1).cpu()
        self._clock.free()
        return predicted

    def state(self) -> State:
        """Returns the state of the readout, as `state_of` does."""
        return {"readout": state_of(self._readout)}

    def restore(self, state: State) -> None:
        """Restores a state."""
        self._readout.load_state_dict(state["readout"])
