"""Stretches of training in steady state, here or in processes of their own."""

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
from ffdist.pipeline.runner import Runner, Trained, keep_memory, serial_runner, torch_threads
from ffdist.pipeline.schedule import Evaluate, Order, Position, Snapshot, Train, schedule

ENDLESS = 10**6
"""Epochs of a training that ends only because it is told to."""


class Stretch(NamedTuple):
    """What was measured of a stretch."""

    samples_per_s: float
    driver_cpu_fraction: float
    """Processor time of the process that drives the pipeline, as a share of one core."""
    busy_fraction: float
    """Share of the machine's processors that were at work."""
    evaluation_s: float
    """Time from the last chunk before an evaluation to its end; 0 where there was none."""
    chunks: list[Trained]


class Trainer:
    """Trains stretch after stretch on one pipeline.

    Args:
        pipeline: To train on.
    """

    def __init__(self, pipeline: Runner) -> None:
        self.blueprint = pipeline.blueprint
        self._pipeline, self._order, self._epoch = pipeline, pipeline.blueprint.order, 0
        self._in_flight = pipeline.blueprint.max_in_flight  # until so many chunks are through, nothing is steady
        self.start_s = 0.0
        """Time from the import of ffdist to the end of the first chunk."""

    def train(
        self, seconds: float, *, commit: bool = False, evaluation: Sequence[Evaluate] = (), boundary: bool = False
    ) -> Stretch:
        """Trains until so many seconds are measured, and a chunk in them.

        Args:
            seconds: How many; where there is an evaluation, after its end.
            commit: Whether a commit is made as they begin.
            evaluation: What is evaluated as they begin.
            boundary: Whether an epoch ends soon after they begin.
        """
        deadline, ends, chunks = float("inf"), list[tuple[float, float, float, float, int]](), list[Trained]()
        written, evaluation_s = None, 0.0
        steady_after = self.blueprint.chunk_size * self._in_flight
        first_minibatch = max(0, self._order.minibatches - 2 * steady_after) if boundary else 0

        def orders() -> Iterator[Order]:
            due = True
            for order in takewhile(lambda _: time.perf_counter() < deadline, self._orders(first_minibatch)):
                if due and len(ends) >= self._in_flight:
                    due = False
                    if commit:
                        yield Snapshot(Position(order.epoch, order.first), order.step)
                    yield from evaluation
                yield order

        for order, result in self._pipeline.run(orders(), self._orders(first_minibatch)):
            now = time.perf_counter()
            if isinstance(order, Evaluate):
                if order.last:
                    evaluation_s, deadline = now - ends[-1][0], now + seconds
            elif isinstance(order, Train) and isinstance(result, Trained):
                self.start_s = self.start_s or process_age_s()
                self._epoch = order.epoch + 1
                chunks.append(result)
                ends.append((now, time.process_time(), *_processor_s(), order.num_minibatches))
                if len(ends) == self._in_flight and not evaluation:
                    deadline = now + seconds
            elif callable(result):
                written = result  # or still being written, beside what follows
        if written:
            written(True)
        first = self._in_flight - 1
        last = max(first + 1, sum(end <= deadline for end, *_ in ends) - 1)
        took_s, work_s, busy_s, all_s = (ends[last][part] - ends[first][part] for part in range(4))
        minibatches = sum(count for *_, count in ends[first + 1 : last + 1])
        return Stretch(
            samples_per_s=minibatches * self._order.batch_size / took_s,
            driver_cpu_fraction=work_s / took_s,
            busy_fraction=busy_s / all_s if all_s else 0.0,
            evaluation_s=evaluation_s,
            chunks=chunks[first + 1 : last + 1],
        )

    def _orders(self, first_minibatch: int) -> Iterator[Train]:
        orders = schedule(
            epochs=ENDLESS,
            minibatches=self._order.minibatches,
            chunk_size=self.blueprint.chunk_size,
            validation_samples=0,
            test_samples=0,
            evaluate_every=ENDLESS,
            evaluation_block=1,
            start=Position(self._epoch, first_minibatch),
        )
        return (order for order in orders if isinstance(order, Train))


def process_age_s() -> float:
    """Returns the time since this process imported ffdist, which a command does first of all.

    The kernel's start of the process is that of the shell that replaced itself by it (`exec`), however long it had run.
    """
    return time.monotonic() - IMPORTED_AT


def _processor_s() -> tuple[float, float]:
    """Returns the time that all processors of the machine were at work, and all of their time, as the kernel counts."""
    times = psutil.cpu_times()
    all_s = sum(times) - times.guest - times.guest_nice  # those are counted twice
    return all_s - times.idle - times.iowait, all_s


@contextmanager
def copies(number: int, *network: Any) -> Iterator[list[Connection]]:
    """Starts copies of a whole network, each in a process of its own, for the length of a `with` block.

    Args:
        number: How many.
        *network: As `_serve` takes it.

    Yields:
        Ways to ask each for a stretch, by sending `(threads, seconds)`, and to receive its samples per second.
    """
    processes = multiprocessing.get_context("spawn")
    pipes = [processes.Pipe() for _ in range(number)]
    started = [processes.Process(target=_serve, args=(there, *network), daemon=True) for _, there in pipes]
    try:
        for process in started:
            process.start()
        yield [here for here, _ in pipes]
    finally:
        for process in started:
            process.kill()
            process.join()


def _serve(asked: Connection, blueprint: Blueprint, images: dict[str, Tensor], labels: Tensor) -> None:
    """Trains as asked, on one network with images and labels as `serial_runner` takes them."""
    keep_memory()
    trainer = Trainer(serial_runner(blueprint, images, labels, None))
    while True:
        threads, seconds = asked.recv()
        with torch_threads(threads):
            asked.send(trainer.train(seconds).samples_per_s)
