"""Deciding which resources each actor takes, and holding them."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Literal, NamedTuple

from ffdist.config import ConfigError
from ffdist.failures import ClusterStopped
from ffdist.pipeline.blueprint import Blueprint
from ffdist.runtime.cluster import AUTOSCALER, alive_nodes, has_autoscaler
from ffdist.sections import Pipeline

PLACEMENT_TIMEOUT_S = 8.0
RELEASE_TIMEOUT_S = 60.0
"""Longest wait for resources that the cluster has but that are in use: Ray needs a while to release those of a driver
that was killed, most of all if a node was lost with it."""
AUTOSCALER_TIMEOUT_S = 900.0
"""A cloud needs minutes to start a machine."""
READOUT_GPUS = 0.1
"""Share of a GPU that the readout takes; the rest is for stages, so that one on every GPU leaves room for it."""


class Placement(NamedTuple):
    """The resources of a run."""

    stages: int
    device: Literal["cpu", "cuda"]
    stage_gpus: float
    """GPU of each stage: what the readout leaves of one, or a share of that where there are more stages than GPUs."""
    stage_cpus: float
    other_cpus: float
    """CPUs of each negative actor, and of the readout where it is on none of the GPUs."""

    def bundles(self, negative_actors: int) -> list[dict[str, float]]:
        """Returns what each actor needs, in the order in which they are made: stages, readout, negatives."""
        stage, other = {"CPU": self.stage_cpus}, {"CPU": self.other_cpus}
        if not self.stage_gpus:
            return [stage] * self.stages + [other] * (1 + negative_actors)
        # The stages of a node with GPUs may leave no processor to the readout.
        return [stage | {"GPU": self.stage_gpus}] * self.stages + [{"GPU": READOUT_GPUS}] + [other] * negative_actors


def decide(pipeline: Pipeline, *, layers: int, negative_actors: int, resources: dict[str, float]) -> Placement:
    """Decides stages and shares; a pure function of the configuration and the cluster's totals.

    Actors share processors evenly where there are fewer than actors, `1 / ceil(actors / processors)` of one each,
    because other fractions may not fit into whole ones; so do stages what the readout leaves of GPUs.

    Raises:
        ConfigError: GPUs wanted and none there.
    """
    gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 0)))
    given = len(pipeline.balance) if isinstance(pipeline.balance, list) else pipeline.stages
    if pipeline.device == "cuda" and not gpus:
        gpus = _gpus_to_wait_for(given, cpus, autoscaler=AUTOSCALER in resources)
    device: Literal["cpu", "cuda"] = "cuda" if gpus and pipeline.device != "cpu" else "cpu"
    automatic = min(layers, gpus) if device == "cuda" else layers
    stages = automatic if given == "auto" else given
    wanted_cpus = stages * pipeline.threads_per_stage + 1 + negative_actors
    cpu_share = _floor(1 / math.ceil(wanted_cpus / cpus))
    return Placement(
        stages=stages,
        device=device,
        stage_gpus=_floor((1 - READOUT_GPUS) / math.ceil(stages / gpus)) if device == "cuda" else 0,
        stage_cpus=_floor(pipeline.threads_per_stage * cpu_share),
        other_cpus=cpu_share,
    )


def _gpus_to_wait_for(stages: int | Literal["auto"], cpus: int, *, autoscaler: bool) -> int:
    """Returns how many GPUs an autoscaler is to add to a cluster that has none."""
    if autoscaler and stages != "auto":
        return stages
    fix = (
        "set pipeline.stages to the number of GPUs that the autoscaler is to add, or its min_workers to at least 1"
        if autoscaler
        else "set pipeline.device to cpu or auto, or join a cluster that has GPUs"
    )
    raise ConfigError(f"pipeline.device=cuda needs at least one GPU (the cluster has {cpus} CPUs and no GPU); {fix}")


def _floor(share: float) -> float:
    """Rounds down to what Ray counts in: it may round 1/6 up, and six shares would no longer fit into one."""
    return math.floor(round(share * 10_000, 6)) / 10_000


def describe(runner: str, placement: Placement, blueprint: Blueprint) -> str:
    """Returns a line that says what was decided."""
    layers = ", ".join("-".join(dict.fromkeys((str(cut.start + 1), str(cut.stop)))) for cut in blueprint.stage_layers)
    stages = f"{runner}: {placement.stages} stages on {placement.device} with layers {layers}"
    if runner == "backpropagation":
        return f"{runner}: all layers on {placement.device}, in this process"
    if runner == "serial":
        return f"{stages}, in this process"
    share = f"{placement.stage_gpus:.2g} GPU" if placement.stage_gpus else f"{placement.stage_cpus:.2g} CPU"
    return (
        f"{stages}, {share} each; {blueprint.negatives.num_parts} negative actors, 1 readout; up to "
        f"{blueprint.max_in_flight} chunks of {blueprint.chunk_size} minibatches under way"
    )


_placed: dict[Any, int] = {}
"""Threads of this process whose runs hold a placement group, by the group's id."""


@contextmanager
def reserve(bundles: list[dict[str, float]]) -> Iterator[Any]:
    """Holds one bundle of resources per actor as a placement group, for the length of a `with` block.

    Runs in other threads of this process are waited for, and an autoscaler has `AUTOSCALER_TIMEOUT_S` to add nodes.

    Raises:
        ConfigError: No node is large enough for one of them, the cluster lacks them after `PLACEMENT_TIMEOUT_S`, or it
            has them in use after `RELEASE_TIMEOUT_S`. (A placement group that can never be placed raises nothing by
            itself.)
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
            others = set(_placed.values()) - {thread}  # which will end
            if group.wait(timeout_s):
                break
            total = ray.cluster_resources()
            if others or (_has(total, bundles) and time.monotonic() - start < RELEASE_TIMEOUT_S):
                continue
            free = ray.available_resources()
            raise ConfigError(
                f"the cluster cannot place the run's {len(bundles)} actors (needed: {_needs(bundles)}; the cluster "
                f"has: {_amounts(total)}; free: {_amounts(free)}); set pipeline.stages or pipeline.threads_per_stage "
                f"lower, or wait until others are done"
            )
        _placed[group.id] = thread
        yield group
    finally:
        _placed.pop(group.id, None)
        if not isinstance(sys.exception(), ClusterStopped):  # then the call would wait for the cluster
            remove_placement_group(group)


def _check_nodes(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> None:
    for bundle in bundles:
        if not any(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes):
            raise ConfigError(
                f"no node is large enough for one actor (needed: {_amounts(bundle)}; nodes have: "
                f"{'; '.join(_amounts(node) for node in nodes)}); set pipeline.threads_per_stage lower"
            )


def _has(total: dict[str, float], bundles: list[dict[str, float]]) -> bool:
    """Returns whether a cluster has enough resources in all, whoever uses them."""
    return all(sum(bundle.get(name, 0) for bundle in bundles) <= total.get(name, 0) for name in ("CPU", "GPU"))


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _needs(bundles: list[dict[str, float]]) -> str:
    return " + ".join(
        f"{bundles.count(bundle)} x ({_amounts(bundle)})"
        for bundle in {str(bundle): bundle for bundle in bundles}.values()
    )
