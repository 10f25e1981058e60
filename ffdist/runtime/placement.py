"""Deciding which resources each actor takes, and holding them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from ffdist.config import ConfigError
from ffdist.pipeline.blueprint import Blueprint
from ffdist.sections import Pipeline

PLACEMENT_TIMEOUT_S = 8.0
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
    if pipeline.device == "cuda" and not gpus:
        raise ConfigError(
            f"pipeline.device=cuda needs at least one GPU (the cluster has {cpus} CPUs and no GPU); "
            f"set pipeline.device to cpu or auto, or join a cluster that has GPUs"
        )
    device: Literal["cpu", "cuda"] = "cuda" if gpus and pipeline.device != "cpu" else "cpu"
    automatic = min(layers, gpus) if device == "cuda" else layers
    given = len(pipeline.balance) if isinstance(pipeline.balance, list) else pipeline.stages
    stages = automatic if given == "auto" else given
    wanted_cpus = stages * pipeline.threads_per_stage + 1 + negative_actors
    cpu_share = 1 / math.ceil(wanted_cpus / cpus)
    return Placement(
        stages=stages,
        device=device,
        stage_gpus=(1 - READOUT_GPUS) / math.ceil(stages / gpus) if device == "cuda" else 0,
        stage_cpus=pipeline.threads_per_stage * cpu_share,
        other_cpus=cpu_share,
    )


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


@contextmanager
def reserve(bundles: list[dict[str, float]]) -> Iterator[Any]:
    """Holds one bundle of resources per actor as a placement group, for the length of a `with` block.

    Raises:
        ConfigError: No node is large enough for one of them, or the cluster lacks them or has them in use, after
            `PLACEMENT_TIMEOUT_S`. (A placement group that can never be placed raises nothing by itself.)
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for bundle in bundles:
        if not any(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes):
            raise ConfigError(
                f"no node is large enough for one actor (needed: {_amounts(bundle)}; nodes have: "
                f"{'; '.join(_amounts(node) for node in nodes)}); set pipeline.threads_per_stage lower"
            )
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(PLACEMENT_TIMEOUT_S):
            total, free = (_amounts(found) for found in (ray.cluster_resources(), ray.available_resources()))
            raise ConfigError(
                f"the cluster cannot place the run's {len(bundles)} actors (needed: {_needs(bundles)}; the cluster "
                f"has: {total}; free: {free}); set pipeline.stages or pipeline.threads_per_stage lower, or wait until "
                f"others are done"
            )
        yield group
    finally:
        remove_placement_group(group)


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _needs(bundles: list[dict[str, float]]) -> str:
    return " + ".join(
        f"{bundles.count(bundle)} x ({_amounts(bundle)})"
        for bundle in {str(bundle): bundle for bundle in bundles}.values()
    )
