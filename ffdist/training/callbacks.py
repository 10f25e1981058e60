"""Callbacks: code of the user that follows a run, logs metrics and may end the run early."""

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ffdist.config.schema import Config
from ffdist.errors import ConfigError, RunFailed
from ffdist.ff.custom import import_custom
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.runner import Pipeline, Trained
from ffdist.training.early_stopping import EarlyStopping
from ffdist.training.metrics import average_metrics, error_metrics
from ffdist.training.observer import Observer
from ffdist.training.prepare import Prepared
from ffdist.training.record import Record
from ffdist.training.resume import Start

METRIC_NAME = re.compile(r"\w[\w.\- :]*(/\w[\w.\- :]*)*")
OWN_NAMES = re.compile(r"(layer_\d+|stage_\d+|readout|negatives|validation|test|system)/|samples_per_s$|train_s$")
"""Names of metrics that MLflow accepts, and those of ffdist itself."""
MAX_NAME_LENGTH = 250


class CallbackFailed(RunFailed):
    """A callback raised an exception."""


@dataclass(frozen=True)
class ActiveRun:
    """A run in progress, as it is when a callback is called."""

    folder: Path
    """Folder of the run."""
    config: Config
    """A copy of its configuration."""
    step: int
    """Number of minibatches done."""
    epoch: int
    """Number of epochs done."""
    num_epochs: int
    """Number of epochs in all."""
    samples: int
    """Number of training samples seen."""
    _log: Callable[[dict[str, float], int], None] = field(repr=False)
    _request_stop: Callable[[str, int], None] = field(repr=False)

    def log(self, metrics: dict[str, float]) -> None:
        """Logs metrics like those of ffdist, to MLflow and `Run.metrics`. The first value at a position counts.

        Args:
            metrics: Numbers by name.

        Raises:
            ConfigError: A metric of ffdist has the name, or MLflow would refuse the name.
            TypeError: A value is not a number.
        """
        for name in metrics:
            if not METRIC_NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
                raise ConfigError(
                    f"a metric's name must be letters, digits, spaces and _ - . : /, at most {MAX_NAME_LENGTH} "
                    f"(given: {name!r})"
                )
            if OWN_NAMES.match(name):
                raise ConfigError(f"ffdist itself may log the metric {name}; choose another name, such as my/{name}")
        self._log({name: float(value) for name, value in metrics.items()}, self.samples)

    def stop(self, reason: str) -> None:
        """Ends the run at the next validation, or at the one of this call. The first request counts.

        Args:
            reason: Is printed and recorded.

        Raises:
            ConfigError: The run has no validation, or a greedy schedule; or it is called in `on_checkpoint` or
                `on_end`. The time at which a checkpoint is complete depends on the machine, and results must not.
            TypeError: The reason is not a text.
        """
        if not isinstance(reason, str) or not reason:
            raise TypeError(f"the reason must be a text that is not empty (given: {reason!r})")
        self._request_stop(reason, self.step)


class Callback:
    """Follows a run. Methods do nothing unless they are overridden.

    Methods are called in the driver, one at a time, in the order of the training; the actors continue meanwhile. They
    get copies, so that a callback can only change a run by ending it. An exception ends the run, which can be resumed.
    A run that recovers or is resumed repeats the calls since its last checkpoint.
    """

    def on_chunk(self, run: ActiveRun, metrics: dict[str, float]) -> None:
        """A chunk was trained on; `metrics` are means over its minibatches, such as `layer_1/loss`."""

    def on_evaluation(self, run: ActiveRun, split: str, errors: dict[str, float]) -> None:
        """A split was evaluated: `validation`, or at the end `test`; errors are such as `test/readout_error`."""

    def on_checkpoint(self, run: ActiveRun, path: str) -> None:
        """A checkpoint is complete in a folder or at a URI; the training has continued since it was taken."""

    def on_end(self, run: ActiveRun, summary: dict[str, Any]) -> None:
        """The run has its results, as in `Run.summary`. They are not saved yet, and the plots are not drawn."""


