"""Running a function where the stages of a run will be."""

from collections.abc import Callable
from typing import Any, TypeVar

from ffdist.config import ConfigError
from ffdist.runtime.cluster import alive_nodes
from ffdist.runtime.placement import Placement

Result = TypeVar("Result")

TIMEOUT_S = 90.0
"""Longest that a function may take: its process imports torch, from whatever disk, and sets up a GPU."""


def run_on_machines(function: Callable[[], Result], group: Any, placement: Placement) -> dict[str, Result]:
    """Runs a function with the resources of a stage, once on each machine that has stages.

    On the driver's machine it is done in the driver, unless the device is a GPU: a process that has used one holds
    memory of it until it ends. Other processes end after it, and so give all memory back.

    Args:
        function: Importable on every machine.
        group: Placement group of the run.
        placement: What a stage gets of it.

    Returns:
        The results by the machine's name and address.

    Raises:
        ConfigError: It fails on a machine, or is not done in time.
    """
    import ray
    from ray.util.placement_group import placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def call() -> Result:  # ray.remote takes no partial
        return function()

    nodes = {node["NodeID"]: node for node in alive_nodes()}
    node_ids = placement_group_table(group)["bundles_to_node_id"]
    machines = {
        _machine(nodes[node_ids[index]]): index for index in range(placement.stages) if node_ids[index] in nodes
    }
    own = _machine(nodes[ray.get_runtime_context().get_node_id()]) if placement.device == "cpu" else ""
    remote = ray.remote(num_cpus=placement.stage_cpus, num_gpus=placement.stage_gpus, max_calls=1, max_retries=1)(call)
    started = {
        machine: remote.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        ).remote()
        for machine, index in machines.items()
        if machine != own
    }
    results = {own: function()} if own in machines else {}
    for machine, result in started.items():
        try:
            results[machine] = ray.get(result, timeout=TIMEOUT_S)
        except ray.exceptions.RayError as error:
            ray.cancel(result, force=True)
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            raise ConfigError(
                f"node {machine} must train a layer with the resources of a stage within {TIMEOUT_S:g} s ("
                f"{placement.stage_cpus:.2g} CPU, {placement.stage_gpus:.2g} GPU; {type(cause).__name__}: "
                f"{' '.join(str(cause).split())[:300]}); make model.layers smaller, or repair the node"
            ) from error
    return results


def _machine(node: dict[str, Any]) -> str:
    """Returns the name and the address of a node's machine, which several nodes may share."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
