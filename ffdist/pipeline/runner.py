"""The flow of a run through its parts, written once: a runner differs only in how it calls and collects.

negatives -> stage 0 -> stage 1 -> ... -> readout      (what travels: references; what comes home: reports)
                ^------- labels drawn earlier ---|       (hard labels only)
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ffdist.pipeline.blueprint import Blueprint, Parts
from ffdist.pipeline.hardware import Hardware, hardware_of_parts, read_hardware
from ffdist.pipeline.schedule import Evaluate, Order, Snapshot, Train
from ffdist.pipeline.stage import Report, State, layer_name

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Of glibc's malloc.h: never give memory back, take a lot at once, take all of it from one heap."""


class Call(Protocol):
    """Has a part run a method, and returns its result, or as many results as `returns` says, or references to them."""

    def __call__(self, part: Any, method: str, *args: Any, returns: int = 1) -> Any:
        """Calls `part.method(*args)`."""


class Collect(Protocol):
    """Turns what calls returned into results."""

    def __call__(self, returned: list[Any], wait: bool = True, upstream: Sequence[Any] = ()) -> Any:
        """Returns the results in order; without waiting, None where one of them is not there yet.

        `upstream` has what other calls returned that these may depend on, so that a stuck actor can be named.
        """


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


Result = Trained | Evaluated | Callable[[bool], Any]
"""A snapshot's is what its writer returned, as a function of whether to wait for it; None where it is not done."""


