"""Measures training in steady state, in this process or in child processes."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil
from torch import Tensor

from ffdist import IMPORTED_AT
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

    def __init__(self, pipeline: Runner) -> None:
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
def start_copies(num_copies: int, *network: Any) -> Iterator[list[Connection]]:
    """Starts copies of a whole network in child processes, for the duration of a `with` block.

    Args:
        num_copies: Number of child processes, one copy each.
        *network: Arguments of `_serve` after the connection.

    Yields:
        Connections to the processes. Each takes `(threads, seconds)`, and returns samples per second.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(num_copies)]
    processes = [context.Process(target=_serve, args=(child, *network), daemon=True) for _, child in pipes]
    try:
        for process in processes:
            process.start()
        yield [parent for parent, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(connection: Connection, blueprint: Blueprint, samples: dict[str, Tensor], labels: Tensor) -> None:
    """Trains one network and measures it, once per request; samples and labels are those of `serial_runner`."""
    keep_memory()
    trainer = Trainer(serial_runner(blueprint, samples, labels, None))
    while True:
        threads, seconds = connection.recv()
        with torch_threads(threads):
            connection.send(trainer.train(seconds).samples_per_s)
