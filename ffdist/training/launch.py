"""Preparation of a pipeline: resources, measured costs, and the assignment of layers to stages."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

from ffdist import host_memory
from ffdist.checkpoint.checkpoints import CheckpointWriter
from ffdist.config.schema import Config
from ffdist.errors import ConfigError
from ffdist.pipeline import memory
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.costs import Costs, predicted_samples_per_s, send_s, slowest_stage_s
from ffdist.pipeline.partition import partition, partition_of_sizes
from ffdist.pipeline.runner import Pipeline, serial_runner, torch_threads
from ffdist.runtime.cluster import AUTOSCALER, Resources, check_object_store, connect, machine_resources, num_nodes
from ffdist.runtime.placement import Placement, decide, describe, reserve
from ffdist.storage.folder import Folder
from ffdist.training.precision import DeviceMeasurement, make_blueprint, measurement
from ffdist.training.prepare import Prepared

RunnerName = Literal["ray", "serial", "backpropagation"]


class PlacedPipeline(NamedTuple):
    """A pipeline whose layers are assigned to stages and whose resources are reserved."""

    blueprint: Blueprint
    description: str
    cluster: str
    """Description of the resources of the cluster."""
    predicted_samples_per_s: float | None
    """Expected throughput; None if no costs were measured."""
    start: Callable[[Folder], AbstractContextManager[Pipeline]]
    """Starts the actors for the duration of a `with` block; takes the folder of the run's checkpoints."""


@contextmanager
def machine(runner: RunnerName, address: str | None) -> Iterator[Callable[[], Resources]]:
    """Connects to a cluster in the background for the duration of a `with` block, if the runner needs one.

    Yields:
        A function that waits for the connection, and returns a function that returns the resources.

    Raises:
        ConfigError: The cluster cannot be reached.
    """
    if runner == "ray":
        with connect(address) as wait_for_cluster:
            yield wait_for_cluster
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
    """Decides the number and placement of stages, and reserves their resources for the duration of a `with` block.

    Args:
        runner: Runner of the stages.
        prepared: Inputs of the run.
        config: Configuration of the run.
        resources: Returns the totals of the machine or the cluster.

    Raises:
        ConfigError: The cluster lacks the resources.
    """
    num_negative_actors = prepared.negatives.num_actors
    with ExitStack() as stack:
        totals, group = resources(config.pipeline.device), None
        while True:
            placement = decide(
                config.pipeline,
                layers=len(config.model.layers),
                negative_actors=num_negative_actors,
                resources=totals,
                has_readout=prepared.architecture.has_readout,
            )
            if runner != "ray":
                break
            try:
                group = stack.enter_context(reserve(placement.bundles(num_negative_actors)))
                break
            except ConfigError:
                before, totals = totals, resources(config.pipeline.device)
                if totals == before:
                    raise  # otherwise a node was lost or added in the meantime, so decide again
        yield Allocation(runner, totals, placement, group)


def measure(allocation: Allocation, prepared: Prepared, config: Config) -> list[DeviceMeasurement]:
    """Measures the devices of a run.

    Raises:
        ConfigError: Negatives cannot be made, or a layer cannot be trained on a device.
    """
    function = measurement(allocation.runner, prepared, config, allocation.placement.device)
    if not allocation.group:
        return [function()]
    from ffdist.runtime.measurement import run_on_machines

    measured_by_machine = run_on_machines(function, allocation.group, allocation.placement)
    return [each._replace(device=f"{each.device}, node {node}") for node, each in measured_by_machine.items()]


def assign_layers(
    allocation: Allocation, prepared: Prepared, config: Config, costs: Costs | None, *, again: bool = False
) -> PlacedPipeline:
    """Assigns layers to stages, and checks memory.

    Args:
        allocation: Resources of the run.
        prepared: Inputs of the run.
        config: Configuration of the run.
        costs: Measured costs of the layers; None to balance by number of weights.
        again: Whether this is a recovery. Host memory is not checked then, because the run already uses part of it.

    Raises:
        ConfigError: There is not enough memory.
    """
    dataset, _, architecture, _ = prepared
    pipeline, (runner, totals, placement, group) = config.pipeline, allocation
    if isinstance(pipeline.balance, list):
        stage_layers = partition_of_sizes(pipeline.balance)
    elif costs:
        sends = send_s(make_blueprint(prepared, config, [], placement.device)) if runner == "ray" else ()
        stage_layers = partition(costs.layers, placement.num_stages, sends)
    else:
        stage_layers = partition(architecture.num_parameters, placement.num_stages)
    blueprint = make_blueprint(prepared, config, stage_layers, placement.device).with_pace(
        pipeline.chunk_size,
        pipeline.max_in_flight,
        minibatch_s=slowest_stage_s(costs, stage_layers) if costs else None,
        most=config.checkpoint.every_minibatches,
    )
    samples, labels = dataset.samples, dataset.labels["train"]
    description, predicted = describe(runner, placement, blueprint), None
    cluster = f"nodes: {num_nodes(totals)}, CPUs: {totals['CPU']:g}, GPUs: {totals.get('GPU', 0):g}"
    if AUTOSCALER in totals and placement.device == "cpu" and pipeline.device == "auto":
        description += "; no GPU is running; set pipeline.device=cuda for the autoscaler to add one"
    if costs:
        devices = int(totals["CPU"]) // pipeline.threads_per_stage if placement.device == "cpu" else int(totals["GPU"])
        predicted = predicted_samples_per_s(costs, blueprint, processors=max(1, devices) if runner == "ray" else None)
        description += f"; predicted: {predicted:,.0f} samples/s"
    sample_bytes = sum(split.nbytes for split in samples.values())
    if group:
        check_object_store(sample_bytes=sample_bytes, in_flight_bytes=blueprint.bytes_in_flight)
    if placement.device == "cpu" and (runner == "serial" or (runner == "ray" and num_nodes(totals) == 1)) and not again:
        stored = sample_bytes + blueprint.bytes_in_flight if runner == "ray" else None
        needed = memory.machine_bytes(blueprint, stored=stored)
        host_memory.check(needed, "the weights, optimizer state, activations and data of all stages")
        description += f"; host memory: up to {needed / 1e9:,.2f} GB more"
    if runner == "ray":
        from ffdist.runtime.runner import ray_runner

        start = partial(ray_runner, blueprint, group, pipeline, samples, labels)
        return PlacedPipeline(blueprint, description, cluster, predicted, start)

    @contextmanager
    def start_in_process(checkpoints: Folder) -> Iterator[Pipeline]:
        make_pipeline = serial_runner if runner == "serial" else Backpropagation
        with torch_threads(pipeline.threads_per_stage):
            yield make_pipeline(blueprint, samples, labels, CheckpointWriter(checkpoints))

    return PlacedPipeline(blueprint, description, cluster, predicted, start_in_process)
