"""Warnings about layers that do not learn."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ffdist.config.schema import Config
from ffdist.data.order import SampleOrder

MIN_ACTIVE_FRACTION, CHANCE_ERROR = 0.01, 0.49
"""A layer has failed if fewer of its activations are not zero, or if its pairwise error is no better than chance."""
NUM_POINTS, MIN_MINIBATCHES = 2, 200
"""Number of logged points in a row at chance that are needed for a warning, and of minibatches before them, because
upper layers start late."""


class LayerWatch:
    """Warns once about each layer that does not learn.

    Args:
        config: Configuration of the run.
        order: Order of the training samples.
        warn: Gets the warning, and the same text as a tag.
    """

    def __init__(self, config: Config, order: SampleOrder, warn: Callable[..., Any]) -> None:
        self._config, self._warn = config, warn
        epoch_samples = order.num_minibatches * order.batch_size
        self._late_samples = max(epoch_samples, MIN_MINIBATCHES * order.batch_size)
        epochs = config.training.epochs if config.training.schedule == "greedy" else 0
        self._starts = [layer * epochs * epoch_samples for layer in range(len(config.model.layers))]
        self._num_at_chance = defaultdict[int, int](int)  # points in a row, by layer
        self._warned, self._last = set[int](), 0

    def check(self, metrics: dict[str, float], samples: int) -> None:
        """Checks a logged point of training metrics, after a number of samples."""
        if samples <= self._last:  # a recovery logs points again
            return
        self._last = samples
        for layer, start in enumerate(self._starts, 1):
            if layer in self._warned or samples <= start:
                continue
            if text := self._problem(layer, metrics, is_late=samples - start > self._late_samples):
                self._warned.add(layer)
                self._warn(f"warning: layer {layer} {text}", **{f"layer_{layer}_warning": text})

    def _problem(self, layer: int, metrics: dict[str, float], *, is_late: bool) -> str | None:
        learning_rate = self._config.training.learning_rate
        active = metrics.get(f"layer_{layer}/active_fraction")  # missing in a short point, and after backpropagation
        if active is not None and active < MIN_ACTIVE_FRACTION:
            return (
                f"has stopped learning: {active:.2%} of its activations are not zero; in a new run, lower "
                f"training.learning_rate ({learning_rate:g}) or increase training.peer_normalization "
                f"({self._config.training.peer_normalization:g})"
            )
        error = metrics.get(f"layer_{layer}/pairwise_error")  # other objectives have none
        is_paired = self._config.negatives.kind != "noise"  # which is not made from a sample, so 0.5 is not chance
        at_chance = error is not None and error >= CHANCE_ERROR and is_paired and is_late
        self._num_at_chance[layer] = self._num_at_chance[layer] + 1 if at_chance else 0
        if self._num_at_chance[layer] < NUM_POINTS:
            return None
        scale = f", increase data.label_scale ({self._config.data.label_scale:g})"
        return (
            f"does not learn: the goodness of negatives is not lower than that of positive samples in {error:.0%} of "
            f"the pairs, which is no better than chance; in a new run, change training.learning_rate "
            f"({learning_rate:g}){scale * (self._config.data.label != 'none')} or use other negatives "
            f"({self._config.negatives.kind})"
        )
