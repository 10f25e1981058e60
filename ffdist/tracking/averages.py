"""From reports of chunks to the metrics that are logged, the same however the minibatches were chunked."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ffdist.ff.layers import MEASURED, METRICS
from ffdist.pipeline.runner import Trained
from ffdist.pipeline.schedule import Train


def is_learned(metric: str) -> bool:
    """Says whether no clock decides a metric, so that it must be the same however a run went."""
    return metric.startswith(("layer_", "readout/", "validation/", "test/"))


class Averages:
    """Averages learning metrics over a fixed number of minibatches, and sums times beside them.

    Args:
        every: Minibatches that make a point.
        batch_size: Samples a minibatch.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        self._every, self._batch_size = every, batch_size
        self._layers: list[Tensor] = []
        self._readout: list[Tensor] = []
        self._times: list[tuple[float, float, float]] = []
        self._minibatches = 0
        self.begin()

    def begin(self) -> None:
        """Begins to count the time from now on."""
        self._since = time.perf_counter()

    def add(self, chunk: Train, trained: Trained) -> Iterator[tuple[int, dict[str, float]]]:
        """Takes the reports of a chunk in.

        Yields:
            Number of samples seen, and metrics by name, for every point that the chunk completes.
        """
        layers = torch.cat([report.metrics for report in trained.stages], 1)
        times = [(report.compute_s, report.wait_s, report.negatives_wait_s) for report in trained.stages]
        so_far = self._times or [(0.0, 0.0, 0.0)] * len(times)
        self._times = [(a + d, b + e, c + f) for (a, b, c), (d, e, f) in zip(so_far, times, strict=True)]
        self._minibatches += chunk.num_minibatches
        for minibatch in range(chunk.num_minibatches):
            self._layers.append(layers[minibatch])
            self._readout.append(trained.readout.metrics[minibatch])
            done = chunk.step + minibatch + 1
            if done % self._every == 0:
                yield done * self._batch_size, self._learning() | self._speed()

    def rest(self, step: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yields a last point for the minibatches that fill none, `step` minibatches into the run."""
        if self._layers:
            yield step * self._batch_size, self._learning() | self._speed()

    def state(self) -> dict[str, Tensor]:
        """Returns what is not averaged yet; times are not kept."""
        if not self._layers:
            return {}
        return {"layer_metrics": torch.stack(self._layers), "readout_metrics": torch.stack(self._readout)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes up where a state was taken."""
        self._layers = list(state.get("layer_metrics", []))
        self._readout = list(state.get("readout_metrics", []))

    def _learning(self) -> dict[str, float]:
        stacked = torch.stack(self._layers).double()
        layers = stacked.mean(0)
        layers[:, -len(MEASURED) :] = stacked[:, :, -len(MEASURED) :].nanmean(0)  # once a point
        readout = torch.stack(self._readout).double().mean(0)
        self._layers, self._readout = [], []
        metrics = {
            f"layer_{layer}/{name}": value
            for layer, values in enumerate(layers.tolist(), 1)
            for name, value in zip(METRICS, values, strict=True)
            if name not in MEASURED or value == value  # a last, partial point has none
        }
        return metrics | dict(zip(("readout/loss", "readout/error"), readout.tolist(), strict=True))

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
