"""System metrics of a cluster's other nodes during a run."""

from contextlib import suppress

from ffdist.pipeline.runner import Pipeline, Trained
from ffdist.tracking.system import SystemMonitor
from ffdist.tracking.tracker import Tracker
from ffdist.training.launch import RunnerName
from ffdist.training.observer import Observer
from ffdist.training.resume import Start


class NodeMetrics(Observer):
    """Logs the system metrics of all nodes but that of the driver, which the tracker itself measures.

    Args:
        tracker: Gets the metrics.
        runner: Runner of the stages; only `ray` uses other nodes.
        batch_size: Number of samples in a minibatch.
    """

    def __init__(self, tracker: Tracker, runner: RunnerName, batch_size: int) -> None:
        self._tracker, self._batch_size = tracker, batch_size
        self._monitor = None
        if runner == "ray" and tracker.is_on:
            from ffdist.runtime.nodes import NodeMonitor  # imports ray

            self._monitor = NodeMonitor(SystemMonitor, 0.0)

    def on_start(self, start: Start, pipeline: Pipeline) -> None:
        """Measures nodes that are new."""
        if self._monitor:
            with suppress(Exception):  # the pipeline reports what is wrong with the cluster
                self._monitor.refresh()

    def on_chunk(self, trained: Trained, step: int) -> None:
        """Logs what has arrived."""
        metrics = dict[str, float]()
        if self._monitor:
            with suppress(Exception):
                metrics = self._monitor.metrics()
        if metrics:
            self._tracker.log_metrics(metrics, step * self._batch_size)
