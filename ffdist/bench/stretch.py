"""Measures training in steady state, in this process or in child processes."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil
from torch import Tensor, multiprocessing

from ffdist import IMPORTED_AT
from ffdist.errors import RunFailed
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.runner import Evaluated, Runner, SnapshotTaken, Trained, keep_memory, serial_runner, torch_threads
from ffdist.pipeline.schedule import Command, Evaluate, Position, Snapshot, Train, schedule

MAX_EPOCHS = 10**6
"""Number of epochs in the schedule; more than any measurement needs."""


class Measurement(NamedTuple):
    """Measurements of an interval of training in steady state."""

    samples_per_s: float
    driver_cpu_fraction: float
    """CPU time of the driver, as a fraction of one core."""
    busy_fraction: float
    """Fraction of the machine's CPU time that was not idle."""
    evaluation_s: float
    """Time from the last chunk before the evaluation to its end; 0 without an evaluation."""
    chunks: list[Trained]
    """Chunks that were completed in the interval."""


class Trainer:
    """Trains on one pipeline, and measures one interval after another.

    Args:
        pipeline: Pipeline to train on.
    """

    def __init__(self, pipeline: Runner | Backpropagation) -> None:
        self.blueprint = pipeline.blueprint
        self._pipeline, self._order, self._epoch = pipeline, pipeline.blueprint.order, 0
        self._num_warmup = pipeline.blueprint.max_in_flight  # chunks before the steady state
        self.start_s = 0.0
        """Time from the import of ffdist to the end of the first chunk."""

    def train(
        self, seconds: float, *, checkpoint: bool = False, evaluation: Sequence[Evaluate] = (), boundary: bool = False
    ) -> Measurement:
        """Trains, and measures at least one chunk.

        Args:
            seconds: Duration of the interval; with an evaluation, the duration after its end.
            checkpoint: Whether a checkpoint is taken at the start of the interval.
            evaluation: Blocks that are evaluated at the start of the interval.
            boundary: Whether an epoch ends soon after the start of the interval.
        """
        deadline, ends, chunks = float("inf"), list[tuple[float, float, float, float, int]](), list[Trained]()
        written, evaluation_s = None, 0.0
        warmup_minibatches = self.blueprint.chunk_size * self._num_warmup
        first_minibatch = max(0, self._order.num_minibatches - 2 * warmup_minibatches) if boundary else 0

        def commands() -> Iterator[Command]:
            is_pending = True
            for chunk in takewhile(lambda _: time.perf_counter() < deadline, self._chunks(first_minibatch)):
                if is_pending and len(ends) >= self._num_warmup:
                    is_pending = False
                    if checkpoint:
                        yield Snapshot(Position(chunk.epoch, chunk.first), chunk.step)
                    yield from evaluation
                yield chunk

        for event in self._pipeline.run(commands(), self._chunks(first_minibatch)):
            now = time.perf_counter()
            match event:
                case Evaluated(block):
                    if block.last:
                        evaluation_s, deadline = now - ends[-1][0], now + seconds
                case Trained(chunk):
                    self.start_s = self.start_s or process_age_s()
                    self._epoch = chunk.epoch + 1
                    chunks.append(event)
                    ends.append((now, time.process_time(), *_cpu_times(), chunk.num_minibatches))
                    if len(ends) == self._num_warmup and not evaluation:
                        deadline = now + seconds
                case SnapshotTaken():
                    written = event.written  # the files are written while training continues
        if written:
            written(True)
        first = self._num_warmup - 1
        last = max(first + 1, sum(end <= deadline for end, *_ in ends) - 1)
        wall_s, driver_s, busy_s, total_s = (ends[last][index] - ends[first][index] for index in range(4))
        minibatches = sum(count for *_, count in ends[first + 1 : last + 1])
        return Measurement(
            samples_per_s=minibatches * self._order.batch_size / wall_s,
            driver_cpu_fraction=driver_s / wall_s,
            busy_fraction=busy_s / total_s if total_s else 0.0,
            evaluation_s=evaluation_s,
            chunks=chunks[first + 1 : last + 1],
        )

    def _chunks(self, first_minibatch: int) -> Iterator[Train]:
        commands = schedule(
            lr_scales=[1.0] * MAX_EPOCHS,
            minibatches=self._order.num_minibatches,
            chunk_size=self.blueprint.chunk_size,
            validation_samples=0,
            test_samples=0,
            validate_every_epochs=MAX_EPOCHS,
            evaluation_block=1,
            start=Position(self._epoch, first_minibatch),
        )
        return (command for command in commands if isinstance(command, Train))


def process_age_s() -> float:
    """Returns the time since this process imported ffdist, which is the first step of every command.

    The start time of the process may be much earlier: a shell that runs a command by `exec` keeps its start time.
    """
    return time.monotonic() - IMPORTED_AT


def _cpu_times() -> tuple[float, float]:
    """Returns the busy time and the total time of all CPUs of the machine, in seconds."""
    times = psutil.cpu_times()
    total_s = sum(times) - times.guest - times.guest_nice  # user and nice include them
    return total_s - times.idle - times.iowait, total_s


@contextmanager
def start_processes(make: Callable[..., Callable[[Any], Any]], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Starts processes for the duration of a `with` block, also if it ends by Ctrl-C.

    Args:
        make: Returns a function that answers requests.
        arguments: Arguments of `make` in each process.

    Yields:
        Connections to the processes, for `request`.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in arguments]
    processes = [
        context.Process(target=_serve, args=(child, make, *rest), daemon=True)
        for (_, child), rest in zip(pipes, arguments, strict=True)
    ]
    try:
        for process, (_, child) in zip(processes, pipes, strict=True):
            process.start()
            child.close()  # so that the end of the process closes the connection
        yield [parent for parent, _ in pipes]
    finally:
        for process in processes:
            if process.pid:
                process.kill()
                process.join()


def request(connections: Sequence[Connection], message: Any) -> list[Any]:
    """Sends a request to processes, and returns the answer of each.

    Raises:
        RunFailed: A process has ended.
    """
    try:
        for connection in connections:
            connection.send(message)
        return [connection.recv() for connection in connections]
    except (EOFError, OSError) as error:
        raise RunFailed(
            "a process of the benchmark has ended; its error is above, unless its memory ran out"
        ) from error


def _serve(connection: Connection, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, too, and the driver ends it
    keep_memory()
    answer = make(*arguments)
    with suppress(EOFError):  # the driver has ended
        while True:
            connection.send(answer(connection.recv()))


def serve_copy(
    blueprint: Blueprint, samples: dict[str, Tensor], labels: Tensor
) -> Callable[[tuple[int, float]], float]:
    """Returns a function of threads and seconds that trains a network in this process.

    It returns samples per second. Arguments are those of `serial_runner`.
    """
    return train_on_request(Trainer(serial_runner(blueprint, samples, labels, None)))


def train_on_request(trainer: Trainer) -> Callable[[tuple[int, float]], float]:
    """Returns a function of threads and seconds that trains and returns samples per second."""

    def train(message: tuple[int, float]) -> float:
        threads, seconds = message
        with torch_threads(threads):
            return trainer.train(seconds).samples_per_s

    return train
