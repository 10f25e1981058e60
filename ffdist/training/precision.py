"""Measurement of a run's devices: the costs of its layers, and the speed of bfloat16, which decides its precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from ffdist import host_memory
from ffdist.config.schema import Config
from ffdist.errors import ConfigError
from ffdist.ff.negatives import NegativesError
from ffdist.pipeline import memory
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.costs import Costs, Sample, draw_sample, measure_costs
from ffdist.pipeline.hardware import bfloat16_speedup, device_name
from ffdist.pipeline.runner import memory_kept, torch_threads
from ffdist.runtime.cluster import is_connected
from ffdist.training.prepare import Prepared

MIN_SPEEDUP = 1.5
"""Smallest speedup at which a precision counts as faster. CPUs without fast bfloat16 units measure 0.01 to 0.75, once
1.1 when busy; CPUs and GPUs with them measure 2 to 15. So all runs on a machine resolve to the same precision."""


class Precision(NamedTuple):
    """The resolved precision of a run."""

    value: str
    reason: str = ""
    """Message for the user; empty if there is none."""


class DeviceMeasurement(NamedTuple):
    """Measurements of one machine."""

    device: str
    bfloat16_speedup: float
    """Time in float32 divided by time in bfloat16."""
    costs: Costs | None = None
    """Costs of the actors, in the precision that this machine alone would resolve; None if nothing needs them."""


def is_driver_enough(config: Config, runner: str, address: str | None) -> bool:
    """Returns whether the driver can measure the devices of a run; called before it connects to a cluster.

    The driver does not measure a GPU that only actors use, because it would hold memory of the GPU until it ends.
    """
    return runner != "ray" or (address == "local" and not is_connected() and driver_device(config) == "cpu")


def driver_device(config: Config) -> str:
    """Returns the device that a run would use in the driver, as torch names it."""
    return "cuda" if config.pipeline.device != "cpu" and torch.cuda.is_available() else "cpu"


def measurement(runner: str, prepared: Prepared, config: Config, device: str) -> Callable[[], DeviceMeasurement]:
    """Returns a function that measures a run's devices in any process.

    Costs are measured only if stages are balanced by them or throughput is predicted from them. The speed of bfloat16
    is always measured, because it may cause a warning.

    Args:
        runner: Runner of the stages.
        prepared: Inputs of the run.
        config: Configuration of the run.
        device: Device of the stages, as torch names it.

    Raises:
        ConfigError: Negatives cannot be made.
    """
    sample = None
    needs_costs = config.pipeline.balance != "estimated" and config.training.schedule != "greedy"
    if needs_costs and runner != "backpropagation":
        try:
            sample = draw_sample(
                make_blueprint(prepared, config, [], device), prepared.dataset.samples, prepared.dataset.labels["train"]
            )
        except NegativesError as error:
            raise ConfigError(f"negatives.kind={config.negatives.kind}: {error}") from error
    # As in actors. A serial run is measured in its own process, which may keep memory already.
    keep: Callable[[], AbstractContextManager[None]] = memory_kept if runner == "ray" else nullcontext
    return partial(_measure, sample, config.training.precision, device, config.pipeline.threads_per_stage, keep)


def make_blueprint(prepared: Prepared, config: Config, stage_layers: list[range], device: str) -> Blueprint:
    """Returns the blueprint of a run.

    Args:
        prepared: Inputs of the run.
        config: Configuration of the run.
        stage_layers: Layers of each stage, counted from 0.
        device: Device of the stages, as torch names it.
    """
    return Blueprint(
        prepared.architecture,
        prepared.order,
        negatives=prepared.negatives,
        stage_layers=stage_layers,
        measure_every=config.tracking.log_every_minibatches,
        device=device,
    )


def _measure(
    sample: Sample | None,
    setting: str,
    device: str,
    threads: int,
    keep_memory: Callable[[], AbstractContextManager[None]],
) -> DeviceMeasurement:
    with torch_threads(threads):
        measured = DeviceMeasurement(device_name(device), bfloat16_speedup(device))
    if not sample:
        return measured
    blueprint = sample.blueprint
    architecture = replace(blueprint.architecture, precision=resolve(setting, [measured])[0].value)
    blueprint = blueprint._replace(architecture=architecture)
    if device == "cpu":
        host_memory.check(memory.layer_bytes(architecture), "the largest layer")
    with keep_memory():
        return measured._replace(costs=measure_costs(sample._replace(blueprint=blueprint), threads))


def with_precision(config: Config, prepared: Prepared, precision: str) -> tuple[Config, Prepared]:
    """Returns a configuration and its inputs with a resolved precision."""
    architecture = replace(prepared.architecture, precision=precision)
    return config.with_precision(precision), prepared._replace(architecture=architecture)


def resolve(setting: str, measured: list[DeviceMeasurement]) -> tuple[Precision, Costs | None]:
    """Resolves the precision of a run, and returns it with the costs that were measured in it.

    `auto` is bfloat16 if it is faster than float32 on every device, else float32.

    Args:
        setting: Value of `training.precision`.
        measured: Measurements of each machine of the run.
    """
    device, speedup, costs = min(measured, key=lambda each: each.bfloat16_speedup)
    if setting == "auto":
        value = "bfloat16" if speedup >= MIN_SPEEDUP else "float32"
        reason = f"precision: {value}; bfloat16 is {speedup:.2g} times as fast as float32 on {device}"
        return Precision(value, reason), costs
    slowdown = 1 / speedup if setting == "bfloat16" else speedup
    if slowdown < MIN_SPEEDUP:
        return Precision(setting), costs
    other = "float32" if setting == "bfloat16" else "bfloat16"
    reason = (
        f"warning: training.precision={setting} is {slowdown:.1f} times slower than {other} on {device}; leave it out "
        f"to use the faster precision"
    )
    return Precision(setting, reason), costs
