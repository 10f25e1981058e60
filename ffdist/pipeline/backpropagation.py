"""Backpropagation as a baseline: the same layers, data and order, trained end to end in one process."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffdist.ff.keyed import generator
from ffdist.ff.layers import Layer
from ffdist.ff.network import Network
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.hardware import read_hardware
from ffdist.pipeline.runner import Evaluated, Event, SnapshotTaken, Trained
from ffdist.pipeline.schedule import Command, Evaluate, Train
from ffdist.pipeline.source import Source
from ffdist.pipeline.stage import Report, State, state_of


class Backpropagation:
    """A pipeline that trains the whole network by backpropagation.

    Its input is that of the readout pass: samples with the neutral label, or without a label. Activations are
    normalized between layers, and the readout reads the same layers. All parameters follow the gradient of its
    cross-entropy, by the update rule of the layers or of the readout.

    Args:
        blueprint: Describes the network and its data.
        samples: Samples of each split `[N, D]`.
        labels: Labels of the training set `[N]`.
        writer: Has `write(snapshot, *states)`.
    """

    def __init__(self, blueprint: Blueprint, samples: dict[str, Tensor], labels: Tensor, writer: Any) -> None:
        self.blueprint, architecture = blueprint, blueprint.architecture
        network = self._network = Network(architecture).to(blueprint.device)
        parts = architecture.parts
        self._learners: dict[str, Any] = {name: network.get_submodule(module) for name, module in parts.items()}
        self._device = blueprint.device
        self.hardware = {"network": read_hardware(blueprint.device)}
        self._refresh()
        self._source = Source(architecture, blueprint.order, blueprint.device, blueprint.negatives, samples, labels)
        self._order, self._samples, self._labels, self._writer = blueprint.order, samples, labels, writer

    def restore(self, state: State) -> None:
        """Restores the state of a snapshot."""
        for name, learner in self._learners.items():
            learner.load_state_dict(state[name])

    def run(self, commands: Iterable[Command], upcoming: Iterable[Command] = ()) -> Iterator[Event]:
        """Yields the result of each command, as `Runner.run` does; layers report nothing, and no label is tried."""
        for command in commands:
            if isinstance(command, Train):
                yield self._train(command)
            elif isinstance(command, Evaluate):
                samples = self._samples[command.split][command.first : command.first + command.num_samples]
                no_goodness = torch.empty(len(self._network.layers), len(samples), 0)
                rows = self._network.architecture.neutral_rows(samples.to(self._device))
                predicted = self._network.read_out(self._network.read(rows)).argmax(-1).cpu()
                yield Evaluated(command, [no_goodness], predicted)
            else:
                state = {name: state_of(learner) for name, learner in self._learners.items()}
                written = self._writer.write(command, state)
                yield SnapshotTaken(command, lambda wait, written=written: written)  # type: ignore[misc]

    def _train(self, chunk: Train) -> Trained:
        start = time.perf_counter()
        labels = self._labels[self._order.indices(chunk.epoch, chunk.first, chunk.num_minibatches)]
        metrics = torch.stack(
            [
                self._train_minibatch(rows, of.to(self._device), chunk.lr_scale, step)
                for step, (rows, of) in enumerate(zip(self._source.read(chunk), labels, strict=True), chunk.step)
            ]
        ).cpu()
        self._refresh()
        compute_s = time.perf_counter() - start
        no_metrics = torch.empty(chunk.num_minibatches, 0, len(self.blueprint.architecture.metrics))
        return Trained(chunk, [Report(no_metrics, compute_s, 0.0)], Report(metrics, compute_s, 0.0))

    def _train_minibatch(self, rows: Tensor, labels: Tensor, lr_scale: float, step: int) -> Tensor:
        """Makes one update; returns loss and error before it `[2]`."""
        noise = [self._draw(index, layer, len(rows), step) for index, layer in enumerate(self._network.layers)]
        self._network.requires_grad_().train()
        self._refresh()
        logits = self._network.read_out(self._network.read(rows, noise))
        self._network.eval()
        loss = F.cross_entropy(logits, labels)
        named = [dict(learner.named_parameters()) for learner in self._learners.values()]
        parameters = [parameter for each in named for parameter in each.values()]
        gradients = iter(torch.autograd.grad(-loss, parameters, materialize_grads=True))
        self._network.requires_grad_(False)
        for learner, names in zip(self._learners.values(), named, strict=True):
            learner.ascend({name: next(gradients) for name in names}, lr_scale=lr_scale)  # the loss is a mean
        return torch.stack((loss.detach(), (logits.argmax(1) != labels).float().mean()))

    def _draw(self, index: int, layer: Any, batch: int, step: int) -> Tensor | None:
        """Returns the random numbers of a layer for a minibatch, as a stage draws them; None if it needs none."""
        if not layer.draws:
            return None
        noise: Tensor = layer.draw(batch, generator(self._order.seed, "noise", index, step))
        return noise.to(self._device)

    def _refresh(self) -> None:
        for layer in self._network.layers:
            assert isinstance(layer, Layer)
            layer.refresh()
