"""The data flow of a run. It is the same for all runners, which differ in how they call methods and collect results.

negatives -> stage 0 -> stage 1 -> ... -> readout      (actors pass references on; reports return to the driver)
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

from ffdist.ff.architecture import layer_name, readout_name
from ffdist.pipeline.blueprint import Actors, Blueprint
from ffdist.pipeline.hardware import Hardware, hardware_of_actors, read_hardware
from ffdist.pipeline.schedule import Command, Evaluate, Snapshot, Train
from ffdist.pipeline.stage import Report, State

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Parameters of glibc's mallopt: when memory is given back, how much is requested at once, and use of mmap."""
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
RELEASE = {M_MMAP_MAX: 2**16, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26, M_TOP_PAD: 2**17}
"""glibc's own values; it raises the two thresholds to these as a process frees large blocks."""


class Call(Protocol):
    """Calls a method of an actor and returns its result, or `returns` results, or references to them."""

    def __call__(self, actor: Any, method: str, *args: Any, returns: int = 1) -> Any:
        """Calls `actor.method(*args)`."""


class Collect(Protocol):
    """Turns what calls returned into results."""

    def __call__(self, returned: list[Any], wait: bool = True, upstream: Sequence[Any] = ()) -> Any:
        """Returns the results in order; None if `wait` is false and one of them has not arrived.

        `upstream` holds the references that these may depend on, so that a stuck actor can be named.
        """


class Trained(NamedTuple):
    """A chunk that was trained on."""

    chunk: Train
    stages: list[Report]
    readout: Report | None
    """None without a readout."""

    @property
    def readout_metrics(self) -> Tensor:
        """Loss and error of the readout `[K, 2]`; `[K, 0]` without one."""
        return self.readout.metrics if self.readout else torch.empty(self.chunk.num_minibatches, 0)


class Evaluated(NamedTuple):
    """A block that was evaluated."""

    block: Evaluate
    goodness: list[Tensor]
    """Of each stage `[layers, n, C]`."""
    predicted: Tensor | None
    """Labels predicted by the readout `[n]`; None without one."""


class SnapshotTaken(NamedTuple):
    """A snapshot whose state was taken and is being written."""

    snapshot: Snapshot
    written: Callable[[bool], Any]
    """Returns what the writer returned, or None while it is not done; the argument says whether to wait for it."""


Event = Trained | Evaluated | SnapshotTaken
"""The result of a command."""


class Pipeline(Protocol):
    """Trains a network: a runner, or backpropagation as a baseline."""

    blueprint: Blueprint
    hardware: dict[str, Hardware]
    """Of each layer, the readout and the negative actors."""

    def restore(self, state: State) -> None:
        """Restores the state of a snapshot; the number of stages may differ."""

    def run(self, commands: Iterable[Command], upcoming: Iterable[Command]) -> Iterator[Event]:
        """Yields the result of each command, as `Runner.run` does."""


