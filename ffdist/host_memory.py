"""Host memory: how much of it is available, and upper bounds of what a run needs."""

import sys
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from ffdist.config import ConfigError
from ffdist.ff.network import Architecture
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.schedule import EVALUATION_ROWS

FLOAT32_BYTES = torch.float32.itemsize
WORKING_VALUES = 6
"""Values of float32 for each activity of a minibatch while a layer is trained."""
PROCESS_BYTES = 350_000_000
"""Memory of an actor's process before it holds anything: torch and Ray (335 MB measured, torch 2.14 and Ray 2.60)."""
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files of a control group with its limit and its use, of versions 2 and 1."""


def available_bytes(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Returns the host memory that this process can still get, within the limits of its container or service.

    Args:
        groups: Where the kernel shows control groups.
        membership: Names those of this process.
    """
    found = int(psutil.virtual_memory().available)
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            root = groups / controllers
            group = root / name.lstrip("/")  # in a container, it may be visible as the root
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
                found = min(found, *(_left(folder, *files) for files in LIMITS))
    return max(0, found)


def _left(folder: Path, limit: str, use: str) -> int:
    try:
        most, used = int((folder / limit).read_text()), int((folder / use).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is none: "max", or no such file
        return sys.maxsize
    # Pages of files that were not used lately are given back first.
    return most - used + int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))


def check(needed: int, purpose: str) -> None:
    """Checks that memory is available.

    Raises:
        ConfigError: It is not.
    """
    available = available_bytes()
    if needed > available:
        raise ConfigError(
            f"{purpose} must fit into the available host memory (needed: {needed / 1e9:,.1f} GB, available: "
            f"{available / 1e9:,.1f} GB); make model.layers smaller, or free memory"
        )


def driver_bytes(architecture: Architecture) -> int:
    """Returns what the driver needs for a network: to resume from a commit, and to keep the network at the end.

    To resume, it holds the whole state, and the largest file of it twice. At the end, it holds the weights to predict
    with them, and again for MLflow's model.
    """
    state = architecture.state_bytes
    # The precision may still be resolved, and bfloat16 needs a copy of the weights.
    copies = max(sum(each.copy_bytes) for each in (architecture, replace(architecture, precision="bfloat16")))
    readout = architecture.classes * sum(architecture.widths[architecture.predict_from :])
    weights = FLOAT32_BYTES * (sum(architecture.weights) + readout)
    resuming = sum(state) + weights + copies  # by another run's weights, the most
    ending = 3 * weights + 2 * copies
    return max(resuming, ending) + max(state)


def layer_bytes(architecture: Architecture) -> int:
    """Returns what the largest layer needs while it is trained, without its activations."""
    state, copies, weights = architecture.state_bytes, architecture.copy_bytes, architecture.weights
    return max(
        state[layer] + 2 * copies[layer] + FLOAT32_BYTES * weights[layer] for layer in range(len(architecture.layers))
    )


def stage_bytes(blueprint: Blueprint, layers: range) -> int:
    """Returns what a stage's tensors take where it computes."""
    architecture, order, negatives = blueprint.architecture, blueprint.order, blueprint.negatives
    state, copies = architecture.state_bytes, architecture.copy_bytes
    kept = sum(state[layer] + copies[layer] for layer in layers)
    # A gradient, or the random start while a layer is built.
    gradient = max(FLOAT32_BYTES * architecture.weights[layer] + copies[layer] for layer in layers)
    rows = max(order.batch_size * (1 + negatives.per_sample + architecture.labels_shown), EVALUATION_ROWS)
    widest = max(architecture.widths[layers.start : layers.stop + 1])
    passed = 2 * blueprint.chunk_size * blueprint.bytes_out(layers)  # each minibatch, and all of them together
    return kept + gradient + rows * widest * FLOAT32_BYTES * WORKING_VALUES + passed + _source_bytes(blueprint, layers)


def _source_bytes(blueprint: Blueprint, layers: range) -> int:
    """Returns what the first stage's images take, those that are shifted with a border."""
    if layers.start:
        return 0
    (channels, height, width), border = blueprint.architecture.shape, 2 * blueprint.jitter
    sample_bytes = channels * (height + border) * (width + border) + blueprint.architecture.pixels
    # Of each sample its image, and a negative that may be one; both while they are shifted.
    return 4 * blueprint.chunk_size * blueprint.order.batch_size * sample_bytes


def machine_bytes(blueprint: Blueprint, *, stored: int | None) -> int:
    """Returns what a run needs that is wholly on this machine, beside what the driver holds already.

    Args:
        blueprint: Of the run.
        stored: Bytes in the object store; None for a run in this process.
    """
    architecture = blueprint.architecture
    state, features = architecture.state_bytes, sum(architecture.widths[architecture.predict_from :])
    stages = sum(stage_bytes(blueprint, layers) for layers in blueprint.stage_layers)
    readout = state[-1] + 3 * FLOAT32_BYTES * features * max(blueprint.order.batch_size, architecture.classes)
    writer = max(state)  # it serializes one file at a time
    resumed = sum(state)
    needed = max(stages + readout + writer + resumed + (stored or 0), driver_bytes(architecture))
    actors = 0 if stored is None else len(blueprint.stage_layers) + blueprint.negatives.num_parts + 2
    return needed + actors * PROCESS_BYTES
