"""A session places the pipeline of a run, starts it, and replaces it after a failure."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from ffdist.config.schema import Config
from ffdist.errors import ConfigError, RunFailed
from ffdist.pipeline.runner import Pipeline
from ffdist.runtime.cluster import Resources
from ffdist.storage.folder import Folder
from ffdist.training.launch import Allocation, PlacedPipeline, RunnerName, allocate, assign_layers, measure
from ffdist.training.precision import DeviceMeasurement, resolve, with_precision
from ffdist.training.prepare import Prepared
from ffdist.training.record import Record
from ffdist.training.recoveries import Recoveries

REPLACEMENT_TIMEOUT_S = 900.0
"""Longest wait for resources after a failure; a cloud needs minutes to start another machine."""


class Session(AbstractContextManager["Session"]):
    """Places, starts and replaces the pipeline of a run; holds its resources for the duration of a `with` block.

    Args:
        runner: `ray`, `serial` or `backpropagation`.
        resources: Returns the totals of the machine or the cluster.
        config: Configuration of the run.
        prepared: Inputs of the run.
        measured: Measurements of the devices, if they were made in this process.

    Attributes:
        config: The configuration, with the resolved precision.
        prepared: Inputs of the run.
        precision: The resolved precision.
        placed: The pipeline as it is placed now.
    """

    def __init__(
        self,
        runner: RunnerName,
        resources: Resources,
        config: Config,
        prepared: Prepared,
        measured: list[DeviceMeasurement],
    ) -> None:
        self.runner, self._resources = runner, resources
        self._reserved = ExitStack()
        with self._reserved:
            allocation = self._allocate(config, prepared)
            measured = measured or measure(allocation, prepared, config)
            self.precision, self._costs = resolve(config.training.precision, measured)
            self.config, self.prepared = with_precision(config, prepared, self.precision.value)
            self.placed: PlacedPipeline = self._assign(allocation)
            self._reserved = self._reserved.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._reserved.__exit__(*error)

    def pipelines(
        self, record: Record, recoveries: Recoveries, checkpoints: Folder, should_stop: Callable[[], bool]
    ) -> Iterator[AbstractContextManager[Pipeline]]:
        """Yields one pipeline after another, each to be started by a `with` block.

        Args:
            record: Gets a description of each pipeline.
            recoveries: Records when a pipeline was placed.
            checkpoints: Folder of the run's checkpoints.
            should_stop: Returns whether a stop was requested.
        """
        while True:
            record.say(self.placed.description, pipeline=self.placed.description, cluster=self.placed.cluster)
            record.display.status("starting the pipeline")
            yield self._started(checkpoints)
            record.display.status("waiting for resources")
            self._place_again(should_stop)
            recoveries.mark("placed")

    def _allocate(self, config: Config, prepared: Prepared) -> Allocation:
        return self._reserved.enter_context(allocate(self.runner, prepared, config, self._resources))

    def _assign(self, allocation: Allocation, *, again: bool = False) -> PlacedPipeline:
        return assign_layers(allocation, self.prepared, self.config, self._costs, again=again)

    @contextmanager
    def _started(self, checkpoints: Folder) -> Iterator[Pipeline]:
        """Starts the actors, and releases the resources at the end of the `with` block."""
        with self._reserved:
            yield self._reserved.enter_context(self.placed.start(checkpoints))

    def _place_again(self, should_stop: Callable[[], bool]) -> None:
        """Places the pipeline on the remaining resources, which a cluster may notice only after a while.

        Raises:
            RunFailed: It cannot be placed.
            KeyboardInterrupt: A stop was requested.
        """
        deadline, device = time.monotonic() + REPLACEMENT_TIMEOUT_S, self.placed.blueprint.device
        while True:
            self._reserved = ExitStack()
            try:
                placed = self._assign(self._allocate(self.config, self.prepared), again=True)
                if placed.blueprint.device == device:
                    self.placed = placed
                    return
                raise ConfigError(f"there is no {device} any more, and the last bits on another device would differ")
            except ConfigError as error:
                self._reserved.close()
                if time.monotonic() > deadline:
                    raise RunFailed(f"what was lost cannot be replaced: {error}") from error
            if should_stop():
                raise KeyboardInterrupt
            time.sleep(1)
