"""Placement: decides the resources of each actor, and reserves them."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Literal, NamedTuple

from ffdist.config.sections import Pipeline
from ffdist.errors import ClusterStopped, ConfigError
from ffdist.pipeline.blueprint import Blueprint
from ffdist.runtime.cluster import AUTOSCALER, alive_nodes, has_autoscaler

PLACEMENT_TIMEOUT_S = 8.0
RELEASE_TIMEOUT_S = 60.0
"""Longest wait for resources that are in use. Ray needs a while to release those of a driver that was killed,
especially if a node was lost with it."""
AUTOSCALER_TIMEOUT_S = 900.0
"""Longest wait for an autoscaler: a cloud needs minutes to start a machine."""
READOUT_GPU_FRACTION = 0.1
"""Fraction of a GPU that the readout takes. Stages get the rest, so that one stage per GPU leaves room for it."""


class Placement(NamedTuple):
    """The resources of a run."""

    num_stages: int
    device: Literal["cpu", "cuda"]
    stage_gpus: float
    """GPUs per stage: a GPU minus the readout's fraction, split evenly if there are more stages than GPUs."""
    stage_cpus: float
    other_cpus: float
    """CPUs per negative actor, and of the readout if it runs on a CPU."""
    has_readout: bool = True
    """Whether there is an actor for the readout."""

    def bundles(self, negative_actors: int) -> list[dict[str, float]]:
        """Returns the resources of each actor in order of creation: stages, readout, negatives."""
        stage, other = {"CPU": self.stage_cpus}, {"CPU": self.other_cpus}
        if not self.stage_gpus:
            return [stage] * self.num_stages + [other] * (self.has_readout + negative_actors)
        # The readout reserves no CPU, because the stages may take all CPUs of the nodes with GPUs.
        readout = [{"GPU": READOUT_GPU_FRACTION}] * self.has_readout
        return [stage | {"GPU": self.stage_gpus}] * self.num_stages + readout + [other] * negative_actors


def decide(
    pipeline: Pipeline, *, layers: int, negative_actors: int, resources: dict[str, float], has_readout: bool = True
) -> Placement:
    """Decides the resources of a run; a pure function of the configuration and the cluster's totals.

    If there are too few CPUs, actors share them evenly: `1 / ceil(threads / CPUs)` of a CPU per thread, because other
    fractions may not fit into whole CPUs. Stages share what the readout leaves of the GPUs in the same way.

    Raises:
        ConfigError: `pipeline.device` is `cuda` and the cluster has no GPU.
    """
    gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 0)))
    requested_stages = len(pipeline.balance) if isinstance(pipeline.balance, list) else pipeline.stages
    if pipeline.device == "cuda" and not gpus:
        gpus = _num_gpus_to_add(requested_stages, cpus, autoscaler=AUTOSCALER in resources)
    device: Literal["cpu", "cuda"] = "cuda" if gpus and pipeline.device != "cpu" else "cpu"
    auto_stages = min(layers, gpus) if device == "cuda" else layers
    num_stages = auto_stages if requested_stages == "auto" else requested_stages
    num_threads = num_stages * pipeline.threads_per_stage + has_readout + negative_actors
    cpu_fraction = _floor(1 / math.ceil(num_threads / cpus))
    return Placement(
        num_stages=num_stages,
        device=device,
        stage_gpus=_floor((1 - READOUT_GPU_FRACTION * has_readout) / math.ceil(num_stages / gpus))
        if device == "cuda"
        else 0,
        stage_cpus=_floor(pipeline.threads_per_stage * cpu_fraction),
        other_cpus=cpu_fraction,
        has_readout=has_readout,
    )


def _num_gpus_to_add(stages: int | Literal["auto"], cpus: int, *, autoscaler: bool) -> int:
    """Returns the number of GPUs that the autoscaler must add to a cluster without GPUs."""
    if autoscaler and stages != "auto":
        return stages
    fix = (
        "set pipeline.stages to the number of GPUs that the autoscaler must add, or its min_workers to at least 1"
        if autoscaler
        else "set pipeline.device to cpu or auto, or join a cluster that has GPUs"
    )
    raise ConfigError(f"pipeline.device=cuda needs at least one GPU (the cluster has {cpus} CPUs and no GPU); {fix}")


