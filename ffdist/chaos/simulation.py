"""Recovery tried on simulated parts, thousands of times: the driver, its commits and its books are the real ones.

As the driver's order is everything, parts may be simple: they fold what reaches them into a hash. All of a cluster runs
in this process, one call at a time, in an order that a seed decides, and the seed decides as well where a part dies or
stops, and at which call or write the driver dies, to be started anew.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from ffdist.chaos.simulated import (
    BATCH,
    CLASSES,
    Cluster,
    DriverDied,
    Fate,
    FrailFolder,
    Maker,
    Part,
    Readout,
    WriterDied,
)
from ffdist.checkpoint import Commits, CommitWriter, weights_sha256
from ffdist.config import Config, ConfigError, RunFailed
from ffdist.config_file import parse_config
from ffdist.data.datasets import Dataset
from ffdist.data.order import SampleOrder
from ffdist.failures import Failures
from ffdist.loop import Loop
from ffdist.pipeline.blueprint import Blueprint, Parts
from ffdist.pipeline.partition import partition
from ffdist.pipeline.runner import Runner
from ffdist.pipeline.source import NegativePlan
from ffdist.pipeline.stage import layer_name
from ffdist.prepare import Prepared, build_architecture
from ffdist.recovery import run_to_the_end
from ffdist.screen import track
from ffdist.start import Start, resume
from ffdist.tracking.averages import is_learned
from ffdist.tracking.outbox import OUTBOX, Outbox, Point

LAYERS, DELAY, TRAINING, HELD_OUT = 3, 5, 15, 3
MOST_FAULTS, MOST_LIVES = 6, 50
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk is slower, and safe from these deaths anyway
SETTINGS = {
    "data": {"name": "digits", "label": "append"},
    "model": {"layers": [2] * LAYERS},
    "negatives": {"kind": "hard_label", "prediction_delay": DELAY},
    "training": {"epochs": 2, "batch_size": BATCH, "validation_samples": HELD_OUT, "evaluate_every": 1},
    "checkpoint": {"every_minibatches": 3, "every_s": None, "keep": 2},
    "tracking": {"every_minibatches": 2},
}


class Broken(AssertionError):
    """A schedule did not end as if nothing had happened; the text has the seed that repeats it."""


class End(NamedTuple):
    """What a schedule ends with."""

    weights_sha256: str
    metrics: dict[str, list[tuple[int, float]]]
    """In the run's own books."""
    on_server: dict[str, list[tuple[int, float]]]


class Outcome(NamedTuple):
    """What many schedules came to."""

    schedules: int
    faults: int
    seconds: float


def simulate(schedules: int, seed: int) -> Outcome:
    """Runs schedules, each with faults of its own, and holds the end of each to that of one without.

    Raises:
        Broken: The first that ends otherwise.
    """
    truth, _ = run_schedule(seed, faults=0)
    start, faults = time.perf_counter(), 0
    for number in track(range(schedules), "simulating"):
        try:
            end, told = run_schedule(seed * 1_000_000 + number, faults=MOST_FAULTS)
            wrong = [name for name, one, other in zip(End._fields, end, truth, strict=True) if one != other]
            if wrong:
                raise Broken(f"it ends with other {', '.join(wrong)}, after {'; '.join(told)}")
        except Exception as error:
            again = f"ffdist chaos --simulated {number + 1} --seed {seed}"
            raise Broken(f"schedule {number} of seed {seed} is broken: {error}; `{again}` repeats it") from error
        faults += len(told)
    return Outcome(schedules, faults, time.perf_counter() - start)


def run_schedule(seed: int, faults: int) -> tuple[End, list[str]]:
    """Runs one, from its first driver to the one that comes to the end.

    Returns:
        Its end, and the faults that struck.

    Raises:
        Broken: It came to no end, or to one that a user would have to deal with.
    """
    fate, server = Fate(seed, faults), dict[Point, None]()
    with TemporaryDirectory(prefix="ffdist-simulation-", dir=MEMORY) as name:
        folder = Path(name)
        try:
            for _ in range(MOST_LIVES):
                try:
                    end = _live(folder, fate, server)
                except DriverDied:
                    continue
                if end:
                    return end, fate.told
        except (ConfigError, RunFailed) as error:
            raise Broken(f"it ends with: {error}; after {'; '.join(fate.told)}") from error
    raise Broken(f"it does not end, after {'; '.join(fate.told)}")


