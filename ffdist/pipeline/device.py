"""How the minibatches of a chunk pass through a part: one by one on processors, while the next ones come on a GPU."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_WAYS = 4
"""Graphs kept: learning rates change from epoch to epoch, and something is measured now and then."""


class Way(NamedTuple):
    """How a minibatch is trained on: what a graph has fixed once it is captured."""

    gain: float
    """The schedule's factor on the learning rates."""
    layer: int | None = None
    """The only layer that learns; None for all."""
    measure: bool = False
    """Whether MEASURED is."""


Step = Callable[[Sequence[Tensor], Way], Sequence[Tensor]]
"""Trains on the parts of a minibatch, where the weights live, and returns tensors there."""
Take = Callable[[Step, Sequence[Tensor], Sequence[Way]], list[Tensor]]
"""Takes the steps of a chunk, as `one_by_one` does. The step is an argument of the call: if it were kept here, stages
and what takes their steps would be reference cycles, and GPU memory would wait for the garbage collector."""
Captured = tuple[torch.cuda.CUDAGraph, Sequence[Tensor], Sequence[Tensor]]
"""A graph, the parts that it reads, and what it makes of them."""


def taking(device: str, *, made_there: bool = False) -> Take:
    """Returns how steps are best taken on a device; arguments are those of `Overlapped`."""
    return one_by_one if device == "cpu" else Overlapped(device, made_there=made_there)


def one_by_one(step: Step, parts: Sequence[Tensor], ways: Sequence[Way]) -> list[Tensor]:
    """Takes steps on processors.

    Args:
        step: To take.
        parts: What minibatches consist of, of all of them `[K, ...]` each.
        ways: How each of them is trained on.

    Returns:
        Each thing that a step makes, of all minibatches `[K, ...]`, in main memory.
    """
    made = [step(minibatch, way) for *minibatch, way in zip(*parts, ways, strict=True)]
    return [torch.stack(each) for each in zip(*made, strict=True)]


class Graphs:
    """Takes steps as CUDA graphs: one launch, whatever the number of kernels in it. Elsewhere, takes them directly.

    The first step of each way is taken directly, which warms up what must not be initialized during a capture.
    """

    def __init__(self) -> None:
        self._captured: dict[Way, Captured | None] = {}

    def __call__(self, step: Step, parts: Sequence[Tensor], way: Way) -> Sequence[Tensor]:
        """Takes a step, which must be the same at every call and must not wait for the device.

        Returns:
            What it makes, which the next one may overwrite.
        """
        if parts[0].device.type != "cuda":
            return step(parts, way)
        if way not in self._captured:
            if len(self._captured) == MOST_WAYS:
                torch.cuda.synchronize()
                self._captured.clear()  # of past epochs, with the memory that they hold
            self._captured[way] = None
            return step(parts, way)
        graph, places, made = self._captured[way] or self._capture(step, parts, way)
        for place, part in zip(places, parts, strict=True):
            place.copy_(part)
        graph.replay()
        return made

    def _capture(self, step: Step, parts: Sequence[Tensor], way: Way) -> Captured:
        graph, places, collects = torch.cuda.CUDAGraph(), [part.clone() for part in parts], gc.isenabled()
        gc.disable()  # garbage may hold other graphs, and to free one would spoil the capture
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # whatever else this process does there
                captured = self._captured[way] = graph, places, step(places, way)
        finally:
            if collects:
                gc.enable()
        return captured


class Overlapped:
    """Takes steps on a GPU, while what the next ones read is copied there on a stream of its own.

    Args:
        device: Where, as torch names it.
        made_there: Whether parts are on the device already, where they were made, or come from main memory.
    """

    def __init__(self, device: str, *, made_there: bool) -> None:
        self._device, self._made_there, self._is_cuda = device, made_there, device.startswith("cuda")
        self._of_device = torch.get_device_module(device)
        self._coming, self._steps = self._of_device.Stream(), Graphs()

    def __call__(self, step: Step, parts: Sequence[Tensor], ways: Sequence[Way]) -> list[Tensor]:
        """Takes and returns what `one_by_one` does."""
        places = list[Tensor]()
        coming = zip(*parts, strict=True) if self._made_there else self._arriving(parts)
        for number, (minibatch, way) in enumerate(zip(coming, ways, strict=True)):
            made = self._steps(step, minibatch, way)
            places = places or [each.new_empty((len(ways), *each.shape)) for each in made]
            for place, each in zip(places, made, strict=True):
                place[number].copy_(each)
        home = [place.to("cpu", non_blocking=True) for place in places]
        self._of_device.synchronize()
        return home

    def _arriving(self, parts: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Yields the parts of each minibatch on the device, in time for what is launched after it."""
        # Buffers last for the chunk: memory that is freed for one stream may still be in use by another.
        staged = [torch.empty(part.shape, dtype=part.dtype, pin_memory=self._is_cuda) for part in parts]
        there = [torch.empty_like(part, device=self._device) for part in parts]
        self._coming.wait_stream(self._of_device.current_stream())
        for number in range(len(parts[0])):
            for stage, part in zip(staged, parts, strict=True):
                stage[number].copy_(part[number])  # to where a GPU can fetch it by itself
            with self._of_device.stream(self._coming):
                for place, stage in zip(there, staged, strict=True):
                    place[number].copy_(stage[number], non_blocking=True)
            self._of_device.current_stream().wait_event(self._coming.record_event())
            yield [place[number] for place in there]