class Runner:
    """Submits commands to the actors and yields their results, in order.

    Args:
        blueprint: Describes the actors. Its `max_in_flight` is the largest number of commands that are submitted and
            not yet done. A command is done when all its results have arrived at the driver.
        actors: Ray actors, or plain objects of the same classes.
        call: Calls a method and returns its result, or a reference to it.
        collect: Turns references into results; without waiting, None if one of them has not arrived.
        hardware: Of each layer, the readout and the negative actors, as `hardware_of_actors` returns it.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        actors: Actors,
        *,
        call: Call,
        collect: Collect,
        hardware: dict[str, Hardware] | None = None,
    ) -> None:
        self.blueprint, self._actors, self._call, self._collect = blueprint, actors, call, collect
        self.hardware = hardware or {}
        self._makers, self._readouts = cycle(actors.negatives), [actors.readout] if actors.readout else []
        self._shards: dict[tuple[int, int], Any] = {}  # by epoch and number; requested and not used yet
        self._drawn: deque[tuple[int, Any]] = deque()  # by first minibatch; not delivered yet
        self._in_flight: deque[tuple[Command, list[Any]]] = deque()

    def restore(self, state: State) -> None:
        """Restores the state of a snapshot; the number of stages may differ."""
        own_state = {name: state[name] for name in ("readout",) if name in state}
        results = [self._call(actor, "restore", own_state) for actor in self._readouts]
        for stage, layers in zip(self._actors.stages, self.blueprint.stage_layers, strict=True):
            names = [name(index) for name in (layer_name, readout_name) for index in layers]
            names += ["negatives"] * (0 in layers)
            results.append(self._call(stage, "restore", {name: state[name] for name in names if name in state}))
        self._collect(results)

    def run(self, commands: Iterable[Command], upcoming: Iterable[Command]) -> Iterator[Event]:
        """Submits commands as the window admits them, and yields the result of each, in order.

        A snapshot is yielded when all results before it have arrived; it is written while the following commands run.
        The next snapshot is submitted after that, so a caller that waits until one is written before it takes another
        has at most two unwritten. A caller may leave the results of the last commands, which are executed all the same.

        Args:
            commands: The next one is requested when it can be submitted, and not before.
            upcoming: The schedule from the same position on; negatives of its chunks are requested in advance.
        """
        chunks = (command for command in upcoming if isinstance(command, Train))
        num_chunks = 1 + self.blueprint.negatives.prefetch_chunks
        in_flight = self._in_flight
        in_flight.clear()  # a caller has left the results of an earlier call
        for command in commands:
            if isinstance(command, Train):
                self._request_negatives(islice(chunks, num_chunks))
                num_chunks = 1
            elif isinstance(command, Snapshot):
                while any(isinstance(before, Snapshot) for before, _ in in_flight):
                    yield self._finish(*in_flight.popleft())
            in_flight.append((command, self._submit(command)))
            if len(in_flight) == self.blueprint.max_in_flight:
                yield self._finish(*in_flight.popleft())
        while in_flight:
            yield self._finish(*in_flight.popleft())

    def _request_negatives(self, chunks: Iterable[Train]) -> None:
        for chunk in chunks if self._actors.negatives else ():
            for number in self.blueprint.order.shards(chunk.first, chunk.num_minibatches):
                if (chunk.epoch, number) not in self._shards:
                    self._shards[chunk.epoch, number] = self._call(next(self._makers), "make", chunk.epoch, number)

    def _inputs(self, chunk: Train) -> list[Any]:
        """Returns the inputs of the first stage: negatives, if any, and drawn labels that have reached the delay."""
        if not self._actors.negatives:
            return []
        needed = [(chunk.epoch, number) for number in self.blueprint.order.shards(chunk.first, chunk.num_minibatches)]
        for past in [key for key in self._shards if key < needed[0]]:
            del self._shards[past]
        inputs = [self._shards[key] for key in needed]
        if delay := self.blueprint.negatives.prediction_delay:
            while self._drawn and self._drawn[0][0] < chunk.step + chunk.num_minibatches - delay:
                inputs.append(self._drawn.popleft()[1])
        return inputs

    def _submit(self, command: Command) -> list[Any]:
        """Submits the calls of a command and returns what its results are collected from."""
        if isinstance(command, Snapshot):
            states = [self._call(actor, "state") for actor in (*self._actors.stages, *self._readouts)]
            return [self._call(self._actors.writer, "write", command, *states, *(drawn for _, drawn in self._drawn))]
        message = self._inputs(command) if isinstance(command, Train) else []
        method = "train" if isinstance(command, Train) else "evaluate"
        results, read, architecture = [], [], self.blueprint.architecture
        for stage, layers in zip(self._actors.stages, self.blueprint.stage_layers, strict=True):
            report, signal, *passed = self._call(stage, method, command, *message, returns=2 + len(layers))
            results.append(report)
            read += passed
            message = [signal, passed[-1]] if architecture.readout_kind == "joint" else [signal]
        read = read[architecture.read_layers.start : architecture.read_layers.stop]
        if not self._readouts:
            return results
        if isinstance(command, Evaluate):
            return [*results, self._call(self._actors.readout, method, *read)]
        report, drawn = self._call(self._actors.readout, method, command, *read, returns=2)
        if self.blueprint.negatives.prediction_delay:
            self._drawn.append((command.step, drawn))
        return [*results, report]

    def _finish(self, command: Command, results: list[Any]) -> Event:
        """Waits for the results of a command."""
        if isinstance(command, Snapshot):

            def written(wait: bool) -> Any:
                later = [result for _, results in self._in_flight for result in results]
                return (self._collect(results, wait, [*self._shards.values(), *later]) or [None])[0]

            return SnapshotTaken(command, written)
        # Negative actors depend on no other actor, so the others wait for what they have not returned.
        collected = self._collect(results, True, list(self._shards.values()))
        stages, (readout,) = collected[: len(self._actors.stages)], collected[len(self._actors.stages) :] or [None]
        if isinstance(command, Evaluate):
            return Evaluated(command, stages, readout)
        return Trained(command, stages, readout)


def call_directly(actor: Any, method: str, *args: Any, returns: int = 1) -> Any:
    """Calls a plain object in this process."""
    return getattr(actor, method)(*args)


def collect_directly(returned: list[Any], wait: bool = True, upstream: Sequence[Any] = ()) -> list[Any]:
    """Returns the results of direct calls."""
    return returned


def serial_runner(blueprint: Blueprint, samples: dict[str, Tensor], labels: Tensor, writer: Any) -> Runner:
    """Returns the reference runner: one process, one command at a time.

    Args:
        blueprint: Describes the actors.
        samples: Samples of each split `[N, D]`.
        labels: Labels of the training set `[N]`.
        writer: Has `write(snapshot, *states)`.
    """
    blueprint = blueprint._replace(max_in_flight=1, negatives=replace(blueprint.negatives, prefetch_chunks=0))
    actors = blueprint.assemble(lambda cls, *args: cls(*args), samples, labels, writer)
    device, cpu = read_hardware(blueprint.device), read_hardware("cpu")
    hardware = hardware_of_actors(
        blueprint.stage_layers,
        [device] * len(actors.stages),
        device if actors.readout else None,
        [cpu] * len(actors.negatives),
    )
    return Runner(blueprint, actors, call=call_directly, collect=collect_directly, hardware=hardware)


def keep_memory() -> None:
    """Makes this process keep the memory that it frees, because getting it from the kernel again is slow.

    Does nothing if the C library is not glibc.
    """
    _set_malloc(KEEP)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keeps memory as `keep_memory` does for the duration of a `with` block, and then gives it back."""
    keep_memory()
    try:
        yield
    finally:
        _set_malloc(RELEASE)


def _set_malloc(parameters: dict[int, int]) -> None:
    """Sets parameters of glibc's malloc, and then gives back all memory beyond them."""
    with suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        for parameter, value in parameters.items():
            glibc.mallopt(parameter, value)
        glibc.malloc_trim(0)


def configure_torch(threads: int) -> None:
    """Sets the options of torch that determine the order of sums in this process."""
    torch.set_num_threads(threads)
    # Sums of bfloat16 products stay float32 if a product is split.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Convolutions on GPUs: sums in a fixed order, and float32 products.
    cudnn = torch.backends.cudnn
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Configures torch as `configure_torch` does, for the duration of a `with` block."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_num_threads(), matmul.allow_bf16_reduced_precision_reduction
    cudnn_before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    configure_torch(count)
    try:
        yield
    finally:
        threads, matmul.allow_bf16_reduced_precision_reduction = before
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = cudnn_before
        torch.set_num_threads(threads)
