"""Throughput and time to an error, next to other ways to train the same network on the same cores."""

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ffdist.bench.backpropagation import SCHEDULES, start_backpropagation
from ffdist.bench.pipeline import (
    NUM_ROUNDS,
    num_cores,
    plan_backpropagation,
    start_machine,
    start_pipeline,
    summarize,
)
from ffdist.bench.plain import Progress, serve_plain
from ffdist.bench.stretch import Trainer, request, start_processes, train_on_request
from ffdist.config.schema import Config
from ffdist.errors import ConfigError
from ffdist.ff.specs import Dense
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.blueprint import Blueprint
from ffdist.training.precision import driver_device
from ffdist.training.prepare import Prepared, prepare
from ffdist.training.trainer import train

PEERS = ("plain", "backpropagation", *SCHEDULES)
"""Ways to train that a run over Ray is compared with."""


def measure_peers(config: Config, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    """Measures the throughput of a configuration over Ray, and that of its peers, in interleaved rounds.

    Args:
        config: Configuration to train, with dense layers and `data.label` of `overwrite`, on a CPU.
        seconds: Duration of each measurement.
        say: Gets a text about the progress.

    Returns:
        Samples per second and ratios by name: medians over the rounds, the lowest and the highest.

    Raises:
        ConfigError: The configuration cannot be trained or compared.
    """
    prepared = prepare(config)
    num_units = _num_units(config, prepared)
    with start_machine(config, prepared, say) as (config, prepared, resources, costs):
        samples, labels = prepared.dataset.samples, prepared.dataset.labels
        with start_pipeline(config, prepared, resources, costs) as (trainer, placed):
            plan = plan_backpropagation(config, prepared, placed.blueprint.stage_layers, costs)
            single = placed.blueprint._replace(architecture=plan.architecture, max_in_flight=1)
            with (
                start_processes(serve_plain, [(num_units, prepared, num_cores())]) as loop,
                start_processes(_serve_backpropagation, [(single, samples, labels["train"])]) as process,
                start_backpropagation(plan, samples, labels["train"]) as measure,
            ):
                rounds = []
                for number in range(1, NUM_ROUNDS + 1):
                    say(f"round {number} of {NUM_ROUNDS}")
                    rates = {
                        "ray": trainer.train(seconds).samples_per_s,
                        "plain": request(loop, (seconds, None))[0],
                        "backpropagation": request(process, (num_cores(), seconds))[0],
                        **{name: measure(name, seconds)[0] for name in SCHEDULES},
                    }
                    ratios = {f"ray_over_{name}": rates["ray"] / rates[name] for name in PEERS}
                    rounds.append({f"{name}_samples_per_s": rate for name, rate in rates.items()} | ratios)
    return summarize(rounds)


def measure_times_to_error(
    config: Config, error: float, minutes: float, say: Callable[[str], None], *, runs: Path, name: str
) -> dict[str, float]:
    """Measures the time to a test error over Ray, by the plain loop and by backpropagation, one after the other.

    Over Ray and by backpropagation, it trains for all epochs, because the learning rates depend on their number. The
    plain loop ends at the first epoch after which its test error is low enough.

    Args:
        config: As in `measure_peers`.
        error: Test error to reach, in [0, 1].
        minutes: Limit of the plain loop.
        say: Gets a text about the progress.
        runs: Runs folder.
        name: Prefix of the names of runs.

    Returns:
        Seconds, and test errors at the end, by peer and name. The seconds of runs include their start and evaluation,
        those of the plain loop only its training.

    Raises:
        ConfigError: The configuration cannot be trained or compared.
    """
    prepared = prepare(config)
    num_units = _num_units(config, prepared)
    times = {}
    start = time.monotonic()
    summary = train(config, runs=runs, name=name).summary
    times["ray"] = Progress(time.monotonic() - start, summary["test_goodness_error"])
    start = time.monotonic()
    summary = train(config.by_backpropagation(), runner="backpropagation", runs=runs, name=name).summary
    times["backpropagation"] = Progress(time.monotonic() - start, summary["test_readout_error"])
    say(f"plain loop, up to {minutes:g} minutes")
    with start_processes(serve_plain, [(num_units, prepared, num_cores())]) as loop:
        times["plain"] = Progress(*request(loop, (60 * minutes, error))[0])
    return {
        f"{peer}/{figure}": value for peer, progress in times.items() for figure, value in progress._asdict().items()
    }


def _num_units(config: Config, prepared: Prepared) -> list[int]:
    """Returns the number of units of each layer.

    Raises:
        ConfigError: The plain loop cannot train such a network.
    """
    layers = [layer for layer in config.model.layers if isinstance(layer, Dense)]
    if len(layers) < len(config.model.layers) or prepared.dataset.encoder.label != "overwrite":
        raise ConfigError(
            "bench peers compares dense layers on images whose first pixels show the label; choose a configuration of "
            "dense layers with data.label=overwrite, such as mnist"
        )
    if driver_device(config) != "cpu":
        raise ConfigError("bench peers measures on CPUs; set pipeline.device=cpu")
    return [layer.units for layer in layers]


def _serve_backpropagation(
    blueprint: Blueprint, samples: dict[str, Tensor], labels: Tensor
) -> Callable[[tuple[int, float]], float]:
    """Does what `serve_copy` does, by backpropagation."""
    return train_on_request(Trainer(Backpropagation(blueprint, samples, labels, None)))