class Runner:
    """Drives orders through the parts, submitting each part's calls in order.

    Args:
        blueprint: What the parts are. Its `max_in_flight` bounds the orders that are submitted and not yet done; one
            is done when all that comes home of it is home, and then nothing here refers to it any more.
        parts: Plain objects, or actors that hold them.
        call: Has a part run a method; returns what it returned, or references to that.
        collect: Turns references into what they stand for; without waiting, None where that is not there yet.
        hardware: Of each layer, the readout and the negative actors, as `hardware_of_parts` returns it.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        parts: Parts,
        *,
        call: Call,
        collect: Collect,
        hardware: dict[str, Hardware] | None = None,
    ) -> None:
        self.blueprint, self._parts, self._call, self._collect = blueprint, parts, call, collect
        self.hardware = hardware or {}
        self._makers = cycle(parts.negatives)
        self._shards: dict[tuple[int, int], Any] = {}  # by epoch and number, asked for and still to be used
        self._drawn: deque[tuple[int, Any]] = deque()  # by first minibatch, still to be delivered
        self._in_flight: deque[tuple[Order, list[Any]]] = deque()

    def restore(self, state: State) -> None:
        """Has every part take up where a snapshot was taken, with however many stages."""
        home = [self._call(self._parts.readout, "restore", {"readout": state["readout"]})]
        for stage, layers in zip(self._parts.stages, self.blueprint.stage_layers, strict=True):
            names = [layer_name(index) for index in layers] + ["negatives"] * (0 in layers)
            home.append(self._call(stage, "restore", {name: state[name] for name in names if name in state}))
        self._collect(home)

    def run(self, orders: Iterable[Order], coming: Iterable[Order]) -> Iterator[tuple[Order, Result]]:
        """Submits orders as the window admits them and yields each with its result, in order.

        A snapshot is yielded when all before it is home; writing it may go on for a while beside what follows. The
        next one is submitted after that, so a caller that waits for one to be written before it takes another has at
        most two unwritten.

        Args:
            orders: What to do. An order is asked for when it can be submitted, and not before.
            coming: The schedule from the same place on, whose chunks' negatives are asked for ahead of need.
        """
        chunks = (order for order in coming if isinstance(order, Train))
        ahead = 1 + self.blueprint.negatives.ahead
        in_flight = self._in_flight
        for order in orders:
            if isinstance(order, Train):
                self._ask_for_negatives(islice(chunks, ahead))
                ahead = 1
            elif isinstance(order, Snapshot):
                while any(isinstance(before, Snapshot) for before, _ in in_flight):
                    yield self._finish(*in_flight.popleft())
            in_flight.append((order, self._submit(order)))
            if len(in_flight) == self.blueprint.max_in_flight:
                yield self._finish(*in_flight.popleft())
        while in_flight:
            yield self._finish(*in_flight.popleft())

    def _ask_for_negatives(self, chunks: Iterable[Train]) -> None:
        for chunk in chunks:
            for number in self.blueprint.order.shards(chunk.first, chunk.num_minibatches):
                if (chunk.epoch, number) not in self._shards:
                    self._shards[chunk.epoch, number] = self._call(next(self._makers), "make", chunk.epoch, number)

    def _arriving(self, chunk: Train) -> list[Any]:
        """Returns what the first stage needs of a chunk: its shards, and labels that became old enough for it."""
        needed = [(chunk.epoch, number) for number in self.blueprint.order.shards(chunk.first, chunk.num_minibatches)]
        for past in [key for key in self._shards if key < needed[0]]:
            del self._shards[past]
        arriving = [self._shards[key] for key in needed]
        if delay := self.blueprint.negatives.prediction_delay:
            while self._drawn and self._drawn[0][0] < chunk.step + chunk.num_minibatches - delay:
                arriving.append(self._drawn.popleft()[1])
        return arriving

    def _submit(self, order: Order) -> list[Any]:
        if isinstance(order, Snapshot):
            states = [self._call(part, "state") for part in (*self._parts.stages, self._parts.readout)]
            return [self._call(self._parts.writer, "write", order, *states, *(drawn for _, drawn in self._drawn))]
        message = self._arriving(order) if isinstance(order, Train) else []
        method = "train" if isinstance(order, Train) else "evaluate"
        home, read = [], []
        for stage, layers in zip(self._parts.stages, self.blueprint.stage_layers, strict=True):
            report, signal, *passed = self._call(stage, method, order, *message, returns=2 + len(layers))
            home.append(report)
            read += passed
            message = [signal, passed[-1]]
        read = read[self.blueprint.architecture.predict_from - 1 :]
        if isinstance(order, Evaluate):
            return [*home, self._call(self._parts.readout, method, *read)]
        report, drawn = self._call(self._parts.readout, method, order, *read, returns=2)
        if self.blueprint.negatives.prediction_delay:
            self._drawn.append((order.step, drawn))
        return [*home, report]

    def _finish(self, order: Order, home: list[Any]) -> tuple[Order, Result]:
        if isinstance(order, Snapshot):

            def written(wait: bool) -> Any:
                reports = [report for _, later in self._in_flight for report in later]
                return (self._collect(home, wait, [*self._shards.values(), *reports]) or [None])[0]

            return order, written
        # Negative actors depend on no other actor: what they have not returned is what the others wait for.
        *stages, readout = self._collect(home, True, list(self._shards.values()))
        return order, Evaluated(stages, readout) if isinstance(order, Evaluate) else Trained(stages, readout)


def call_directly(part: Any, method: str, *args: Any, returns: int = 1) -> Any:
    """Calls a plain object in this process."""
    return getattr(part, method)(*args)


def collect_directly(returned: list[Any], wait: bool = True, upstream: Sequence[Any] = ()) -> list[Any]:
    """Returns what direct calls returned, which is all there."""
    return returned


def serial_runner(blueprint: Blueprint, images: dict[str, Tensor], labels: Tensor, writer: Any) -> Runner:
    """Makes the runner that is the truth: one process, one order at a time.

    Args:
        blueprint: What to make.
        images: uint8 images of each split `[N, D]`.
        labels: Labels of the training set `[N]`.
        writer: Has `write(snapshot, *states)`.
    """
    blueprint = blueprint._replace(max_in_flight=1, negatives=replace(blueprint.negatives, ahead=0))
    parts = blueprint.assemble(lambda part, *args: part(*args), images, labels, writer)
    own, makers = read_hardware(blueprint.device), [read_hardware("cpu")] * len(parts.negatives)
    hardware = hardware_of_parts(blueprint.stage_layers, [own] * len(parts.stages), own, makers)
    return Runner(blueprint, parts, call=call_directly, collect=collect_directly, hardware=hardware)


def keep_memory() -> None:
    """Has this process keep memory that it frees: asking the kernel for it again, page by page, is dear.

    Where the C library is not glibc, nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for what, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(what, value)


def configure_torch(threads: int) -> None:
    """Sets what decides the order of sums in this process, apart from the hardware."""
    torch.set_num_threads(threads)
    # Sums of bfloat16 products are float32, also where a product is split.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Configures torch for the length of a `with` block, as `configure_torch` does."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_num_threads(), matmul.allow_bf16_reduced_precision_reduction
    configure_torch(count)
    try:
        yield
    finally:
        threads, matmul.allow_bf16_reduced_precision_reduction = before
        torch.set_num_threads(threads)
