"""Throughput of training in steady state, relative to a single process and to the capacity of the machine."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import fmean, median
from tempfile import TemporaryDirectory

import psutil
from torch import Tensor

from ffdist.bench.backpropagation import SCHEDULES, PipelinePlan, start_backpropagation
from ffdist.bench.stretch import Measurement, Trainer, request, serve_copy, start_processes
from ffdist.checkpoint.checkpoints import CheckpointError
from ffdist.config.architecture import build_architecture
from ffdist.config.schema import Config
from ffdist.errors import ConfigError
from ffdist.pipeline.costs import Costs
from ffdist.pipeline.partition import partition
from ffdist.pipeline.runner import Runner
from ffdist.pipeline.schedule import Evaluate, evaluation, evaluation_block
from ffdist.runtime.cluster import Resources
from ffdist.storage.folder import Folder
from ffdist.training.launch import PlacedPipeline, allocate, assign_layers, machine, measure
from ffdist.training.precision import driver_device, resolve, with_precision
from ffdist.training.prepare import Prepared, prepare

NUM_ROUNDS = 3
"""Number of rounds for the configured number of stages; other numbers of stages are measured in one round."""


def measure_pipeline(
    config: Config, seconds: float, say: Callable[[str], None], *, backpropagation: bool = False
) -> dict[str, float]:
    """Measures a configuration over Ray with its number of stages, and then with every other number of stages.

    Args:
        config: Configuration to train.
        seconds: Duration of each measurement.
        say: Gets a text about the progress.
        backpropagation: Whether to compare with pipelines of the same network that are trained by backpropagation.

    Returns:
        Figures by name: samples per second, ratios, fractions in [0, 1], seconds and bytes. The names of figures for
        other numbers of stages start with `stages_N/`.

    Raises:
        ConfigError: The configuration cannot be trained, or `backpropagation` is set and the device is not a CPU.
    """
    if backpropagation and driver_device(config) != "cpu":
        raise ConfigError("--backprop measures on CPUs; set pipeline.device=cpu")
    figures, prepared, layers = dict[str, float](), prepare(config), len(config.model.layers)
    with ExitStack() as stack:
        config, prepared, resources, costs = stack.enter_context(start_machine(config, prepared, say))
        with start_pipeline(config, prepared, resources, costs) as (trainer, placed):
            trainer.train(0.0)
            figures["start_s"] = trainer.start_s
            num_stages = len(trainer.blueprint.stage_layers)
            say(f"starting a copy of the network on each of {num_cores()} cores")
            data = prepared.dataset.samples, prepared.dataset.labels["train"]
            connections = stack.enter_context(start_processes(serve_copy, [(placed.blueprint, *data)] * num_cores()))
            block = evaluation_block(prepared.architecture)
            test = list(evaluation("test", len(prepared.dataset.labels["test"]), block))
            with (
                _start_schedules(config, prepared, placed, costs, *data) if backpropagation else nullcontext() as others
            ):
                figures |= _compare(trainer, connections, seconds, NUM_ROUNDS, say, test, others) | _max_memory()
            if placed.predicted_samples_per_s:
                figures["predicted_over_ray"] = placed.predicted_samples_per_s / figures["ray_samples_per_s"]
        for stages in range(1, layers + 1):
            if stages != num_stages:
                with start_pipeline(_with_stages(config, stages), prepared, resources, costs) as (trainer, _):
                    ratios = _compare(trainer, connections, seconds, 1, say)
                figures |= {f"stages_{stages}/{name}": value for name, value in ratios.items()}
    return figures


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def start_machine(
    config: Config, prepared: Prepared, say: Callable[[str], None]
) -> Iterator[tuple[Config, Prepared, Resources, Costs | None]]:
    """Starts Ray for the duration of a `with` block, and chooses the precision.

    Yields:
        The configuration with this precision, what was prepared for it, the resources, and the costs of the layers.
    """
    say("starting Ray")
    with machine("ray", "local") as find_resources:
        resources = find_resources()
        with allocate("ray", prepared, config, resources) as allocation:
            precision, costs = resolve(config.training.precision, measure(allocation, prepared, config))
        say(precision.reason or f"precision: {precision.value}")
        yield *with_precision(config, prepared, precision.value), resources, costs


def _with_stages(config: Config, stages: int) -> Config:
    pipeline = config.pipeline.model_copy(update={"stages": stages, "balance": "measured"})
    return config.model_copy(update={"pipeline": pipeline})


@contextmanager
def start_pipeline(
    config: Config, prepared: Prepared, resources: Resources, costs: Costs | None
) -> Iterator[tuple[Trainer, PlacedPipeline]]:
    """Starts a pipeline for the duration of a `with` block; its checkpoints are deleted at the end."""
    with (
        allocate("ray", prepared, config, resources) as allocation,
        TemporaryDirectory() as checkpoints,
        (placed := assign_layers(allocation, prepared, config, costs)).start(
            Folder(checkpoints, CheckpointError)
        ) as pipeline,
    ):
        assert isinstance(pipeline, Runner)
        yield Trainer(pipeline), placed


@contextmanager
def _start_schedules(
    config: Config,
    prepared: Prepared,
    placed: PlacedPipeline,
    costs: Costs | None,
    samples: dict[str, Tensor],
    labels: Tensor,
) -> Iterator[Callable[[float], dict[str, float]]]:
    """Starts pipelines by backpropagation; yields a function of seconds that returns samples per second by schedule."""
    plan = plan_backpropagation(config, prepared, placed.blueprint.stage_layers, costs)
    with start_backpropagation(plan, samples, labels) as measure:
        yield lambda seconds: {name: measure(name, seconds)[0] for name in SCHEDULES}


def plan_backpropagation(
    config: Config, prepared: Prepared, stage_layers: list[range], costs: Costs | None
) -> PipelinePlan:
    """Returns the plan of a pipeline by backpropagation, with the update rule of `ffdist baseline`.

    It has the same stages, but no more than there are cores, or samples in a minibatch.
    """
    baseline, dataset = config.by_backpropagation(), prepared.dataset
    architecture = build_architecture(baseline, dataset.encoder, dataset.untrained, may_import=True)
    architecture = replace(architecture, precision=prepared.architecture.precision)
    most = min(num_cores(), prepared.order.batch_size)
    if len(stage_layers) > most:
        stage_layers = partition(costs.layers if costs else architecture.num_parameters, most)
    return PipelinePlan(architecture, prepared.order, stage_layers, config.pipeline.threads_per_stage)


def _compare(
    trainer: Trainer,
    connections: Sequence[Connection],
    seconds: float,
    num_rounds: int,
    say: Callable[[str], None],
    test: Sequence[Evaluate] = (),
    measure_others: Callable[[float], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Returns throughputs and their ratios: medians over `num_rounds` interleaved rounds, the lowest and the highest.

    If `test` is not empty, the cost of checkpoints, epoch boundaries and evaluation is measured, too. `measure_others`
    returns the samples per second of other pipelines, by name.
    """
    rounds: list[dict[str, float]] = []
    for number in range(1, num_rounds + 1):
        say(f"{len(trainer.blueprint.stage_layers)} stages, round {number} of {num_rounds}")
        one_thread = _measure_copies(connections[:1], 1, seconds)
        all_copies = _measure_copies(connections, 1, seconds)
        all_threads = _measure_copies(connections[:1], len(connections), seconds)
        training = trainer.train(seconds)
        rounds.append(
            {
                "serial_1_thread_samples_per_s": one_thread,
                "serial_all_threads_samples_per_s": all_threads,
                "copies_samples_per_s": all_copies,
                "ray_samples_per_s": training.samples_per_s,
                "speedup_over_one_process": training.samples_per_s / max(one_thread, all_threads),
                "pipeline_efficiency": training.samples_per_s / max(one_thread, all_threads, all_copies),
                **_time_fractions(training),
            }
        )
        if measure_others:
            for name, samples_per_s in measure_others(seconds).items():
                rounds[-1] |= {
                    f"{name}_samples_per_s": samples_per_s,
                    f"ray_over_{name}": training.samples_per_s / samples_per_s,
                }
        if test:
            checkpointing, boundary = trainer.train(seconds, checkpoint=True), trainer.train(seconds, boundary=True)
            evaluating = trainer.train(seconds, evaluation=test)
            rounds[-1] |= {
                "checkpointing_over_not": checkpointing.samples_per_s / training.samples_per_s,
                "epoch_boundary_over_not": boundary.samples_per_s / training.samples_per_s,
                "busy_evaluating_over_not": evaluating.busy_fraction / training.busy_fraction,
                "evaluation_s": evaluating.evaluation_s,
            }
    return summarize(rounds)


