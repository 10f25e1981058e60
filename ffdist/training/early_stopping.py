"""Early stopping: whether a run ends at a validation, before all its epochs are done."""

from ffdist.checkpoint.checkpoints import StopState
from ffdist.config.schema import Config
from ffdist.errors import ConfigError
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.runner import Pipeline
from ffdist.training.observer import Observer
from ffdist.training.prepare import Prepared
from ffdist.training.resume import Start


class EarlyStopping(Observer):
    """Ends a run at a validation: by its settings, or because a callback requested it.

    The decision depends on the validations only. So it does not depend on chunks and stages, and a run that recovers or
    is resumed makes the same one.

    Args:
        config: Configuration of the run.
        prepared: Inputs of the run.
    """

    def __init__(self, config: Config, prepared: Prepared) -> None:
        self._stop, self._schedule, self._num_epochs = config.training.stop, config.training.schedule, config.num_epochs
        self._has_validation = bool(len(prepared.dataset.labels["validation"]))
        self._num_minibatches = prepared.order.num_minibatches
        self._request: tuple[int, str] | None = None  # the first one: minibatches done, and the reason
        self._state = StopState()

    @property
    def reason(self) -> str | None:
        """Why and when the run ended; None as long as it has not, and if all its epochs are done."""
        return self._state.reason

    def state(self, step: int) -> StopState:
        """Returns the state after `step` minibatches, which is part of a checkpoint."""
        is_requested = self._request is not None and self._request[0] <= step
        return self._state.model_copy(update={"request": self._request[1] if self._request and is_requested else None})

    def on_start(self, start: Start, pipeline: Pipeline) -> None:
        """Continues from the state of a checkpoint. A request stays: the callback may not repeat it."""
        self._state = start.manifest.stop if start.manifest else StopState()
        if self._state.request is not None and self._request is None:
            self._request = start.step, self._state.request

    def on_evaluation(self, split: str, evaluation: Evaluation, step: int) -> None:
        """Decides whether the run ends at this validation."""
        if split != "validation":
            return
        error, lowest = evaluation.value(self._stop.metric), self._state.lowest_error
        is_lower = lowest is None or error < lowest
        self._state = StopState(
            lowest_error=error if is_lower else lowest,
            validations_since=0 if is_lower else self._state.validations_since + 1,
        )
        cause, epoch = self._cause(error, step), step // self._num_minibatches
        if cause and epoch < self._num_epochs:
            self._state = self._state.model_copy(update={"reason": f"{cause}, at epoch {epoch}"})

    def request(self, reason: str, step: int) -> None:
        """Requests that the run ends at the next validation after `step` minibatches, or at the one that is there.

        Raises:
            ConfigError: The run has no validation, or a greedy schedule.
        """
        if not self._has_validation:
            raise ConfigError(
                "a callback can only end a run at a validation, and this run has none; set training.validation_samples"
            )
        if self._schedule == "greedy":
            raise ConfigError("training.schedule=greedy cannot end early, because some layers would not be trained")
        self._request = self._request or (step, reason)

    def _cause(self, error: float, step: int) -> str | None:
        stop, name, num_since = self._stop, self._stop.metric.replace("_", " "), self._state.validations_since
        if self._request and self._request[0] <= step:
            return self._request[1]
        if stop.target is not None and error <= stop.target:
            return f"{name} {error:.2%}, at most {stop.target:.2%}"
        if stop.patience is not None and num_since >= stop.patience:
            return f"no lower {name} in {num_since} validations"
        return None
