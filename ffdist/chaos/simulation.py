"""Tests of recovery with simulated actors; the driver, its checkpoints and its outbox of metrics are real.

A schedule is one run with faults. The actors only hash their inputs, because that shows whether the driver sent the
right calls in the right order. They run in this process, one call at a time. A seed determines the order of the calls,
where an actor dies or hangs, and at which call or write the driver dies; another driver then resumes the run.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from ffdist.chaos.simulated import (
    BATCH_SIZE,
    NUM_CLASSES,
    DriverDied,
    FaultInjector,
    FaultyFolder,
    SimulatedCluster,
    SimulatedNegativeSource,
    SimulatedReadout,
    SimulatedStage,
    WriterDied,
)
from ffdist.checkpoint.checkpoints import Checkpoints, CheckpointWriter, weights_sha256
from ffdist.config.architecture import build_architecture
from ffdist.config.loading import parse_config
from ffdist.config.schema import Config
from ffdist.console import track
from ffdist.data.datasets import Dataset
from ffdist.data.order import SampleOrder
from ffdist.errors import ConfigError, RunFailed
from ffdist.ff.architecture import layer_name
from ffdist.ff.encoders import ImageEncoder
from ffdist.pipeline.blueprint import Actors, Blueprint
from ffdist.pipeline.partition import partition
from ffdist.pipeline.runner import Runner
from ffdist.pipeline.source import NegativePlan
from ffdist.tracking.outbox import OUTBOX, Outbox, Point
from ffdist.training.checkpointing import Checkpointer
from ffdist.training.early_stopping import EarlyStopping
from ffdist.training.loop import Loop
from ffdist.training.metrics import Metrics, is_learned
from ffdist.training.prepare import Prepared
from ffdist.training.recoveries import Recoveries
from ffdist.training.resume import Start, start_from_checkpoint

NUM_LAYERS, PREDICTION_DELAY, NUM_TRAINING, NUM_HELD_OUT = 3, 5, 15, 3
MAX_FAULTS, MAX_DRIVERS = 6, 50
"""Limits of a schedule."""
EARLY_EVERY = 4
"""One of so many schedules stops early."""
MAX_ERROR = 0.999
"""Validation error that every evaluation but the worst reaches."""
MEMORY_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None  # faster than a disk
SETTINGS: dict[str, Any] = {
    "data": {"name": "digits", "label": "append"},
    "model": {"layers": [2] * NUM_LAYERS},
    "negatives": {"kind": "hard_label", "prediction_delay": PREDICTION_DELAY},
    "training": {"epochs": 2, "batch_size": BATCH_SIZE, "validation_samples": NUM_HELD_OUT, "validate_every_epochs": 1},
    "checkpoint": {"every_minibatches": 3, "every_s": None, "keep_last": 2},
    "tracking": {"log_every_minibatches": 2},
}


class RunResult(NamedTuple):
    """The result of a run."""

    weights_sha256: str
    metrics: dict[str, list[tuple[int, float]]]
    """Metrics in the outbox."""
    server_metrics: dict[str, list[tuple[int, float]]]
    """Metrics on the tracking server."""


class Outcome(NamedTuple):
    """Counts of a simulation in which no schedule failed."""

    schedules: int
    faults: int
    seconds: float


def simulate(schedules: int, seed: int) -> Outcome:
    """Runs a number of schedules, and compares the result of each with that of a run without faults.

    Raises:
        RunFailed: Faults stopped a run or changed its result; the message has the command that reproduces it.
    """
    references = [run_schedule(seed, max_faults=0, stops_early=stops_early)[0] for stops_early in (False, True)]
    start, num_faults = time.perf_counter(), 0
    for number in track(range(schedules), "simulating"):
        try:
            stops_early = number % EARLY_EVERY == EARLY_EVERY - 1
            result, faults = run_schedule(seed * 1_000_000 + number, max_faults=MAX_FAULTS, stops_early=stops_early)
            reference = references[stops_early]
            differing = [field for field in RunResult._fields if getattr(result, field) != getattr(reference, field)]
            if differing:
                raise RunFailed(f"{', '.join(differing)} differ after these faults: {'; '.join(faults)}")
        except Exception as error:
            command = f"ffdist chaos --simulated {number + 1} --seed {seed}"
            raise RunFailed(
                f"schedule {number} of seed {seed} failed: {error}; run `{command}` to reproduce it"
            ) from error
        num_faults += len(faults)
    return Outcome(schedules, num_faults, time.perf_counter() - start)


def run_schedule(seed: int, max_faults: int, *, stops_early: bool = False) -> tuple[RunResult, list[str]]:
    """Runs one driver after another until the run is completed.

    Args:
        seed: Seed of the faults.
        max_faults: Largest number of faults.
        stops_early: Whether the run ends at its first validation, after one of its epochs.

    Returns:
        The result of the run, and the injected faults.

    Raises:
        RunFailed: The run failed with an error, or was not completed.
    """
    injector, server = FaultInjector(seed, max_faults), dict[Point, None]()
    with TemporaryDirectory(prefix="ffdist-simulation-", dir=MEMORY_FOLDER) as name:
        folder = Path(name)
        try:
            for _ in range(MAX_DRIVERS):
                try:
                    result = _run_driver(folder, injector, server, stops_early=stops_early)
                except DriverDied:
                    continue
                if result:
                    return result, injector.faults
        except (ConfigError, RunFailed) as error:
            raise RunFailed(f"{error}; faults: {'; '.join(injector.faults)}") from error
    raise RunFailed(f"not completed by {MAX_DRIVERS} drivers; faults: {'; '.join(injector.faults)}")


def _run_driver(
    folder: Path, injector: FaultInjector, server: dict[Point, None], *, stops_early: bool
) -> RunResult | None:
    """Starts or resumes the run; returns its result, or None if a stop was requested."""
    is_requested = False

    def should_stop() -> bool:
        nonlocal is_requested  # at a random time, as by Ctrl-C
        is_requested = is_requested or injector.inject("stop requested")
        return is_requested

    chunk_size = injector.rng.randint(1, PREDICTION_DELAY)
    settings: dict[str, Any] = copy.deepcopy(SETTINGS) | {"pipeline": {"chunk_size": chunk_size}}
    if stops_early:
        settings["training"]["stop"] = {"target": MAX_ERROR}
    config = parse_config(settings, "simulation")
    prepared = _prepare(config)
    checkpoints = Checkpoints(FaultyFolder(str(folder / "checkpoints"), injector, DriverDied))
    names = checkpoints.names()
    if max(names, default="") < injector.newest_checkpoint:
        raise RunFailed(f"checkpoint {injector.newest_checkpoint} is lost")
    start = start_from_checkpoint(config, prepared, folder, skip_damaged=False) if names else Start({})
    with closing(_Tracker(folder, injector, server)) as tracker:
        recoveries = Recoveries(MAX_DRIVERS, 1e9)
        metrics = Metrics(config.tracking.log_every_minibatches, BATCH_SIZE, tracker.log_metrics)
        stopping = EarlyStopping(config, prepared)
        checkpointer = Checkpointer(
            config, prepared, checkpoints, metrics, stopping, run_id="simulated", provenance={}, say=lambda text: None
        )
        loop = Loop(config, prepared, checkpointer, stopping, recoveries, [metrics])
        pipelines = (_make_pipeline(config, prepared, folder, injector) for _ in count())
        loop.run(pipelines, start, should_stop)
        if loop.interrupted:
            return None
        tracker.send()
        _, state = checkpoints.read(checkpoints.names()[-1])
        server_metrics: dict[str, list[tuple[int, float]]] = {}
        for point in sorted(server, key=lambda point: (point.name, point.step)):
            server_metrics.setdefault(point.name, []).append((point.step, point.value))
        return RunResult(weights_sha256(state), tracker.history(), server_metrics)


def _prepare(config: Config) -> Prepared:
    sizes = {"train": NUM_TRAINING, "validation": NUM_HELD_OUT, "test": NUM_HELD_OUT}
    samples = {split: torch.zeros(size, 4, dtype=torch.uint8) for split, size in sizes.items()}
    labels = {split: torch.arange(size) % NUM_CLASSES for split, size in sizes.items()}
    dataset = Dataset(samples, labels, ImageEncoder((1, 2, 2), NUM_CLASSES, label=config.data.label))
    order = SampleOrder(config.seed, NUM_TRAINING, BATCH_SIZE)
    plan = NegativePlan("hard_label", prediction_delay=PREDICTION_DELAY, num_actors=2, prefetch_chunks=2)
    return Prepared(dataset, order, build_architecture(config, dataset.encoder), plan)


@contextmanager
def _make_pipeline(config: Config, prepared: Prepared, folder: Path, injector: FaultInjector) -> Iterator[Runner]:
    """Creates a pipeline with a random number of stages."""
    order, plan, cluster = prepared.order, prepared.negatives, SimulatedCluster(injector)
    stage_layers = partition([1.0] * NUM_LAYERS, injector.rng.randint(1, NUM_LAYERS))
    actors = Actors(
        negatives=[SimulatedNegativeSource() for _ in range(plan.num_actors)],
        stages=[
            SimulatedStage([layer_name(i) for i in layers], order, PREDICTION_DELAY if 0 in layers else None)
            for layers in stage_layers
        ],
        readout=SimulatedReadout(["readout"], order),
        writer=CheckpointWriter(FaultyFolder(str(folder / "checkpoints"), injector, WriterDied)),
    )
    blueprint = Blueprint(prepared.architecture, order, plan, stage_layers, 1, "cpu")
    blueprint = blueprint.with_pace(config.pipeline.chunk_size, injector.rng.randint(1, 5))
    yield Runner(blueprint, actors, call=cluster.call, collect=cluster.collect)


class _Tracker(Outbox):
    """A tracker with a real outbox; its server is a dict that merges equal points, as MLflow does."""

    def __init__(self, folder: Path, injector: FaultInjector, server: dict[Point, None]) -> None:
        super().__init__(folder / OUTBOX, 10**9)
        self._injector, self._server = injector, server
        self.add_sent(server)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.add({name: value for name, value in metrics.items() if is_learned(name)}, step)
        if self._injector.rng.random() < 0.3:
            self.send()

    def send(self) -> None:
        """Sends points that were not sent yet; the driver may die before the outbox marks them as sent."""
        points = self.pending_points(1000)
        self._server.update(dict.fromkeys(points))
        if self._injector.inject("the driver dies before it marks points as sent"):
            raise DriverDied
        self.mark_sent(points)