def summarize(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the median of each figure over the rounds, and, of several rounds, the lowest and the highest value."""
    summaries: dict[str, Callable[[list[float]], float]]
    summaries = {"": median} if len(rounds) == 1 else {"": median, "lowest/": min, "highest/": max}
    return {
        f"{prefix}{name}": summary([figures[name] for figures in rounds])
        for prefix, summary in summaries.items()
        for name in rounds[0]
    }


def _measure_copies(connections: Sequence[Connection], threads: int, seconds: float) -> float:
    """Trains copies of the network in parallel; returns the sum of their samples per second."""
    return float(sum(request(connections, (threads, seconds))))


def _time_fractions(training: Measurement) -> dict[str, float]:
    """Returns how the time was spent; waiting and serialization are those of the stage with the most computation."""
    stages = [[chunk.stages[stage] for chunk in training.chunks] for stage in range(len(training.chunks[0].stages))]
    compute_s = [sum(report.compute_s for report in stage) for stage in stages]
    wait_s, serialization_s, queued_s = (
        [sum(getattr(report, part) for report in stage) for stage in stages]
        for part in ("wait_s", "serialization_s", "queued_s")
    )
    slowest = compute_s.index(max(compute_s))
    total_s = compute_s[slowest] + wait_s[slowest]
    return {
        "stage_imbalance": 1 - fmean(compute_s) / compute_s[slowest],
        "wait_fraction": max(0.0, wait_s[slowest] - serialization_s[slowest] - queued_s[slowest]) / total_s,
        "serialization_fraction": serialization_s[slowest] / total_s,
        "queued_fraction": queued_s[slowest] / total_s,
        "driver_cpu_fraction": training.driver_cpu_fraction,
        "busy_fraction": training.busy_fraction,
    }


def read_actor_memory() -> Iterator[tuple[str, int, int]]:
    """Yields the kind, the unique and the resident memory of each actor on this machine, in bytes."""
    for process in psutil.Process().children(recursive=True):
        try:
            name, memory = process.cmdline()[0], process.memory_full_info()
        except (psutil.Error, IndexError):
            continue
        kind = name.removeprefix("ray::").split(".")[0]  # such as `ray::StageActor.train`
        if kind.endswith("Actor"):
            yield kind.removesuffix("Actor").lower(), memory.uss, memory.rss


def _max_memory() -> dict[str, float]:
    """Returns the largest memory of the actors of each kind."""
    maxima = dict[str, float]()
    for kind, *sizes in read_actor_memory():
        for memory, size in zip(("unique", "resident"), sizes, strict=True):
            key = f"{kind}_{memory}_bytes"
            maxima[key] = max(maxima.get(key, 0), size)
    return maxima
