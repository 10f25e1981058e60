"""How the minibatches of a chunk pass through a stage: one by one on processors, overlapping with copies on a GPU.

What is for CUDA alone, graphs and their replay, has not been run yet; the rest of `Overlapped` is tested on processors.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_WAYS = 4
"""Graphs kept: learning rates change from epoch to epoch, and something is measured now and then."""


class Way(NamedTuple):
    """How a minibatch is trained on: what a graph has fixed once it is captured."""

    gain: float
    """The schedule's factor on the learning rates."""
    layer: int | None
    """The only layer that learns; None for all."""
    measure: bool
    """Whether MEASURED is."""


Step = Callable[[Tensor, Way], Sequence[Tensor]]
"""Trains on the rows of a minibatch, where the layers live, and returns tensors there."""
Minibatch = tuple[Sequence[Tensor], Way]
"""The parts of its rows, in main memory; and how it is trained on."""


def one_by_one(step: Step, minibatches: Sequence[Minibatch]) -> list[Tensor]:
    """Takes steps on processors.

    Returns:
        Each thing that a step makes, of all minibatches `[K, ...]`.
    """
    made = [step(torch.cat(list(parts)), way) for parts, way in minibatches]
    return [torch.stack(each) for each in zip(*made, strict=True)]


class Graphs:
    """Takes steps as CUDA graphs: one launch, whatever the number of kernels in it. Elsewhere, takes them directly.

    The first step of each way is taken directly, which warms up what must not be initialized during a capture.

    Args:
        step: To take; it must not wait for the device.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._captured: dict[Way, tuple[torch.cuda.CUDAGraph, Tensor, Sequence[Tensor]] | None] = {}

    def __call__(self, rows: Tensor, way: Way) -> Sequence[Tensor]:
        """Returns what the step makes, which the next one may overwrite."""
        if rows.device.type != "cuda":
            return self._step(rows, way)
        if way not in self._captured:
            if len(self._captured) == MOST_WAYS:
                torch.cuda.synchronize()
                self._captured.clear()  # of past epochs, with the memory that they hold
            self._captured[way] = None
            return self._step(rows, way)
        captured = self._captured[way]
        if captured is None:
            graph, place = torch.cuda.CUDAGraph(), rows.clone()
            with torch.cuda.graph(graph):
                made = self._step(place, way)
            captured = self._captured[way] = graph, place, made
        graph, place, made = captured
        place.copy_(rows)
        graph.replay()
        return made


class Overlapped:
    """Takes steps while the rows of the next minibatch come, and what the last one made goes, on streams of their own.

    Args:
        step: To take.
        device: Where, as torch names it.
    """

    def __init__(self, step: Step, device: str) -> None:
        self._device, self._is_cuda = device, device.startswith("cuda")
        self._of_device = torch.get_device_module(device)
        self._coming, self._going = self._of_device.Stream(), self._of_device.Stream()
        self._steps = Graphs(step)
        if self._is_cuda:  # sums of bfloat16 products are float32, also where a product is split
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def __call__(self, minibatches: Sequence[Minibatch]) -> list[Tensor]:
        """Returns each thing that a step makes, of all minibatches `[K, ...]`, in main memory."""
        computing, on = self._of_device.current_stream(), self._of_device.stream
        # Buffers last for the chunk: memory that is freed for one stream may still be in use by another.
        staged, arriving = self._buffers(torch.cat(list(minibatches[0][0])), len(minibatches))
        passing: list[tuple[Tensor, Tensor]] = []
        for number, (parts, way) in enumerate(minibatches):
            torch.cat(list(parts), out=staged[number])
            with on(self._coming):
                arriving[number].copy_(staged[number], non_blocking=True)
            computing.wait_event(self._coming.record_event())
            made = self._steps(arriving[number], way)
            passing = passing or [self._buffers(each, len(minibatches)) for each in made]
            for each, (_, leaving) in zip(made, passing, strict=True):
                leaving[number].copy_(each)
            self._going.wait_event(computing.record_event())
            with on(self._going):
                for home, leaving in passing:
                    home[number].copy_(leaving[number], non_blocking=True)
        self._of_device.synchronize()
        return [home for home, _ in passing]

    def _buffers(self, one: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Returns room for so many tensors like one: in main memory, from which a GPU can copy by itself, and there."""
        shape = (number, *one.shape)
        here = torch.empty(shape, dtype=one.dtype, pin_memory=self._is_cuda)
        return here, torch.empty(shape, dtype=one.dtype, device=self._device)
