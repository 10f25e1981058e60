"""Time and memory of networks with more layers and more stages, relative to the number of weights."""

from collections.abc import Callable, Mapping
from statistics import median

from ffdist.bench.pipeline import read_actor_memory, start_pipeline
from ffdist.config.schema import Config
from ffdist.training.launch import allocate, machine, measure
from ffdist.training.precision import resolve, with_precision
from ffdist.training.prepare import prepare

SIZES = ((2, 2), (4, 2), (8, 2), (16, 2), (4, 1), (4, 4))
"""Numbers of layers and stages that are compared; for each number of stages, smaller networks come first."""
NUM_ROUNDS = 2
"""Number of measurements of each size; rounds over all sizes are interleaved."""


def measure_growth(configs: Mapping[str, Config], seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    """Measures configurations over Ray, and compares each with the previous one that has as many stages.

    Args:
        configs: Configurations to train, by name.
        seconds: Duration of each measurement.
        say: Gets a text about the progress.

    Returns:
        Figures by `configuration/figure`. `ps_per_added_parameter` is the additional time per sample divided by the
        number of additional parameters; it is the same for all sizes if the overhead does not grow with the network.
    """
    rates: dict[str, list[float]] = {name: [] for name in configs}
    num_parameters, memory, precisions = dict[str, int](), dict[str, float](), dict[str, str]()
    with machine("ray", "local") as wait_for_ray:
        resources = wait_for_ray()
        for number in range(1, NUM_ROUNDS + 1):
            for name, config in configs.items():
                say(f"{name.replace('_', ' ')}, round {number} of {NUM_ROUNDS}")
                prepared = prepare(config)
                with allocate("ray", prepared, config, resources) as allocation:
                    if name in precisions:  # the same in all rounds
                        config, prepared = with_precision(config, prepared, precisions[name])
                    precision, costs = resolve(config.training.precision, measure(allocation, prepared, config))
                precisions[name] = precision.value
                config, prepared = with_precision(config, prepared, precision.value)
                num_parameters[name] = sum(prepared.architecture.num_parameters)
                with start_pipeline(config, prepared, resources, costs) as (trainer, _):
                    rates[name].append(trainer.train(seconds).samples_per_s)
                    memory[name] = sum(unique for kind, unique, _ in read_actor_memory() if kind == "stage")
    figures, previous = dict[str, float](), dict[object, str]()  # by stages, the previous configuration
    for name, config in configs.items():
        rate = median(rates[name])
        figures[f"{name}/ray_samples_per_s"] = rate
        figures[f"{name}/parameters"] = num_parameters[name]
        figures[f"{name}/stages_unique_bytes"] = memory[name]
        if before := previous.get(config.pipeline.stages):
            added = num_parameters[name] - num_parameters[before]
            added_s = 1 / rate - 1 / figures[f"{before}/ray_samples_per_s"]
            figures[f"{name}/ps_per_added_parameter"] = 1e12 * added_s / added
            figures[f"{name}/bytes_per_added_parameter"] = (memory[name] - memory[before]) / added
        previous[config.pipeline.stages] = name
    return figures
