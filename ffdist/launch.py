"""Starting a pipeline: on which machine, with how many stages, on which runner."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch

from ffdist.checkpoint import CommitWriter
from ffdist.config import Config, ConfigError
from ffdist.data.folder import Folder
from ffdist.ff.negatives import NegativesError
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.costs import Costs, measure_costs, predicted_samples_per_s, slowest_stage_s
from ffdist.pipeline.partition import given_partition, partition
from ffdist.pipeline.runner import Runner, keep_memory, serial_runner, torch_threads
from ffdist.prepare import Prepared
from ffdist.runtime.cluster import Resources, check_object_store, connect, machine_resources
from ffdist.runtime.placement import decide, describe, reserve

RunnerName = Literal["ray", "serial", "backpropagation"]
Pipeline = Runner | Backpropagation


class Placed(NamedTuple):
    """A pipeline that has its place and can be started."""

    blueprint: Blueprint
    in_words: str
    cluster: str
    """What there is, in words."""
    predicted_samples_per_s: float | None
    """What it should come to; None where nothing was measured."""
    start: Callable[[Folder], AbstractContextManager[Pipeline]]
    """Starts the parts, for the length of a `with` block, given the folder of the run's commits."""


@contextmanager
def machine(runner: RunnerName, address: str | None) -> Iterator[Callable[[], Resources]]:
    """Joins a cluster where the runner needs one, for the length of a `with` block, beside what follows.

    Yields:
        What waits until that is done, and returns what tells the resources.

    Raises:
        ConfigError: It cannot be reached.
    """
    if runner == "ray":
        with connect(address) as joined:
            yield joined
    else:
        yield lambda: machine_resources


def measure(runner: RunnerName, prepared: Prepared, config: Config) -> Costs | None:
    """Measures the costs of a run's parts on this machine, where stages are balanced by them or its speed predicted.

    Raises:
        ConfigError: There are no negatives.
    """
    dataset, pipeline = prepared.dataset, config.pipeline
    if pipeline.balance == "estimated" or config.training.schedule == "greedy" or runner == "backpropagation":
        return None
    device = "cuda" if pipeline.device != "cpu" and torch.cuda.is_available() else "cpu"
    blueprint, threads = _blueprint(prepared, config, [], device), pipeline.threads_per_stage
    busy = 1
    if runner == "ray" and device == "cpu":
        busy = max(1, min(len(os.sched_getaffinity(0)) // threads, len(config.model.layers)))
    try:
        labels = dataset.labels["train"]
        return measure_costs(blueprint, dataset.images, labels, threads=threads, side_by_side=busy)
    except NegativesError as error:
        raise ConfigError(f"negatives.kind={config.negatives.kind}: {error}") from error


def _blueprint(prepared: Prepared, config: Config, stage_layers: list[range], device: str) -> Blueprint:
    return Blueprint(
        prepared.architecture,
        prepared.order,
        negatives=prepared.negatives,
        jitter=config.data.jitter,
        stage_layers=stage_layers,
        measure_every=config.tracking.every_minibatches,
        device=device,
    )


@contextmanager
def place(
    runner: RunnerName, prepared: Prepared, config: Config, resources: Resources, costs: Costs | None
) -> Iterator[Placed]:
    """Decides on stages and holds what they need, for the length of a `with` block.

    Args:
        runner: That is to run them.
        prepared: What they are made of.
        config: The whole run.
        resources: Tells what there is.
        costs: Of the layers; None where the number of their weights stands for it.

    Raises:
        ConfigError: The cluster lacks it.
    """
    dataset, _, architecture, plan = prepared
    pipeline, there = config.pipeline, resources()
    placement = decide(pipeline, layers=len(architecture.layers), negative_actors=plan.num_parts, resources=there)
    if costs and costs.device != placement.device:
        costs = None  # of other machines
    if isinstance(pipeline.balance, list):
        stage_layers = given_partition(pipeline.balance)
    else:
        stage_layers = partition(costs.layers if costs else architecture.weights, placement.stages)
    blueprint = _blueprint(prepared, config, stage_layers, placement.device).paced(
        pipeline.chunk_size,
        pipeline.max_in_flight,
        minibatch_s=slowest_stage_s(costs, stage_layers) if costs else None,
        most=config.checkpoint.every_minibatches,
    )
    images, labels = dataset.images, dataset.labels["train"]
    in_words, predicted = describe(runner, placement, blueprint), None
    nodes = max(1, sum(name.startswith("node:") and not name.endswith("_head__") for name in there))
    cluster = f"nodes: {nodes}, CPUs: {there['CPU']:g}, GPUs: {there.get('GPU', 0):g}"
    if costs:
        processors = int(there["CPU"]) // pipeline.threads_per_stage if placement.device == "cpu" else int(there["GPU"])
        predicted = predicted_samples_per_s(
            costs, blueprint, processors=max(1, processors) if runner == "ray" else None
        )
        in_words += f"; predicted: {predicted:,.0f} samples/s"
    if runner == "ray":
        check_object_store(images=sum(split.nbytes for split in images.values()), in_flight=blueprint.bytes_in_flight)
        with reserve(placement.bundles(plan.num_parts)) as group:
            from ffdist.runtime.runner import ray_runner

            start = partial(ray_runner, blueprint, group, pipeline, images, labels)
            yield Placed(blueprint, in_words, cluster, predicted, start)
        return

    @contextmanager
    def here(commits: Folder) -> Iterator[Pipeline]:
        keep_memory()
        make = serial_runner if runner == "serial" else Backpropagation
        with torch_threads(pipeline.threads_per_stage):
            yield make(blueprint, images, labels, CommitWriter(commits))

    yield Placed(blueprint, in_words, cluster, predicted, here)