def _floor(fraction: float) -> float:
    """Rounds down to Ray's resolution, because Ray may round 1/6 up, and six of them would not fit into one."""
    return math.floor(round(fraction * 10_000, 6)) / 10_000


def describe(runner: str, placement: Placement, blueprint: Blueprint) -> str:
    """Describes a placement in one line."""
    layers = ", ".join("-".join(dict.fromkeys((str(r.start + 1), str(r.stop)))) for r in blueprint.stage_layers)
    count = f"{placement.num_stages} stage{'s' * (placement.num_stages > 1)}"
    stages = f"{runner}: {count} on {placement.device} with layers {layers}"
    if runner == "backpropagation":
        return f"{runner}: all layers on {placement.device}, in this process"
    if runner == "serial":
        return f"{stages}, in this process"
    each = f"{placement.stage_gpus:.2g} GPU" if placement.stage_gpus else f"{placement.stage_cpus:.2g} CPU"
    readout = ", 1 readout" * placement.has_readout
    return (
        f"{stages}, {each} each; {blueprint.negatives.num_actors} for negatives{readout}; up to "
        f"{blueprint.max_in_flight} chunks of {blueprint.chunk_size} minibatches in flight"
    )


_owners: dict[Any, int] = {}
"""Threads of this process that hold a placement group, by the group's id."""


@contextmanager
def reserve(bundles: list[dict[str, float]]) -> Iterator[Any]:
    """Reserves one bundle of resources per actor as a placement group in the `with` block.

    Waits while other threads of this process hold placement groups, and `AUTOSCALER_TIMEOUT_S` for an autoscaler.

    Raises:
        ConfigError: No node is large enough for a bundle, or the resources are missing after `PLACEMENT_TIMEOUT_S`, or
            in use after `RELEASE_TIMEOUT_S`. Ray itself raises nothing for a group that can never be placed.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    nodes, timeout_s = [node["Resources"] for node in alive_nodes()], AUTOSCALER_TIMEOUT_S
    if not has_autoscaler():
        timeout_s = PLACEMENT_TIMEOUT_S
        _check_nodes(bundles, nodes)
    group, thread, start = placement_group(bundles, strategy="PACK"), get_ident(), time.monotonic()
    try:
        while True:
            are_others_placed = bool(set(_owners.values()) - {thread})  # their runs will end
            if group.wait(timeout_s):
                break
            total = ray.cluster_resources()
            if are_others_placed or (_has(total, bundles) and time.monotonic() - start < RELEASE_TIMEOUT_S):
                continue
            free = ray.available_resources()
            raise ConfigError(
                f"the cluster cannot place the run's {len(bundles)} actors (needed: {_needs(bundles)}; the cluster "
                f"has: {_amounts(total)}; free: {_amounts(free)}); set pipeline.stages or pipeline.threads_per_stage "
                f"lower, or wait until other jobs are done"
            )
        _owners[group.id] = thread
        yield group
    finally:
        _owners.pop(group.id, None)
        if not isinstance(sys.exception(), ClusterStopped):  # the call would wait for a stopped cluster
            remove_placement_group(group)


def _check_nodes(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> None:
    for bundle in bundles:
        if not any(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes):
            raise ConfigError(
                f"no node is large enough for one actor (needed: {_amounts(bundle)}; nodes have: "
                f"{'; '.join(_amounts(node) for node in nodes)}); set pipeline.threads_per_stage lower"
            )


def _has(total: dict[str, float], bundles: list[dict[str, float]]) -> bool:
    """Returns whether a cluster has enough resources in total, used or not."""
    return all(sum(bundle.get(name, 0) for bundle in bundles) <= total.get(name, 0) for name in ("CPU", "GPU"))


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _needs(bundles: list[dict[str, float]]) -> str:
    return " + ".join(
        f"{bundles.count(bundle)} x ({_amounts(bundle)})"
        for bundle in {str(bundle): bundle for bundle in bundles}.values()
    )
