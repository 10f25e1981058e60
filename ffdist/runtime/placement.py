"""Joining a cluster, and deciding which resources each actor takes."""

import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from ffdist.config import ConfigError, Pipeline
from ffdist.pipeline.runner import Blueprint

PLACEMENT_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
RAY_WAY_OUT = "correct --address or RAY_ADDRESS, or leave both out to start a local Ray"


class Placement(NamedTuple):
    """The resources of a run."""

    stages: int
    device: Literal["cpu", "cuda"]
    stage_gpus: float
    """GPUs of each stage: whole ones, or a share where there are more stages than GPUs."""
    stage_cpus: float
    other_cpus: float
    """CPUs of the readout and of each negative actor, which never touch a GPU."""


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Joins a Ray cluster, or starts a local one, for the length of a `with` block.

    Args:
        address: A cluster's address; `local` for a Ray of one's own; None for the cluster that this machine is part
            of, or a Ray of one's own where there is none.

    Raises:
        ConfigError: The cluster cannot be reached, or the platform has no Ray runner.
    """
    if sys.platform != "linux":
        raise ConfigError(f"the Ray runner needs Linux (platform: {sys.platform}); use --runner serial")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its warning
    import ray

    if address and ":" in address:
        _check_reachable(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.ERROR, include_dashboard=False if address == "local" else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"Ray cannot be reached or started at {address}: {error}; {RAY_WAY_OUT}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own, which would end the run without a word
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Asks a port before Ray does, which would go on asking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster answers at {address} ({error}); {RAY_WAY_OUT}") from error


def cluster_resources() -> dict[str, float]:
    """Returns the totals of the cluster that is joined, such as `CPU` and `GPU`."""
    import ray

    return dict(ray.cluster_resources())


def machine_resources() -> dict[str, float]:
    """Returns the totals of this machine, in the same terms."""
    import torch

    return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def check_object_store(needed: int) -> None:
    """Checks that what is in it at once fills at most half of the smallest object store among the cluster's nodes.

    Args:
        needed: Images and messages in flight, in bytes.

    Raises:
        ConfigError: It would fill more.
    """
    import ray

    store = int(min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]))
    if needed > store / 2:
        raise ConfigError(
            f"images and chunks in flight may fill half of Ray's object store (needed: {needed:,} bytes, "
            f"half of the store: {store // 2:,}); set pipeline.chunk_size or pipeline.max_in_flight lower"
        )


def decide(pipeline: Pipeline, *, layers: int, negative_actors: int, resources: dict[str, float]) -> Placement:
    """Decides stages and shares; a pure function of the configuration and the cluster's totals.

    Actors share processors and GPUs evenly where there are fewer than actors, `1 / ceil(actors / devices)` of one
    each, because other fractions may not fit into whole devices.

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
    stages = automatic if pipeline.stages == "auto" else pipeline.stages
    wanted_cpus = stages * pipeline.threads_per_stage + 1 + negative_actors
    cpu_share = 1 / math.ceil(wanted_cpus / cpus)
    return Placement(
        stages=stages,
        device=device,
        stage_gpus=1 / math.ceil(stages / gpus) if device == "cuda" else 0,
        stage_cpus=pipeline.threads_per_stage * cpu_share,
        other_cpus=cpu_share,
    )


def describe(runner: str, placement: Placement, blueprint: Blueprint) -> str:
    """Returns a line that says what was decided."""
    layers = ", ".join("-".join(dict.fromkeys((str(cut.start + 1), str(cut.stop)))) for cut in blueprint.stage_layers)
    stages = f"{runner}: {placement.stages} stages on {placement.device} with layers {layers}"
    if runner == "serial":
        return f"{stages}, in this process"
    share = f"{placement.stage_gpus:.2g} GPU" if placement.stage_gpus else f"{placement.stage_cpus:.2g} CPU"
    return f"{stages}, {share} each; {blueprint.negative_parts} negative actors, 1 readout"


@contextmanager
def reserve(bundles: list[dict[str, float]]) -> Iterator[Any]:
    """Holds one bundle of resources per actor as a placement group, for the length of a `with` block.

    Raises:
        ConfigError: The cluster does not have them, or has them in use, after `PLACEMENT_TIMEOUT_S`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

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
