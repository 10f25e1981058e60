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
from ffdist.ff.architecture import Architecture, layer_name, readout_name
from ffdist.ff.keyed import generator
from ffdist.ff.labels import Rows
from ffdist.ff.layers import Layer, Minibatch, Passes
from ffdist.ff.negatives import draw_wrong_labels
from ffdist.ff.readout import loss_and_error, sum_logits
from ffdist.pipeline.executor import Executor, StepMode, make_executor
from ffdist.pipeline.schedule import Evaluate, Train
from ffdist.pipeline.source import Drawn, Shard, Source

State = dict[str, dict[str, Tensor]]
"""Tensors by owner (`layer_1`, ..., `readout` or `readout_2`, ..., `negatives`) and name."""


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


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns the state of a module in host memory; tensors that are there already are not copied."""
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


class Stage:
    """Consecutive layers, each trained on its own loss.

    The pass for a joint readout (the neutral one) is sent separately from the other passes (the signal). If no label is
    shown, the readout uses the positive pass, and the signal consists of the negative ones, of which there may be none.
    If layers have readouts of their own, or none, the signal consists of all passes, and only logits are sent.

    Shapes: `K` minibatches of a chunk, `P` passes, `S` passes of the signal, `B` samples of a minibatch, `D` inputs,
    `H` units, `C` classes.

    Args:
        architecture: The whole network.
        layers: Layers of this stage, counted from 0.
        order: SampleOrder of the training set.
        measure_every: Interval of the minibatches in which MEASURED is measured.
        device: Device of the layers, as torch names it. Messages are always in host memory.
        labels: Labels of the training set `[N]`, if the stage needs them.
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
        self._has_neutral, self._is_last = architecture.has_neutral, layers.stop == len(architecture.layers)
        self._metrics = architecture.metrics
        self._by_class, self._scores_classes = architecture.by_class, architecture.scores_classes
        read, self._is_joint = architecture.read_layers, architecture.readout_kind == "joint"
        with_readout = [index for index in layers if index in read and architecture.readout_kind == "per_layer"]
        self._readouts = {index: architecture.readout(index).to(device) for index in with_readout}
        sent_on = None if self._is_last or not self._is_joint else layers[-1]
        self._sent = (
            [index for index in layers if index in read or index == sent_on] if architecture.has_readout else []
        )
        # What only a joint readout reads is pooled here; what the next stage reads as well is pooled by the readout.
        self._pooled = [index for index in self._sent if index != sent_on and self._is_joint]
        self._pool_read = architecture.pool_read

    def _make_executor(self) -> Executor:
        return make_executor(self._device, inputs_on_device=self._source is not None)

    def train(self, chunk: Train, *message: Any) -> list[Report | Tensor | None]:
        """Trains on a chunk, minibatch after minibatch.

        Args:
            chunk: The chunk.
            *message: In the first stage, the arguments of `Source.train`; otherwise the signal `[K, S, B, D]` of the
                previous stage and, for a joint readout, its pass for the readout `[K, B, D]`. They are not modified.

        Returns:
            The report; the signal for the next stage `[K, S, B, H]`; and of each layer, the pass for the readout
            `[K, B, H]`, or the logits of its own readout `[K, B, C]`; None for those that are not used. All are
            computed with the weights before the update.
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
        reads = [outputs.pop(0) if index in self._sent else None for index in self._layers]
        return [self._clock.report(metrics, shards), signal, *reads]

    def _step(self, inputs: Sequence[Tensor], mode: StepMode) -> list[Tensor]:
        """Trains on a minibatch; returns metrics, what the readout gets of each layer, and the signal."""
        num_drawn, labels = len(self._drawing), None
        inputs, drawn = inputs[: len(inputs) - num_drawn], inputs[len(inputs) - num_drawn :]
        noise = dict(zip(self._drawing, drawn, strict=True))
        if self._labels is not None:
            *inputs, labels = inputs
        rows = self._rows(inputs)
        passes = Passes(rows.shape[0] - 1 - self._has_neutral, self._has_neutral)
        metrics, reads = [], []
        for index, layer in self._layers.items():
            (output, _), layer_metrics = layer.train_minibatch(
                Minibatch(rows, passes, labels, noise.get(index)),
                lr_scale=mode.lr_scale if mode.layer in (None, index) else None,
                measure=mode.measure,
            )
            metrics.append(
                layer_metrics if layer.metrics == self._metrics else self._align_metrics(layer, layer_metrics)
            )
            rows, read = output, output[passes.readout]
            if index in self._readouts:
                assert labels is not None, "readouts need labels"
                read, _ = self._readouts[index].train_minibatch([read], labels, lr_scale=mode.lr_scale)
            reads += [self._pool_read(index, read) if index in self._pooled else read] * (index in self._sent)
        signal = output[passes.others] if self._is_joint else output
        return [torch.stack(metrics), *reads, *([] if self._is_last else [signal])]

    def _rows(self, inputs: Sequence[Tensor]) -> Rows:
        """Returns all passes of a minibatch `[P, B, D]`."""
        if self._source:
            return self._source.rows(inputs)
        if not self._is_joint:
            return inputs[0]
        signal, read = inputs
        return Passes(has_neutral=self._has_neutral).join(signal, read)

    def _align_metrics(self, layer: Layer, metrics: Tensor) -> Tensor:
        """Returns the metrics of a layer in the places of their names, with 0 for those that it does not have."""
        by_name = dict(zip(layer.metrics, metrics, strict=True))
        return torch.stack([by_name.get(name, torch.zeros_like(metrics[0])) for name in self._metrics])

    def evaluate(self, block: Evaluate, *message: Tensor) -> list[Tensor | None]:
        """Evaluates a block, at fixed weights.

        Args:
            block: The block.
            *message: Nothing in the first stage; otherwise the rows with every label that is tried `[n, T, D]` (none if
                no label is shown) and those for a joint readout `[n, D]`, or both together `[n, T + 1, D]`.

        Returns:
            The goodness or class scores of each layer for every label `[layers, n, C]`, -inf for labels that are not
            tried; then, as in `train`, the signal `[n, T, H]` or `[n, T + 1, H]`, and of each layer the rows for the
            readout `[n, H]` or the logits `[n, C]`.
        """
        if self._source:
            rows: Rows = self._source.evaluate(block)
        else:
            joined = torch.cat((message[0], message[1].unsqueeze(1)), 1) if len(message) > 1 else message[0]
            rows = joined.to(self._device)
        goodness, reads = [], []
        for index, layer in self._layers.items():
            output, scores = layer(rows)
            rows = output
            goodness.append(scores[:, -1] if self._scores_classes else scores[:, :-1])
            read = self._readouts[index]([output[:, -1]]) if index in self._readouts else output[:, -1]
            read = self._pool_read(index, read) if index in self._pooled else read
            reads.append(read.cpu().contiguous() if index in self._sent else None)
        signal = None if self._is_last else (output[:, :-1] if self._is_joint else output).cpu().contiguous()
        self._clock.free()
        return [self._by_class(torch.stack(goodness).cpu()), signal, *reads]

    def state(self) -> State:
        """Returns the state of the layers, of their readouts and of hard labels, as `state_of` does."""
        state = {layer_name(index): state_of(layer) for index, layer in self._layers.items()}
        state |= {readout_name(index): state_of(readout) for index, readout in self._readouts.items()}
        if self._source and self._source.hard_labels:
            state["negatives"] = self._source.hard_labels.state()
        self._clock.free()
        return state

    def restore(self, state: State) -> None:
        """Restores a state."""
        for index, layer in self._layers.items():
            layer.load_state_dict(state[layer_name(index)])
        for index, readout in self._readouts.items():
            readout.load_state_dict(state[readout_name(index)])
        self._execute = self._make_executor()  # graphs refer to earlier copies of the weights
        if self._source and self._source.hard_labels and "negatives" in state:
            self._source.hard_labels.restore(state["negatives"])


class ReadoutStage:
    """The readout, trained at the same time as the layers, on their activities; or the sum of those of the layers.

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
        self._readout = architecture.readout().to(device) if architecture.readout_kind == "joint" else None
        self._labels, self._order = labels, order
        self._draws, self._device, self._clock = draws, device, _Clock()
        self._draw_wrong_labels = partial(draw_wrong_labels, untrained=architecture.untrained)
        self._execute = make_executor(device)

    def train(self, chunk: Train, *read: Tensor) -> tuple[Report, Drawn | None]:
        """Trains on a chunk, from the activations `[K, B, H]` or logits `[K, B, C]` of each read layer, in order.

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
        if self._readout is None:
            logits = sum_logits(read)
            return logits, loss_and_error(logits, labels)
        return self._readout.train_minibatch(read, labels, lr_scale=mode.lr_scale)

    def evaluate(self, *read: Tensor) -> Tensor:
        """Returns the predicted labels `[n]` from the activations `[n, H]` or logits `[n, C]` of each read layer."""
        parts = [part.to(self._device) for part in read]
        predicted: Tensor = (self._readout or sum_logits)(parts).argmax(-1).cpu()
        self._clock.free()
        return predicted

    def state(self) -> State:
        """Returns the state of the readout, as `state_of` does."""
        return {} if self._readout is None else {"readout": state_of(self._readout)}

    def restore(self, state: State) -> None:
        """Restores a state."""
        if self._readout is not None:
            self._readout.load_state_dict(state["readout"])
