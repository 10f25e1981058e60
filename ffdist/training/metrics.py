"""Metrics of a run. Those of training and evaluation do not depend on how minibatches are grouped into chunks."""

import re
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ffdist.ff.architecture import Architecture
from ffdist.ff.layers import MEASURED
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.runner import Pipeline, Trained
from ffdist.training.observer import Observer
from ffdist.training.resume import Start

MAX_CLASS_METRICS, MAX_CLASS_NAME_LENGTH = 20, 100
"""Largest number of classes whose errors are metrics, and of characters of a class in the name of a metric."""


def is_learned(metric: str) -> bool:
    """Returns whether a metric depends on no clock, so that it is the same in every run of a configuration."""
    return metric.startswith(("layer_", "readout/", "validation/", "test/"))


def average_metrics(layers: Tensor, readout: Tensor, architecture: Architecture) -> dict[str, float]:
    """Returns metrics of training by name, as means over minibatches, without those that were not measured.

    Args:
        layers: Values of each layer `[K, L, M]` in K minibatches.
        readout: Loss and error of the readout `[K, 2]`; `[K, 0]` without one.
        architecture: Of the network; it has the names of the M values.
    """
    stacked = layers.double()
    means = stacked.mean(0)
    means[:, -len(MEASURED) :] = stacked[:, :, -len(MEASURED) :].nanmean(0)  # once a point
    metrics = {
        f"layer_{layer}/{name}": value
        for layer, values in enumerate(means.tolist(), 1)
        for name, value in zip(architecture.metrics, values, strict=True)
        if name in architecture.layer_metrics[layer - 1]
        and (name not in MEASURED or value == value)  # a last, partial point has none
    }
    return metrics | dict(zip(("readout/loss", "readout/error"), readout.double().mean(0).tolist(), strict=False))


def error_metrics(split: str, evaluation: Evaluation, class_names: Sequence[str]) -> dict[str, float]:
    """Returns the errors on a split by name; those of the classes only for the test set, and if they are few.

    Args:
        split: Name of the split.
        evaluation: The errors.
        class_names: Names of the classes; may be empty.
    """
    metrics = {f"{split}/balanced_error": evaluation.balanced_error}
    for name, value in (("readout", evaluation.readout_error), ("goodness", evaluation.goodness_error)):
        if value is not None:
            metrics[f"{split}/{name}_error"] = value
    for layer, error in enumerate(evaluation.layer_errors or [], 1):
        metrics[f"{split}/layer_{layer}_error"] = error
    errors = evaluation.class_errors
    if split != "test" or len(errors) > MAX_CLASS_METRICS:
        return metrics
    names = [re.sub(r"[^\w.\- ]", "_", name)[:MAX_CLASS_NAME_LENGTH] for name in class_names]  # as MLflow accepts
    if len({name.casefold() for name in names}) < len(errors):  # without names, or equal ones
        names = [str(label) for label in range(len(errors))]
    classes = {f"test/class_{name}_error": error for name, error in zip(names, errors, strict=True)}
    return metrics | {name: error for name, error in classes.items() if error is not None}


class Metrics(Observer):
    """Logs metrics: of training as means over a fixed number of minibatches, of evaluations as they are, and of time.

    Args:
        every: Number of minibatches that a logged value averages over.
        batch_size: Number of samples in a minibatch.
        log: Gets metrics by name, and the number of samples seen.
        check: Gets the metrics of training as well.
        class_names: Names of the classes; may be empty.
    """

    def __init__(
        self,
        every: int,
        batch_size: int,
        log: Callable[[dict[str, float], int], None],
        check: Callable[[dict[str, float], int], None] = lambda metrics, samples: None,
        class_names: Sequence[str] = (),
    ) -> None:
        self._every, self._batch_size, self._log = every, batch_size, log
        self._check, self._class_names = check, class_names
        self._layers: list[Tensor] = []
        self._readout: list[Tensor] = []

    def on_start(self, start: Start, pipeline: Pipeline) -> None:
        """Continues with the values that were not averaged yet."""
        state = start.state.get("position", {})
        self._layers = list(state.get("layer_metrics", []))
        self._readout = list(state.get("readout_metrics", []))
        self._architecture = pipeline.blueprint.architecture
        self._times: list[tuple[float, float, float]] = []
        self._minibatches = 0

    def on_restore(self, step: int) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_chunk(self, trained: Trained, step: int) -> None:
        """Logs every value that the chunk completes."""
        chunk = trained.chunk
        layers = torch.cat([report.metrics for report in trained.stages], 1)
        times = [(report.compute_s, report.wait_s, report.negatives_wait_s) for report in trained.stages]
        so_far = self._times or [(0.0, 0.0, 0.0)] * len(times)
        self._times = [(a + d, b + e, c + f) for (a, b, c), (d, e, f) in zip(so_far, times, strict=True)]
        self._minibatches += chunk.num_minibatches
        for minibatch in range(chunk.num_minibatches):
            self._layers.append(layers[minibatch])
            self._readout.append(trained.readout_metrics[minibatch])
            done = chunk.step + minibatch + 1
            if done % self._every == 0:
                self._log_averages(done)

    def on_evaluation(self, split: str, evaluation: Evaluation, step: int) -> None:
        """Logs the errors."""
        self._log(error_metrics(split, evaluation, self._class_names), step * self._batch_size)

    def finish(self, step: int) -> None:
        """Logs the minibatches at the end of the run that are fewer than a logged value averages over."""
        if self._layers:
            self._log_averages(step)

    def state(self) -> dict[str, Tensor]:
        """Returns the values that are not averaged yet; times are not kept."""
        if not self._layers:
            return {}
        return {"layer_metrics": torch.stack(self._layers), "readout_metrics": torch.stack(self._readout)}

    def _log_averages(self, step: int) -> None:
        metrics = average_metrics(torch.stack(self._layers), torch.stack(self._readout), self._architecture)
        self._layers, self._readout = [], []
        self._log(metrics | self._speed(), step * self._batch_size)
        self._check(metrics, step * self._batch_size)

    def _speed(self) -> dict[str, float]:
        if not self._minibatches:  # a second point of one chunk: its times went with the first
            return {}
        now = time.perf_counter()
        metrics = {"samples_per_s": self._minibatches * self._batch_size / (now - self._since)}
        compute_s, wait_s, negatives_wait_s = self._times[0]
        metrics["negatives/wait_fraction"] = negatives_wait_s / (compute_s + wait_s)
        for stage, (compute_s, wait_s, _) in enumerate(self._times, 1):
            metrics[f"stage_{stage}/compute_s"] = compute_s
            metrics[f"stage_{stage}/wait_s"] = wait_s
            metrics[f"stage_{stage}/busy_fraction"] = compute_s / (compute_s + wait_s)
        self._times, self._since, self._minibatches = [], now, 0
        return metrics
