"""The running parts of the pipeline. They are plain classes: with or without a cluster, they do the same."""

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ffdist.data.order import SampleOrder
from ffdist.ff.network import Architecture
from ffdist.pipeline.schedule import Evaluate, Train
from ffdist.pipeline.source import Source

State = dict[str, dict[str, Tensor]]
"""Tensors by layer (`layer_1`, ..., `readout`) and name."""


class Report(NamedTuple):
    """What comes home of a chunk."""

    metrics: Tensor
    """Of a stage `[K, layers, len(METRICS)]`, of the readout loss and error `[K, 2]`; float32."""
    compute_s: float
    """Time spent on the chunk."""
    wait_s: float
    """Time since the chunk before, spent waiting for this one and unpacking it."""


class _Clock:
    """Splits a stage's time into computing and waiting; the first chunk starts it."""

    def __init__(self) -> None:
        self._free_since: float | None = None

    def report(self, metrics: Tensor, start: float) -> Report:
        wait_s = start - self._free_since if self._free_since is not None else 0.0
        compute_s = self.free() - start
        return Report(metrics, compute_s, wait_s)

    def free(self) -> float:
        """Notes that whatever the stage did is done: evaluations are neither computing on a chunk nor waiting."""
        self._free_since = time.perf_counter()
        return self._free_since


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in module.state_dict().items()}


class Stage:
    """A run of layers, each trained on its own loss as chunks pass.

    Args:
        architecture: The whole network.
        layers: The layers held here, counted from 0.
        order: SampleOrder of the training set.
        measure_every: Minibatches between two measurements of the weights.
        device: Where the layers live, as torch names it. What travels is always in main memory.
        images: Images of each split, which the first stage turns into rows; elsewhere None.
        labels: Labels of the training set, likewise.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: range,
        order: SampleOrder,
        measure_every: int,
        device: str,
        images: dict[str, Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> None:
        self._layers = {index: architecture.layer(index).to(device) for index in layers}
        for layer in self._layers.values():
            layer.refresh()
        self._source = None if images is None or labels is None else Source(architecture, images, labels, order)
        self._measure_every, self._device = measure_every, device
        self._dtype, self._clock = architecture.compute_dtype, _Clock()
        self._is_last = layers.stop == len(architecture.units)
        read = range(architecture.predict_from - 1, len(architecture.units))
        self._neutral_travels = [index in read or (index == layers[-1] and not self._is_last) for index in layers]

    def train(self, chunk: Train, *message: Tensor) -> list[Report | Tensor | None]:
        """Trains on a chunk, one update a minibatch.

        Args:
            chunk: What to train on.
            *message: In the first stage the negatives `[K, B]`; elsewhere, from the stage before, the signal
                `[K, 2B, D]` and the neutral rows `[K, B, D]`. Never written to.

        Returns:
            The report; the signal `[K, 2B, H]` for the next stage; the neutral activities `[K, B, H]` of each layer.
            None stands for what nobody reads. Activities are those at the weights with which a minibatch arrived.
        """
        start = time.perf_counter()
        signal, neutral = self._source.train(chunk, *message) if self._source else message
        batch, metrics = neutral.shape[1], []
        outputs: list[list[Tensor]] = [[] for _ in self._layers]
        for minibatch in range(chunk.num_minibatches):
            rows = torch.cat((signal[minibatch], neutral[minibatch])).to(self._device)
            measure = (chunk.step + minibatch + 1) % self._measure_every == 0
            for output, layer in zip(outputs, self._layers.values(), strict=True):
                (rows, _), layer_metrics = layer.train_minibatch(rows, gain=chunk.gain, measure_weights=measure)
                output.append(rows)
                metrics.append(layer_metrics)
        passed = None if self._is_last else torch.stack([rows[: 2 * batch] for rows in outputs[-1]]).cpu()
        neutrals = [
            torch.stack([rows[2 * batch :] for rows in output]).cpu() if travels else None
            for output, travels in zip(outputs, self._neutral_travels, strict=True)
        ]
        stacked = torch.stack(metrics).reshape(chunk.num_minibatches, len(self._layers), -1).cpu()
        return [self._clock.report(stacked, start), passed, *neutrals]

    def evaluate(self, block: Evaluate, *message: Tensor) -> list[Tensor | None]:
        """Passes a block through, at fixed weights.

        Args:
            block: What to evaluate.
            *message: Nothing in the first stage; elsewhere the rows with every label `[n, C, D]` and the neutral
                rows `[n, D]`.

        Returns:
            Each layer's goodness `[layers, n, C]`; then as `train` does, `[n, C, H]` and `[n, H]` of each layer.
        """
        claims, neutral = self._source.evaluate(block) if self._source else message
        rows = torch.cat((claims, neutral.unsqueeze(1)), 1).to(self._device)
        goodness, neutrals = [], []
        for layer, travels in zip(self._layers.values(), self._neutral_travels, strict=True):
            rows, layer_goodness = layer(rows)
            goodness.append(layer_goodness[:, :-1])
            neutrals.append(rows[:, -1].cpu().contiguous() if travels else None)
        passed = None if self._is_last else rows[:, :-1].cpu().contiguous()
        self._clock.free()
        return [torch.stack(goodness).cpu(), passed, *neutrals]

    def state(self) -> State:
        """Returns a copy of everything that the layers learned."""
        state = {f"layer_{index + 1}": _state(layer) for index, layer in self._layers.items()}
        self._clock.free()
        return state


class ReadoutStage:
    """The readout, trained beside the layers as their activities stream by.

    Args:
        architecture: The whole network.
        labels: True labels of the training set `[N]`, int64.
        order: SampleOrder of the training set.
    """

    def __init__(self, architecture: Architecture, labels: Tensor, order: SampleOrder) -> None:
        self._readout, self._labels, self._order, self._clock = architecture.readout(), labels, order, _Clock()

    def train(self, chunk: Train, *neutral: Tensor) -> Report:
        """Trains on a chunk from the neutral activities `[K, B, H]` of each read layer, lowest first."""
        start = time.perf_counter()
        samples = self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)
        metrics = [
            self._readout.train_minibatch([part[minibatch] for part in neutral], labels, gain=chunk.gain)
            for minibatch, labels in enumerate(self._labels[samples])
        ]
        return self._clock.report(torch.stack(metrics), start)

    def evaluate(self, *neutral: Tensor) -> Tensor:
        """Returns the predicted labels `[n]` from the neutral activities `[n, H]` of each read layer."""
        predicted: Tensor = self._readout(list(neutral)).argmax(-1)
        self._clock.free()
        return predicted

    def state(self) -> State:
        """Returns a copy of everything that the readout learned."""
        return {"readout": _state(self._readout)}