def _live(folder: Path, fate: Fate, server: dict[Point, None]) -> End | None:
    """Lives a driver's life; returns the run's end, or None where it was asked to stop before."""
    config = parse_config(SETTINGS | {"pipeline": {"chunk_size": fate.draw.randint(1, DELAY)}}, "simulation")
    prepared = _prepared(config)
    commits = Commits(FrailFolder(str(folder / "commits"), fate, DriverDied))
    names = commits.names()
    if max(names, default="") < fate.committed:
        raise Broken(f"commit {fate.committed} is lost, after {'; '.join(fate.told)}")
    start = resume(config, prepared, folder, from_older=False) if names else Start({})
    with closing(_Books(folder, fate, server)) as books:
        asked_to_stop = _Stop(fate)
        loop = run_to_the_end(
            _pipelines(config, prepared, folder, fate),
            lambda start: Loop(config, prepared, commits, start, books, _Silent(), dict, lambda event, step: None),  # type: ignore[arg-type]
            commits,
            start,
            Failures(MOST_LIVES, 1e9),
            asked_to_stop,
            lambda text: None,
        )
        if loop.stopped:
            return None
        books.send()
        _, state = commits.read(commits.names()[-1])
        found: dict[str, list[tuple[int, float]]] = {}
        for point in sorted(server, key=lambda point: (point.name, point.step)):
            found.setdefault(point.name, []).append((point.step, point.value))
        return End(weights_sha256(state), books.history(), found)


def _prepared(config: Config) -> Prepared:
    sizes = {"train": TRAINING, "validation": HELD_OUT, "test": HELD_OUT}
    images = {split: torch.zeros(size, 4, dtype=torch.uint8) for split, size in sizes.items()}
    labels = {split: torch.arange(size) % CLASSES for split, size in sizes.items()}
    dataset = Dataset(images, labels, CLASSES, (1, 2, 2))
    order = SampleOrder(config.seed, TRAINING, BATCH)
    plan = NegativePlan("hard_label", prediction_delay=DELAY, num_parts=2, ahead=2)
    return Prepared(dataset, order, build_architecture(config, dataset.shape, CLASSES), plan)


def _pipelines(
    config: Config, prepared: Prepared, folder: Path, fate: Fate
) -> Iterator[AbstractContextManager[Runner]]:
    while True:
        yield _pipeline(config, prepared, folder, fate)


@contextmanager
def _pipeline(config: Config, prepared: Prepared, folder: Path, fate: Fate) -> Iterator[Runner]:
    """Makes a pipeline of however many stages."""
    order, plan, cluster = prepared.order, prepared.negatives, Cluster(fate)
    cut = partition([1.0] * LAYERS, fate.draw.randint(1, LAYERS))
    parts = Parts(
        negatives=[Maker() for _ in range(plan.num_parts)],
        stages=[Part([layer_name(i) for i in layers], order, DELAY if 0 in layers else None) for layers in cut],
        readout=Readout(["readout"], order),
        writer=CommitWriter(FrailFolder(str(folder / "commits"), fate, WriterDied)),
    )
    blueprint = Blueprint(prepared.architecture, order, plan, 0, cut, 1, "cpu")
    blueprint = blueprint.paced(config.pipeline.chunk_size, fate.draw.randint(1, 5))
    yield Runner(blueprint, parts, call=cluster.call, collect=cluster.collect)


class _Stop:
    """Asks a driver to stop, as Ctrl-C does, where fate wants it."""

    def __init__(self, fate: Fate) -> None:
        self._fate, self._asked = fate, False

    def __call__(self) -> bool:
        self._asked = self._asked or self._fate.strikes("asked to stop")
        return self._asked


class _Books:
    """A tracker whose outbox is real, and whose server is a dict that merges points as MLflow's does."""

    def __init__(self, folder: Path, fate: Fate, server: dict[Point, None]) -> None:
        self.run_id, self._fate, self._server = "simulated", fate, server
        self._outbox = Outbox(folder / OUTBOX, 10**9)
        self._outbox.add_sent(server)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        learned = {name: value for name, value in metrics.items() if is_learned(name)}
        self._outbox.add(learned, step)
        if self._fate.draw.random() < 0.3:
            self.send()

    def send(self) -> None:
        """Sends what waits; the driver may die when the server has it and the outbox does not know."""
        points = self._outbox.waiting(1000)
        self._server.update(dict.fromkeys(points))
        if self._fate.strikes("the driver dies between sending and noting it"):
            raise DriverDied
        self._outbox.mark_sent(points)

    def draw(self, plot: object) -> None:
        pass  # nobody looks at plots here

    def history(self) -> dict[str, list[tuple[int, float]]]:
        return self._outbox.history()

    def close(self) -> None:
        self._outbox.close()


class _Silent:
    """A display that shows nothing."""

    def say(self, text: str) -> None:
        pass

    def doing(self, what: str) -> None:
        pass

    def update(self, step: int, metrics: dict[str, float] | None = None) -> None:
        pass
