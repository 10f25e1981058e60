"""What a run's devices are measured for: the costs of its layers, and its precision, which is resolved once."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from ffdist import host_memory
from ffdist.config import Config, ConfigError
from ffdist.ff.negatives import NegativesError
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.costs import Costs, Sample, draw_sample, measure_costs
from ffdist.pipeline.hardware import bfloat16_speedup, device_name
from ffdist.pipeline.runner import torch_threads
from ffdist.prepare import Prepared
from ffdist.runtime.cluster import is_connected

MARGIN = 1.1
"""Speedup from which one precision counts as faster. Devices without bfloat16 units measure 0.01 to 0.5, devices with
them 2 to 15, so that runs on one machine resolve alike however busy it is."""


class Precision(NamedTuple):
    """The resolved precision of a run."""

    value: str
    reason: str = ""
    """Line for the user; empty if there is nothing to say."""


class Speed(NamedTuple):
    """What was measured on a device."""

    device: str
    bfloat16_speedup: float
    """Time in float32 divided by time in bfloat16."""


class Measured(NamedTuple):
    """What was measured on one machine."""

    speed: Speed
    costs: Costs | None
    """Of the run's parts, in the precision that this machine alone would resolve; None if nothing needs them."""

    def on(self, machine: str) -> "Measured":
        """Returns the same with the machine's name."""
        return self._replace(speed=self.speed._replace(device=f"{self.speed.device}, node {machine}"))


def is_driver_enough(config: Config, runner: str, address: str | None) -> bool:
    """Returns whether the run computes on the devices of this process; asked before the run joins a cluster.

    For a GPU that only actors use the answer is no: a process that has used a GPU holds memory of it until it ends.
    """
    return runner != "ray" or (address == "local" and not is_connected() and own_device(config) == "cpu")


def own_device(config: Config) -> str:
    """Returns the device of this process that a run would use, as torch names it."""
    return "cuda" if config.pipeline.device != "cpu" and torch.cuda.is_available() else "cpu"


def measurement(runner: str, prepared: Prepared, config: Config, device: str) -> Callable[[], Measured]:
    """Returns a function that measures a run's devices, in whatever process.

    Costs are measured if stages are balanced by them or throughput is predicted from them; the speed of precisions is
    always, because it also decides about a warning.

    Args:
        runner: That is to run the stages.
        prepared: Of the run.
        config: Of the run.
        device: Of the stages, as torch names it.

    Raises:
        ConfigError: There are no negatives.
    """
    sample = None
    needs_costs = config.pipeline.balance != "estimated" and config.training.schedule != "greedy"
    if needs_costs and runner != "backpropagation":
        try:
            sample = draw_sample(
                make_blueprint(prepared, config, [], device), prepared.dataset.images, prepared.dataset.labels["train"]
            )
        except NegativesError as error:
            raise ConfigError(f"negatives.kind={config.negatives.kind}: {error}") from error
    return partial(_measure, sample, config.training.precision, device, config.pipeline.threads_per_stage)


def make_blueprint(prepared: Prepared, config: Config, stage_layers: list[range], device: str) -> Blueprint:
    """Returns the blueprint of a run.

    Args:
        prepared: Of the run.
        config: Of the run.
        stage_layers: Layers of each stage, counted from 0.
        device: Of the stages, as torch names it.
    """
    return Blueprint(
        prepared.architecture,
        prepared.order,
        negatives=prepared.negatives,
        jitter=config.data.jitter,
        stage_layers=stage_layers,
        measure_every=config.tracking.every_minibatches,
        device=device,
    )


def _measure(sample: Sample | None, setting: str, device: str, threads: int) -> Measured:
    with torch_threads(threads):
        speed = Speed(device_name(device), bfloat16_speedup(device))
    if not sample:
        return Measured(speed, None)
    blueprint = sample.blueprint
    architecture = replace(blueprint.architecture, precision=choose(setting, [speed]).value)
    blueprint = blueprint._replace(architecture=architecture)
    if device == "cpu":
        host_memory.check(host_memory.layer_bytes(architecture), "the largest layer")
    return Measured(speed, measure_costs(sample._replace(blueprint=blueprint), threads))


def with_precision(config: Config, prepared: Prepared, precision: str) -> tuple[Config, Prepared]:
    """Returns a run of a resolved precision."""
    architecture = replace(prepared.architecture, precision=precision)
    return config.with_precision(precision), prepared._replace(architecture=architecture)


def resolve(setting: str, measured: list[Measured]) -> tuple[Precision, Costs | None]:
    """Resolves a precision, and chooses the costs that were measured in it.

    Args:
        setting: `training.precision`.
        measured: On each machine of the run.
    """
    slowest = min(measured, key=lambda each: each.speed.bfloat16_speedup)
    return choose(setting, [each.speed for each in measured]), slowest.costs


def choose(setting: str, speeds: list[Speed]) -> Precision:
    """Resolves a setting: bfloat16 if every device multiplies it faster than float32, else float32.

    Args:
        setting: `training.precision`.
        speeds: Of each device.
    """
    device, speedup = min(speeds, key=lambda speed: speed.bfloat16_speedup)
    if setting == "auto":
        value = "bfloat16" if speedup >= MARGIN else "float32"
        return Precision(value, f"precision: {value}; bfloat16 is {speedup:.2g} times as fast as float32 on {device}")
    slowdown = 1 / speedup if setting == "bfloat16" else speedup
    if slowdown < MARGIN:
        return Precision(setting)
    other = "float32" if setting == "bfloat16" else "bfloat16"
    return Precision(
        setting,
        f"warning: training.precision={setting} is {slowdown:.1f} times slower than {other} on {device}; leave it out "
        f"to train in the faster one",
    )
