"""Starting a pipeline: on which machine, with how many stages, on which runner."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

from ffdist import host_memory
from ffdist.checkpoint import CommitWriter
from ffdist.config import Config, ConfigError
from ffdist.data.folder import Folder
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.costs import Costs, predicted_samples_per_s, slowest_stage_s
from ffdist.pipeline.partition import given_partition, partition
from ffdist.pipeline.runner import Runner, serial_runner, torch_threads
from ffdist.precision import Measured, make_blueprint, measurement
from ffdist.prepare import Prepared
from ffdist.runtime.cluster import AUTOSCALER, Resources, check_object_store, connect, machine_resources, num_nodes
from ffdist.runtime.placement import Placement, decide, describe, reserve

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


class Allocation(NamedTuple):
    """Resources that a run has reserved on a machine or a cluster."""

    runner: RunnerName
    resources: dict[str, float]
    """Totals of the machine or the cluster."""
    placement: Placement
    group: Any
    """Placement group; None without Ray."""


@contextmanager
def allocate(runner: RunnerName, prepared: Prepared, config: Config, resources: Resources) -> Iterator[Allocation]:
    """Decides how many stages a run has and where, and reserves their resources for the length of a `with` block.

    Args:
        runner: Runner of the stages.
        prepared: Of the run.
        config: Of the run.
        resources: Returns the totals of the machine or the cluster.

    Raises:
        ConfigError: The cluster lacks the resources.
    """
    negatives = prepared.negatives.num_parts
    with ExitStack() as stack:
        there, group = resources(config.pipeline.device), None
        while True:
            placement = decide(
                config.pipeline, layers=len(config.model.layers), negative_actors=negatives, resources=there
            )
            if runner != "ray":
                break
            try:
                group = stack.enter_context(reserve(placement.bundles(negatives)))
                break
            except ConfigError:
                before, there = there, resources(config.pipeline.device)
                if there == before:
                    raise  # else a node was lost or added meanwhile
        yield Allocation(runner, there, placement, group)


def _check_host_memory(blueprint: Blueprint, stored: int | None) -> str:
    """Checks that a run on this machine alone has the memory for its tensors, and returns how much that is."""
    needed = host_memory.machine_bytes(blueprint, stored=stored)
    host_memory.check(needed, "the weights, optimizer state, activations and data of all stages")
    return f"; host memory: up to {needed / 1e9:,.2f} GB more"


def measure(allocation: Allocation, prepared: Prepared, config: Config) -> list[Measured]:
    """Measures the devices of a run.

    Raises:
        ConfigError: There are no negatives, or a layer cannot be trained there.
    """
    function = measurement(allocation.runner, prepared, config, allocation.placement.device)
    if not allocation.group:
        return [function()]
    from ffdist.runtime.measurement import run_on_machines

    found = run_on_machines(function, allocation.group, allocation.placement)
    return [measured.on(machine) for machine, measured in found.items()]


def assign_layers(
    allocation: Allocation, prepared: Prepared, config: Config, costs: Costs | None, *, again: bool = False
) -> Placed:
    """Assigns layers to stages, and checks memory.

    Args:
        allocation: Resources of the run.
        prepared: Of the run.
        config: Of the run.
        costs: Of the layers; None to balance by the number of their weights.
        again: Whether the run recovers: host memory is not checked then, because part of it is the run's own.

    Raises:
        ConfigError: There is too little memory.
    """
    dataset, _, architecture, _ = prepared
    pipeline, (runner, there, placement, group) = config.pipeline, allocation
    if isinstance(pipeline.balance, list):
        stage_layers = given_partition(pipeline.balance)
    else:
        stage_layers = partition(costs.layers if costs else architecture.weights, placement.stages)
    blueprint = make_blueprint(prepared, config, stage_layers, placement.device).paced(
        pipeline.chunk_size,
        pipeline.max_in_flight,
        minibatch_s=slowest_stage_s(costs, stage_layers) if costs else None,
        most=config.checkpoint.every_minibatches,
    )
    images, labels = dataset.images, dataset.labels["train"]
    in_words, predicted = describe(runner, placement, blueprint), None
    cluster = f"nodes: {num_nodes(there)}, CPUs: {there['CPU']:g}, GPUs: {there.get('GPU', 0):g}"
    if AUTOSCALER in there and placement.device == "cpu" and pipeline.device == "auto":
        in_words += "; no GPU is up, and with pipeline.device=cuda the autoscaler would add one"
    if costs:
        processors = int(there["CPU"]) // pipeline.threads_per_stage if placement.device == "cpu" else int(there["GPU"])
        predicted = predicted_samples_per_s(
            costs, blueprint, processors=max(1, processors) if runner == "ray" else None
        )
        in_words += f"; predicted: {predicted:,.0f} samples/s"
    image_bytes = sum(split.nbytes for split in images.values())
    if runner == "ray":
        check_object_store(images=image_bytes, in_flight=blueprint.bytes_in_flight)
    if placement.device == "cpu" and (runner == "serial" or (runner == "ray" and num_nodes(there) == 1)) and not again:
        in_words += _check_host_memory(blueprint, image_bytes + blueprint.bytes_in_flight if runner == "ray" else None)
    if runner == "ray":
        from ffdist.runtime.runner import ray_runner

        start = partial(ray_runner, blueprint, group, pipeline, images, labels)
        return Placed(blueprint, in_words, cluster, predicted, start)

    @contextmanager
    def here(commits: Folder) -> Iterator[Pipeline]:
        make = serial_runner if runner == "serial" else Backpropagation
        with torch_threads(pipeline.threads_per_stage):
            yield make(blueprint, images, labels, CommitWriter(commits))

    return Placed(blueprint, in_words, cluster, predicted, here)