def callback_name(callback: Callback) -> str:
    """Returns the module and the class of a callback, as `training.callbacks` names it."""
    return f"{type(callback).__module__}:{type(callback).__qualname__}"


def load_callbacks(names: Sequence[str], callbacks: Sequence[Callback]) -> list[Callback]:
    """Returns the callbacks of a run.

    Args:
        names: Setting `training.callbacks`.
        callbacks: Further ones.

    Raises:
        ConfigError: One cannot be imported, or is not a callback.
    """
    loaded = [*callbacks]
    for name in names:
        try:
            loaded.append(import_custom(name)())
        except Exception as error:  # a custom module may raise anything
            raise ConfigError(
                f"training.callbacks: {name} must be package.module:Class, without arguments "
                f"({type(error).__name__}: {error})"
            ) from error
    for callback in loaded:
        if not isinstance(callback, Callback):
            raise ConfigError(f"a callback must be an object of a subclass of ffdist.Callback (given: {callback!r})")
    return loaded


class Callbacks(Observer):
    """Calls the callbacks of a run.

    Args:
        callbacks: The callbacks.
        config: Configuration of the run.
        prepared: Inputs of the run.
        record: Record of the run, which gets their metrics.
        stopping: Early stopping of the run, which gets their requests.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        config: Config,
        prepared: Prepared,
        record: Record,
        stopping: EarlyStopping,
    ) -> None:
        self._callbacks, self._config, self._order = callbacks, config, prepared.order
        self._class_names, self._record, self._stopping = prepared.dataset.names, record, stopping
        self._step, self._method = 0, ""

    def on_start(self, start: Start, pipeline: Pipeline) -> None:
        """Notes the architecture, which has the names of the metrics."""
        self._step, self._architecture = start.step, pipeline.blueprint.architecture

    def on_chunk(self, trained: Trained, step: int) -> None:
        """Calls `Callback.on_chunk`."""
        self._step = step
        if self._callbacks:
            layers = torch.cat([report.metrics for report in trained.stages], 1)
            metrics = average_metrics(layers, trained.readout_metrics, self._architecture)
            self._call("on_chunk", metrics)

    def on_evaluation(self, split: str, evaluation: Evaluation, step: int) -> None:
        """Calls `Callback.on_evaluation`."""
        errors = error_metrics(split, evaluation, self._class_names)
        self._call("on_evaluation", split, errors)

    def on_checkpoint(self, path: str) -> None:
        """Calls `Callback.on_checkpoint`."""
        self._call("on_checkpoint", path)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Calls `Callback.on_end`."""
        self._call("on_end", summary)

    def _request_stop(self, reason: str, step: int) -> None:
        """Requests a stop, if the method that is called may do so."""
        if self._method == "on_checkpoint":
            raise ConfigError(
                "a callback cannot end a run in on_checkpoint, because the time of this call depends on the machine; "
                "call stop in on_chunk or on_evaluation"
            )
        if self._method == "on_end":
            raise ConfigError("a callback cannot end a run in on_end, because it has ended; call stop earlier")
        self._stopping.request(reason, step)

    def _call(self, method: str, *args: Any) -> None:
        """Calls a method of all callbacks, each with copies of the arguments."""
        self._method = method
        num_minibatches, batch_size = self._order.num_minibatches, self._order.batch_size
        for callback in self._callbacks:
            run = ActiveRun(
                folder=self._record.folder,
                config=self._config.model_copy(deep=True),
                step=self._step,
                epoch=self._step // num_minibatches,
                num_epochs=self._config.num_epochs,
                samples=self._step * batch_size,
                _log=self._record.log,
                _request_stop=self._request_stop,
            )
            try:
                getattr(callback, method)(run, *deepcopy(args))
            except Exception as error:  # custom code may raise anything
                cause = f"{type(error).__name__}: {error}"
                raise CallbackFailed(f"callback {callback_name(callback)} failed in {method} ({cause})") from error
