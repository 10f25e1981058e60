"""The plan of a run on this machine, before it starts: stages, memory and time."""

from datetime import timedelta
from pathlib import Path

from ffdist.config.schema import Config
from ffdist.runtime.cluster import machine_resources
from ffdist.runtime.placement import decide
from ffdist.tracking.sinks import check_packages
from ffdist.training.callbacks import load_callbacks
from ffdist.training.launch import Allocation, RunnerName, assign_layers, measure
from ffdist.training.precision import resolve, with_precision
from ffdist.training.prepare import prepare
from ffdist.training.resume import start_from_weights


def plan(
    config: Config, runner: RunnerName, *, init_from: Path | None = None, checkpoint: str | None = None
) -> dict[str, str]:
    """Checks a configuration and its data, measures its layers, and returns the plan of a run, as texts by title.

    Ray is not started, and nothing is written.

    Args:
        config: Configuration of the run.
        runner: Runner of the stages.
        init_from: Run whose weights are the initial weights, if any.
        checkpoint: Its checkpoint; see `train`.

    Raises:
        ConfigError: A setting or an input is invalid, or there is not enough memory.
    """
    load_callbacks(config.training.callbacks, ())
    check_packages(config.tracking.also)
    prepared = prepare(config)
    if init_from is not None:
        start_from_weights(config, prepared.architecture, init_from, checkpoint)
    totals = machine_resources(config.pipeline.device)
    num_actors = prepared.negatives.num_actors
    placement = decide(config.pipeline, layers=len(config.model.layers), negative_actors=num_actors, resources=totals)
    allocation = Allocation(runner, totals, placement, None)
    precision, costs = resolve(config.training.precision, measure(allocation, prepared, config))
    config, prepared = with_precision(config, prepared, precision.value)
    placed = assign_layers(allocation, prepared, config, costs)
    architecture, order = prepared.architecture, prepared.order
    samples, predicted = config.num_epochs * order.num_minibatches * order.batch_size, placed.predicted_samples_per_s
    plan = {
        "data": prepared.dataset.describe(),
        "network": f"{'-'.join(map(str, config.model.layers))}; {sum(architecture.num_parameters):,} parameters",
        "pipeline": placed.description,
        "precision": precision.reason.removeprefix("precision: ") or precision.value,
        "checkpoint": f"{sum(architecture.state_bytes) / 1e6:,.1f} MB",
    }
    if predicted:
        duration = timedelta(seconds=round(samples / predicted))
        epochs = f"{config.num_epochs} epochs of {samples // config.num_epochs:,} samples"
        plan["training"] = f"{epochs}, about {duration} without start and evaluation"
    return plan
