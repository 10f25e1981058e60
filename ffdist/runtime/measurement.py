"""Runs a function on the machines of a run's stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ffdist.errors import ConfigError
from ffdist.runtime.cluster import alive_nodes
from ffdist.runtime.imports import import_settings, prepare_imports
from ffdist.runtime.placement import Placement

Result = TypeVar("Result")

TIMEOUT_S = 90.0
"""Time limit of the function. It includes importing torch, possibly from a slow disk, and initializing a GPU."""


def run_on_machines(function: Callable[[], Result], group: Any, placement: Placement) -> dict[str, Result]:
    """Runs a function with the resources of a stage, once on each machine that has stages.

    On the driver's machine it runs in the driver, unless the device is a GPU, because a process holds GPU memory until
    it exits. Elsewhere it runs in a process that exits afterwards, which frees all memory.

    Args:
        function: Function that is importable on every machine.
        group: Placement group of the run.
        placement: Resources of a stage.

    Returns:
        Results by name and address of the machine.

    Raises:
        ConfigError: The function fails on a machine, or exceeds `TIMEOUT_S`.
    """
    import ray
    from ray.util.placement_group import placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def call(import_path: list[str], working_folder: Path) -> Result:  # ray.remote does not accept functools.partial
        prepare_imports(import_path, working_folder)
        return function()

    nodes = {node["NodeID"]: node for node in alive_nodes()}
    node_ids = placement_group_table(group)["bundles_to_node_id"]
    machines = {
        _machine(nodes[node_ids[index]]): index for index in range(placement.num_stages) if node_ids[index] in nodes
    }
    driver_machine = _machine(nodes[ray.get_runtime_context().get_node_id()]) if placement.device == "cpu" else ""
    remote = ray.remote(num_cpus=placement.stage_cpus, num_gpus=placement.stage_gpus, max_calls=1, max_retries=1)(call)
    tasks = {
        machine: remote.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        ).remote(*import_settings())
        for machine, index in machines.items()
        if machine != driver_machine
    }
    results = {driver_machine: function()} if driver_machine in machines else {}
    for machine, task in tasks.items():
        try:
            results[machine] = ray.get(task, timeout=TIMEOUT_S)
        except ray.exceptions.RayError as error:
            ray.cancel(task, force=True)
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            raise ConfigError(
                f"node {machine} must train a layer with the resources of a stage within {TIMEOUT_S:g} s ("
                f"{placement.stage_cpus:.2g} CPU, {placement.stage_gpus:.2g} GPU; {type(cause).__name__}: "
                f"{' '.join(str(cause).split())[:300]}); make model.layers smaller, or repair the node"
            ) from error
    return results


def _machine(node: dict[str, Any]) -> str:
    """Returns the name and address of a node's machine. Several nodes may share a machine."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
