"""What a deeper network costs, and more stages for it: time and memory, against the work."""

from collections.abc import Callable, Mapping
from statistics import median

from ffdist.bench.pipeline import actors_memory, started
from ffdist.config import Config
from ffdist.launch import allocate, machine, measure
from ffdist.precision import resolve, with_precision
from ffdist.prepare import prepare

SIZES = ((2, 2), (4, 2), (8, 2), (16, 2), (4, 1), (4, 4))
"""Layers and stages of what is compared, the smaller first."""
ROUNDS = 2
"""Times that all sizes take their turn."""


def measure_growth(configs: Mapping[str, Config], seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    """Measures configurations over Ray, one after the other, and sets each against the one before of as many stages.

    Args:
        configs: What to train, by name.
        seconds: Length of a measured stretch.
        say: Is told what is going on.

    Returns:
        Figures by name, each after its configuration's and a slash. `ps_per_added_weight` is how much longer a sample
        takes than in the one before, for each weight more: alike in all where time grows with the work alone.
    """
    rates: dict[str, list[float]] = {name: [] for name in configs}
    weights, memory, precisions = dict[str, int](), dict[str, float](), dict[str, str]()
    with machine("ray", "local") as joined:
        resources = joined()
        for number in range(1, ROUNDS + 1):
            for name, config in configs.items():
                say(f"{name.replace('_', ' ')}, round {number} of {ROUNDS}")
                prepared = prepare(config)
                with allocate("ray", prepared, config, resources) as place:
                    setting = precisions.get(name, config.training.precision)  # the same in all rounds
                    config, prepared = with_precision(config, prepared, setting)
                    precision, costs = resolve(setting, measure(place, prepared, config))
                precisions[name] = precision.value
                config, prepared = with_precision(config, prepared, precision.value)
                weights[name] = sum(prepared.architecture.weights)
                with started(config, prepared, resources, costs) as (trainer, _):
                    rates[name].append(trainer.train(seconds).samples_per_s)
                    memory[name] = sum(unique for kind, unique, _ in actors_memory() if kind == "stage")
    found, smaller = dict[str, float](), dict[object, str]()  # by stages, the configuration before
    for name, config in configs.items():
        rate = median(rates[name])
        found[f"{name}/ray_samples_per_s"] = rate
        found[f"{name}/weights"] = weights[name]
        found[f"{name}/stages_unique_bytes"] = memory[name]
        if before := smaller.get(config.pipeline.stages):
            added = weights[name] - weights[before]
            more_s = 1 / rate - 1 / found[f"{before}/ray_samples_per_s"]
            found[f"{name}/ps_per_added_weight"] = 1e12 * more_s / added
            found[f"{name}/bytes_per_added_weight"] = (memory[name] - memory[before]) / added
        smaller[config.pipeline.stages] = name
    return found
