"""Throughput of a configuration's training in steady state, against one process and against the machine itself."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from statistics import fmean, median
from tempfile import TemporaryDirectory

import psutil

from ffdist.bench.stretch import Stretch, Trainer, copies
from ffdist.checkpoint import CommitError
from ffdist.config import Config
from ffdist.data.folder import Folder
from ffdist.launch import Placed, allocate, assign_layers, machine, measure
from ffdist.pipeline.costs import Costs
from ffdist.pipeline.runner import Runner
from ffdist.pipeline.schedule import Evaluate, evaluation, evaluation_block
from ffdist.precision import resolve, with_precision
from ffdist.prepare import Prepared, prepare
from ffdist.runtime.cluster import Resources

ROUNDS = 3
"""Rounds for the configuration's own stages; other numbers of stages get one."""


def measure_pipeline(config: Config, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    """Measures a configuration over Ray with its own stages, and then with every other number of them, less closely.

    Args:
        config: What to train.
        seconds: Length of a measured stretch.
        say: Is told what is going on.

    Returns:
        Figures by name: samples per second, ratios, shares in [0, 1], seconds and bytes. Those of other numbers of
        stages have `stages_N/` before their names.
    """
    found, prepared, layers = dict[str, float](), prepare(config), len(config.model.layers)
    with ExitStack() as stack:
        say("starting Ray")
        joined = stack.enter_context(machine("ray", "local"))
        resources = joined()
        with allocate("ray", prepared, config, resources) as place:
            precision, costs = resolve(config.training.precision, measure(place, prepared, config))
        say(precision.reason or f"precision: {precision.value}")
        config, prepared = with_precision(config, prepared, precision.value)
        with started(config, prepared, resources, costs) as (trainer, placed):
            trainer.train(0.0)
            found["start_s"] = trainer.start_s
            cores, own = len(os.sched_getaffinity(0)), len(trainer.blueprint.stage_layers)
            say(f"starting a copy of the network on each of {cores} cores")
            data = prepared.dataset.images, prepared.dataset.labels["train"]
            asked = stack.enter_context(copies(cores, placed.blueprint, *data))
            block = evaluation_block(prepared.architecture)
            test = list(evaluation("test", len(prepared.dataset.labels["test"]), block))
            found |= _compare(trainer, asked, seconds, ROUNDS, say, test) | _largest_memory()
            if placed.predicted_samples_per_s:
                found["predicted_over_ray"] = placed.predicted_samples_per_s / found["ray_samples_per_s"]
        for stages in range(1, layers + 1):
            if stages != own:
                with started(_with_stages(config, stages), prepared, resources, costs) as (trainer, _):
                    figures = _compare(trainer, asked, seconds, 1, say)
                found |= {f"stages_{stages}/{name}": value for name, value in figures.items()}
    return found


def _with_stages(config: Config, stages: int) -> Config:
    pipeline = config.pipeline.model_copy(update={"stages": stages, "balance": "measured"})
    return config.model_copy(update={"pipeline": pipeline})


@contextmanager
def started(
    config: Config, prepared: Prepared, resources: Resources, costs: Costs | None
) -> Iterator[tuple[Trainer, Placed]]:
    """Starts a pipeline whose commits are thrown away, for the length of a `with` block."""
    with (
        allocate("ray", prepared, config, resources) as place,
        TemporaryDirectory() as commits,
        (placed := assign_layers(place, prepared, config, costs)).start(Folder(commits, CommitError)) as pipeline,
    ):
        assert isinstance(pipeline, Runner)
        yield Trainer(pipeline), placed


def _compare(
    trainer: Trainer,
    asked: Sequence[Connection],
    seconds: float,
    count: int,
    say: Callable[[str], None],
    test: Sequence[Evaluate] = (),
) -> dict[str, float]:
    """Returns the ratios of one pipeline's speed, in the median of `count` rounds in which all take turns.

    Where there is something to evaluate, what interrupts the training is measured, too.
    """
    rounds: list[dict[str, float]] = []
    for number in range(1, count + 1):
        say(f"{len(trainer.blueprint.stage_layers)} stages, round {number} of {count}")
        alone = _ask(asked[:1], 1, seconds)
        together = _ask(asked, 1, seconds)
        wide = _ask(asked[:1], len(asked), seconds)
        stretch = trainer.train(seconds)
        rounds.append(
            {
                "serial_1_thread_samples_per_s": alone,
                "serial_all_threads_samples_per_s": wide,
                "copies_samples_per_s": together,
                "ray_samples_per_s": stretch.samples_per_s,
                "machine_capacity": together / alone,
                "speedup_over_serial_1_thread": stretch.samples_per_s / alone,
                "speedup_over_serial_all_threads": stretch.samples_per_s / wide,
                "pipeline_efficiency": stretch.samples_per_s / together,
                **_shares(stretch),
            }
        )
        if test:
            committing, ending = trainer.train(seconds, commit=True), trainer.train(seconds, boundary=True)
            evaluating = trainer.train(seconds, evaluation=test)
            rounds[-1] |= {
                "committing_over_not": committing.samples_per_s / stretch.samples_per_s,
                "epoch_boundary_over_not": ending.samples_per_s / stretch.samples_per_s,
                "busy_evaluating_over_not": evaluating.busy_fraction / stretch.busy_fraction,
                "evaluation_s": evaluating.evaluation_s,
            }
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def _ask(asked: Sequence[Connection], threads: int, seconds: float) -> float:
    """Has networks train side by side; returns the samples per second of all of them together."""
    for connection in asked:
        connection.send((threads, seconds))
    return float(sum(connection.recv() for connection in asked))


def _shares(stretch: Stretch) -> dict[str, float]:
    """Returns where the time of the stages went; what is not computing is that of the stage that computes most."""
    stages = [[chunk.stages[stage] for chunk in stretch.chunks] for stage in range(len(stretch.chunks[0].stages))]
    compute_s = [sum(report.compute_s for report in stage) for stage in stages]
    wait_s, packing_s, queued_s = (
        [sum(getattr(report, part) for report in stage) for stage in stages]
        for part in ("wait_s", "packing_s", "queued_s")
    )
    chief = compute_s.index(max(compute_s))
    whole_s = compute_s[chief] + wait_s[chief]
    return {
        "stage_imbalance": 1 - fmean(compute_s) / compute_s[chief],
        "wait_fraction": max(0.0, wait_s[chief] - packing_s[chief] - queued_s[chief]) / whole_s,
        "serialization_fraction": packing_s[chief] / whole_s,
        "queued_fraction": queued_s[chief] / whole_s,
        "driver_cpu_fraction": stretch.driver_cpu_fraction,
        "busy_fraction": stretch.busy_fraction,
    }


def actors_memory() -> Iterator[tuple[str, int, int]]:
    """Yields the kind of each actor on this machine, and the memory that is its own alone and all of it, in bytes."""
    for process in psutil.Process().children(recursive=True):
        try:
            name, memory = process.cmdline()[0], process.memory_full_info()
        except (psutil.Error, IndexError):
            continue
        kind = name.removeprefix("ray::").split(".")[0]  # of `ray::StageActor.train`, say
        if kind.endswith("Actor"):
            yield kind.removesuffix("Actor").lower(), memory.uss, memory.rss


def _largest_memory() -> dict[str, float]:
    """Returns the memory of each kind of actor, the largest of its kind."""
    found = dict[str, float]()
    for kind, *sizes in actors_memory():
        for how, size in zip(("unique", "resident"), sizes, strict=True):
            key = f"{kind}_{how}_bytes"
            found[key] = max(found.get(key, 0), size)
    return found
