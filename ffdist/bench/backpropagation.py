"""A pipeline of the same network that is trained by backpropagation, with the schedules of torch.

Shapes: `B` samples of a microbatch, `D` values of an input row, `H` units, `C` classes.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ffdist.bench.stretch import request, start_processes
from ffdist.data.order import SampleOrder
from ffdist.ff.architecture import Architecture
from ffdist.ff.keyed import generator
from ffdist.ff.layers import Layer
from ffdist.ff.optimizers import Learner
from ffdist.ff.readout import Readout
from ffdist.pipeline.runner import configure_torch
from ffdist.pipeline.schedule import Train
from ffdist.pipeline.source import NegativePlan, Source

SCHEDULES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}
"""Names of torch's schedules, by the name in figures."""
MICROBATCHES_PER_STAGE = 2
"""Number of microbatches of a minibatch, per stage, if the size of the minibatch is divisible by it."""


class PipelinePlan(NamedTuple):
    """Describes a pipeline with one process per stage."""

    architecture: Architecture
    """That of the baseline: `readout_update` and the layers' own updates are those of `ffdist baseline`."""
    order: SampleOrder
    stage_layers: list[range]
    """Layers of each stage, counted from 0."""
    threads: int
    """torch's threads in each process."""

    @property
    def num_microbatches(self) -> int:
        """Number of microbatches of a minibatch: the divisor that is nearest to MICROBATCHES_PER_STAGE per stage."""
        size, stages = self.order.batch_size, len(self.stage_layers)
        divisors = (count for count in range(stages, size + 1) if size % count == 0)
        return min(divisors, key=lambda count: (abs(count - MICROBATCHES_PER_STAGE * stages), -count))


