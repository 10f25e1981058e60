"""The flow of a run through its parts, written once: a runner differs only in how it calls and collects.

negatives -> stage 0 -> stage 1 -> ... -> readout      (what travels: references; what comes home: reports)
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, cycle, repeat
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ffdist.data.order import SampleOrder
from ffdist.ff.network import Architecture
from ffdist.pipeline.partition import layer_costs
from ffdist.pipeline.schedule import EVALUATION_ROWS, Evaluate, Order, Snapshot, Train
from ffdist.pipeline.source import NegativeSource
from ffdist.pipeline.stage import ReadoutStage, Report, Stage, State

FLOAT32_BYTES = 4


class Call(Protocol):
    """Has a part run a method, and returns its result, or as many results as `returns` says, or references to them."""

    def __call__(self, part: Any, method: str, *args: Any, returns: int = 1) -> Any:
        """Calls `part.method(*args)`."""


class Parts(NamedTuple):
    """What a run consists of; plain objects or actors that hold them."""

    negatives: list[Any]
    stages: list[Any]
    readout: Any
    stage_layers: list[range]
    """The layers of each stage, counted from 0."""
    predict_from: int
    """First layer, counted from 1, that the readout reads."""


class Blueprint(NamedTuple):
    """What decides the parts, apart from the data."""

    architecture: Architecture
    order: SampleOrder
    negatives: str
    """Kind of negatives."""
    negative_parts: int
    stage_layers: list[range]
    measure_every: int
    """Minibatches between two measurements of the weights."""
    device: str
    """Where the layers live, as torch names it."""

    def bytes_in_flight(self, chunk_size: int, max_in_flight: int) -> int:
        """Bounds what messages and states take while `max_in_flight` orders are under way; two may be snapshots."""
        architecture, minibatch = self.architecture, 3 * self.order.batch_size
        rows = max(EVALUATION_ROWS, minibatch * min(chunk_size, self.order.minibatches))
        messages = max_in_flight * rows * sum(architecture.units) * architecture.compute_dtype.itemsize
        parameters = sum(layer_costs(architecture.widths))
        return messages + min(2, max_in_flight) * 2 * FLOAT32_BYTES * int(parameters)

    def assemble(self, make: Callable[..., Any], images: Any, labels: Any) -> Parts:
        """Makes all parts: the stages in order, the readout, the negatives.

        Args:
            make: Makes an object of a class from its arguments, or an actor that holds one.
            images: uint8 images of each split, or a reference to them.
            labels: Labels of the training set, or a reference to them.
        """
        architecture, order = self.architecture, self.order
        return Parts(
            stages=[
                make(Stage, architecture, layers, order, self.measure_every, self.device, *data)
                for layers, data in zip(self.stage_layers, chain([(images, labels)], repeat(())), strict=False)
            ],
            readout=make(ReadoutStage, architecture, labels, order),
            negatives=[
                make(NegativeSource, self.negatives, labels, architecture.classes, order)
                for _ in range(self.negative_parts)
            ],
            stage_layers=self.stage_layers,
            predict_from=architecture.predict_from,
        )


class Trained(NamedTuple):
    """Reports of a chunk."""

    stages: list[Report]
    readout: Report


class Evaluated(NamedTuple):
    """Outcome of an evaluation block."""

    goodness: list[Tensor]
    """Of each stage `[layers, n, C]`."""
    predicted: Tensor
    """The readout's labels `[n]`."""


Result = Trained | Evaluated | Callable[[], State]


class Runner:
    """Drives orders through the parts, submitting each part's calls in order.

    Args:
        parts: Whom to call.
        call: How to call.
        collect: Turns a list of what `call` returned into values, waiting where it must.
        max_in_flight: Orders admitted and not yet done. An order is done when everything that comes home of it is
            home; then nothing here refers to it any more.
    """

    def __init__(
        self, parts: Parts, *, call: Call, collect: Callable[[list[Any]], list[Any]], max_in_flight: int = 1
    ) -> None:
        self._parts, self._call, self._collect, self._max_in_flight = parts, call, collect, max_in_flight
        self._makers = cycle(parts.negatives)

    def run(self, orders: Iterable[Order]) -> Iterator[tuple[Order, Result]]:
        """Submits orders as the window admits them and yields each with its result, in order.

        A snapshot's result is a function that fetches the state, so that a state nobody wants never travels.
        """
        in_flight: deque[tuple[Order, list[Any]]] = deque()
        for order in orders:
            if len(in_flight) == self._max_in_flight:
                yield self._finish(*in_flight.popleft())
            in_flight.append((order, self._submit(order)))
        while in_flight:
            yield self._finish(*in_flight.popleft())

    def _submit(self, order: Order) -> list[Any]:
        if isinstance(order, Snapshot):
            return [self._call(part, "state") for part in (*self._parts.stages, self._parts.readout)]
        message: tuple[Any, ...] = ()
        if isinstance(order, Train):
            message = (self._call(next(self._makers), "make", order),)
        method = "train" if isinstance(order, Train) else "evaluate"
        home, neutral = [], []
        for stage, layers in zip(self._parts.stages, self._parts.stage_layers, strict=True):
            report, signal, *passed = self._call(stage, method, order, *message, returns=2 + len(layers))
            home.append(report)
            neutral += passed
            message = (signal, passed[-1])
        read = neutral[self._parts.predict_from - 1 :]
        return [*home, self._call(self._parts.readout, method, *([order] if method == "train" else []), *read)]

    def _finish(self, order: Order, home: list[Any]) -> tuple[Order, Result]:
        if isinstance(order, Snapshot):
            return order, lambda: {name: state for part in self._collect(home) for name, state in part.items()}
        *stages, readout = self._collect(home)
        return order, Evaluated(stages, readout) if isinstance(order, Evaluate) else Trained(stages, readout)


def call_directly(part: Any, method: str, *args: Any, returns: int = 1) -> Any:
    """Calls a plain object in this process."""
    return getattr(part, method)(*args)


@contextmanager
def serial_runner(blueprint: Blueprint, images: dict[str, Tensor], labels: Tensor, *, threads: int) -> Iterator[Runner]:
    """Opens the runner that is the truth: one process, one order at a time.

    Args:
        blueprint: What to make.
        images: uint8 images of each split `[N, D]`.
        labels: Labels of the training set `[N]`.
        threads: torch's threads while the `with` block lasts.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = blueprint.assemble(lambda part, *args: part(*args), images, labels)
        yield Runner(parts, call=call_directly, collect=list)
    finally:
        torch.set_num_threads(before)