class BackpropagationStage(nn.Module):
    """Consecutive layers, and the readout's weights for them.

    The readout is linear, so each stage adds its part of the logits, and sends no activations for the readout alone.
    Every microbatch has a batch of its own for batch norm.

    Args:
        plan: Describes the pipeline.
        index: Number of the stage, counted from 0.
    """

    def __init__(self, plan: PipelinePlan, index: int) -> None:
        super().__init__()
        architecture, layers = plan.architecture, plan.stage_layers[index]
        first = architecture.predict_from - 1
        forms = architecture.read_forms[max(0, layers.start - first) : max(0, layers.stop - first)]
        self.layers = nn.ModuleDict({str(layer): architecture.layer(layer) for layer in layers})
        self.readout = Readout(
            sum(form.size for _, form in forms), architecture.classes, update=architecture.readout_update, forms=forms
        )
        self._is_last, self._first_read, self._num_read = layers.stop == len(architecture.layers), first, len(forms)
        self._seed, self._num_forwards = plan.order.seed, 0

    def forward(self, rows: Tensor, logits: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Returns the output for a microbatch.

        Args:
            rows: Input rows or activations of the previous stage `[B, D]`.
            logits: Sum of the logits of earlier stages `[B, C]`, if one of them has layers that the readout reads.

        Returns:
            Of the last stage, the logits; of the others, the activations `[B, H]`, and the sum if there is one.
        """
        read, self._num_forwards = [], self._num_forwards + 1
        for name, layer in self.layers.items():
            assert isinstance(layer, Layer)
            layer.refresh()  # for each microbatch, because each has a graph of its own
            source = generator(self._seed, "noise", int(name), self._num_forwards)
            rows = layer.forward_for_training(rows, layer.draw(len(rows), source) if layer.draws else None).activations
            read += [rows] if int(name) >= self._first_read else []
        if read:
            bias = self.readout.bias if self._is_last else None
            part = F.linear(self.readout.rows(read), self.readout.weight, bias)
            logits = part if logits is None else logits + part
        if self._is_last:
            assert logits is not None, "the readout reads the last layer"
            return logits
        return rows if logits is None else (rows, logits)

    @torch.no_grad()
    def update(self) -> None:
        """Makes an update from the gradients of all microbatches, which point upwards, and clears them."""
        for learner in (*self.layers.values(), self.readout):
            assert isinstance(learner, Learner)
            gradients = {name: each.grad for name, each in learner.named_parameters() if each.grad is not None}
            learner.ascend(gradients, lr_scale=1.0)
        self.zero_grad()


def minus_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns minus the cross-entropy in nats, because optimizers ascend."""
    return -F.cross_entropy(logits, labels)


class Worker:
    """Trains a stage in a process of its own. All processes get the same requests.

    Args:
        plan: Describes the pipeline.
        index: Number of the stage, counted from 0.
        store: File by which the processes find each other.
        samples: Samples of each split `[N, D]`.
        labels: Labels of the training set `[N]`.
    """

    def __init__(self, plan: PipelinePlan, index: int, store: str, samples: dict[str, Tensor], labels: Tensor) -> None:
        from torch.distributed import pipelining  # imported here because it takes a second

        configure_torch(plan.threads)
        num_stages, architecture, order = len(plan.stage_layers), plan.architecture, plan.order
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # otherwise other machines could connect
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=num_stages)
        self._stage = BackpropagationStage(plan, index)
        self._schedules = {
            name: getattr(pipelining, schedule)(
                pipelining.PipelineStage(self._stage, index, num_stages, torch.device("cpu")),
                plan.num_microbatches,
                minus_loss,
            )
            for name, schedule in SCHEDULES.items()
        }
        self._source = None if index else Source(architecture, order, "cpu", NegativePlan.none(), samples, labels)
        self._labels = labels if index == num_stages - 1 else None
        self._order, self._num_steps, self._losses = order, 0, list[Tensor]()

    def __call__(self, message: tuple[str, float]) -> tuple[float, float | None]:
        """Trains for some time.

        Args:
            message: Schedule and seconds.

        Returns:
            Samples per second; and, of the last stage, the loss of the last minibatch in nats.
        """
        name, seconds = message
        self._train(name, 1)  # the first minibatch determines shapes and allocates buffers
        num_steps = torch.tensor(max(1, round(seconds / self._train(name, 1))))
        dist.broadcast(num_steps, 0)
        elapsed_s = self._train(name, int(num_steps))
        loss = -torch.stack(self._losses).mean().item() if self._losses else None
        return int(num_steps) * self._order.batch_size / elapsed_s, loss

    def _train(self, name: str, num_steps: int) -> float:
        """Trains on minibatches; returns the time in seconds until all processes are done."""
        dist.barrier()
        start = time.perf_counter()
        for _ in range(num_steps):
            epoch, first = divmod(self._num_steps, self._order.num_minibatches)
            rows, target = list[Tensor](), None
            if self._source:
                rows = [self._source.read(Train(epoch, first, 1, self._num_steps, 1.0))[0]]
            if self._labels is not None:
                target = self._labels[self._order.indices(epoch, first, 1)[0]]
            self._losses.clear()
            self._stage.requires_grad_()
            self._schedules[name].step(*rows, target=target, losses=self._losses, return_outputs=False)
            self._stage.update()
            self._num_steps += 1
        dist.barrier()
        return time.perf_counter() - start


@contextmanager
def start_backpropagation(
    plan: PipelinePlan, samples: dict[str, Tensor], labels: Tensor
) -> Iterator[Callable[[str, float], tuple[float, float]]]:
    """Starts the processes of a pipeline for the duration of a `with` block.

    They communicate by gloo over the loopback interface, and find each other by a file in a folder of this user only.

    Args:
        plan: Describes the pipeline.
        samples: Samples of each split `[N, D]`.
        labels: Labels of the training set `[N]`.

    Yields:
        A function of a schedule and seconds. It trains, and returns samples per second and the loss of the last
        minibatch in nats.
    """
    with TemporaryDirectory() as folder:
        store = f"{folder}/store"
        arguments: list[tuple[Any, ...]] = [
            (plan, index, store, {} if index else samples, labels) for index in range(len(plan.stage_layers))
        ]
        with start_processes(Worker, arguments) as connections:

            def measure(name: str, seconds: float) -> tuple[float, float]:
                replies = request(connections, (name, seconds))
                return replies[0][0], replies[-1][1]

            yield measure
