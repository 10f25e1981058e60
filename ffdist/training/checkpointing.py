"""Checkpoints during a run: when one is due, its completion, and retention."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.checkpoint.checkpoints import CheckpointError, Checkpoints, DamagedCheckpoint, WriteResult, checkpoint_name
from ffdist.config.schema import Config
from ffdist.errors import ActorLost, RunFailed
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.runner import Pipeline, SnapshotTaken
from ffdist.pipeline.schedule import Snapshot
from ffdist.training.early_stopping import EarlyStopping
from ffdist.training.metrics import Metrics
from ffdist.training.observer import Observer
from ffdist.training.prepare import Prepared
from ffdist.training.provenance import algorithm_of
from ffdist.training.resume import Start

MIN_WRITE_BYTES_PER_S = 5e6
"""The checkpoint writer counts as stuck if it is slower than this by more than `pipeline.stall_timeout_s`."""
POLL_S = 0.01
MAX_SKIPPED = 3
"""Number of checkpoints in a row that remote storage may fail to take before the run stops."""


class Best(NamedTuple):
    """The best checkpoint on validation."""

    error: float
    name: str


class _Pending(NamedTuple):
    """A checkpoint that is being written, with what the driver knew when its state was taken."""

    snapshot: Snapshot
    written: Callable[[bool], WriteResult | None]
    position: dict[str, Tensor]
    facts: dict[str, Any]
    best_before: Best | None
    """The best checkpoint without this one."""


class Checkpointer(Observer):
    """Takes the checkpoints of a run.

    Args:
        config: Configuration of the run.
        prepared: Inputs of the run.
        checkpoints: Where they are kept.
        metrics: Metrics of the run; those that are not averaged yet are part of a checkpoint.
        stopping: Early stopping of the run, whose state is part of a checkpoint.
        run_id: MLflow's id of the run.
        provenance: What the weights depend on besides configuration, algorithm and hardware, by name.
        say: Prints a line.
        on_best: Called with `checkpoints` and the name of each new best checkpoint, once it is complete.
    """

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        checkpoints: Checkpoints,
        metrics: Metrics,
        stopping: EarlyStopping,
        *,
        run_id: str,
        provenance: dict[str, str],
        say: Callable[[str], None],
        on_best: Callable[[Checkpoints, str], None] = lambda checkpoints, name: None,
    ) -> None:
        self._config, self._architecture, self.checkpoints = config, prepared.architecture, checkpoints
        self._metrics, self._stopping, self._provenance = metrics, stopping, provenance
        self._say, self._on_best = say, on_best
        validation_samples = len(prepared.dataset.labels["validation"])
        self._facts: dict[str, Any] = {
            "config": config.model_dump(mode="json"),
            "dataset_sha256": prepared.dataset.sha256("train"),
            "test_dataset_sha256": prepared.dataset.sha256("test"),
            "validation_dataset_sha256": prepared.dataset.sha256("validation") if validation_samples else None,
            "mlflow_run_id": run_id,
        }
        self.last = ""
        """Name of the newest checkpoint; empty if there is none."""
        self.best: Best | None = None

    def begin(self, start: Start) -> None:
        """Begins an attempt to run, before its pipeline is started."""
        self._start, self.last, self.best = start, "", None
        if manifest := start.manifest:
            self.last = checkpoint_name(start.position)
            if manifest.best_checkpoint is not None and manifest.best_error is not None:
                self.best = Best(manifest.best_error, manifest.best_checkpoint)
        self._taken_step, self._taken_at = start.step, time.monotonic()
        self._pending: _Pending | None = None
        self._validated: tuple[int, float] | None = None  # step and error of the last validation
        self._skipped = 0  # in a row
        self._unwritten = 0  # snapshots that were submitted and are not written yet

    def on_start(self, start: Start, pipeline: Pipeline) -> None:
        """Notes the hardware, which checkpoints record."""
        algorithm = algorithm_of(self._architecture)
        self._facts["provenance"] = {"algorithm": algorithm, **self._provenance, **pipeline.hardware}

    def on_restore(self, step: int) -> None:
        """Frees the state that the run started from, if there is a checkpoint to recover from."""
        if self.last:
            self._start.state.clear()

    def on_evaluation(self, split: str, evaluation: Evaluation, step: int) -> None:
        """Remembers the validation error, which decides whether the next checkpoint is the best."""
        if split == "validation":
            self._validated = step, evaluation.value(self._config.training.stop.metric)

    @property
    def reported(self) -> str:
        """Name of the checkpoint that the run's results belong to: the best one if it was validated, else the last."""
        return self.best.name if self.best else self.last

    @property
    def kept(self) -> str:
        """Says which checkpoint a run that has to stop can be resumed from."""
        if not self.last:
            return "there is no checkpoint yet"
        return f"its last good checkpoint is {self.checkpoints.path(self.last)}"

    def is_due(self, step: int) -> bool:
        """Returns whether a checkpoint is due after `step` minibatches."""
        checkpoint = self._config.checkpoint
        every = checkpoint.every_minibatches
        by_steps = every is not None and step // every > self._taken_step // every
        by_time = checkpoint.every_s is not None and time.monotonic() - self._taken_at >= checkpoint.every_s
        return (by_steps or by_time) and not self._unwritten  # a slow disk would fill the memory

    def on_submit(self, snapshot: Snapshot) -> None:
        """Notes that a snapshot is submitted."""
        self._taken_step, self._taken_at = snapshot.step, time.monotonic()
        self._unwritten += 1

    def on_snapshot(self, taken: SnapshotTaken, train_s: float) -> None:
        """Begins a checkpoint whose state was taken, after the one before; `train_s` is the training time so far."""
        assert self._pending is None, "the checkpoint before must be completed first"
        snapshot = taken.snapshot
        name, error, best_before = checkpoint_name(snapshot.position), None, self.best
        if self._validated and self._validated[0] == snapshot.step and snapshot.position.minibatch == 0:
            error = self._validated[1]
            if self.best is None or error < self.best.error:
                self.best = Best(error, name)
        facts = {
            **self._facts,
            **snapshot.position._asdict(),
            "step": snapshot.step,
            "train_s": train_s,
            "validation_error": error,
            "best_checkpoint": self.best.name if self.best else None,
            "best_error": self.best.error if self.best else None,
            "stop": self._stopping.state(snapshot.step),
        }
        position = {key: torch.tensor(value) for key, value in snapshot.position._asdict().items()}
        self._pending = _Pending(snapshot, taken.written, position | self._metrics.state(), facts, best_before)

    def complete(self, *, wait: bool, required: bool = False) -> str | None:
        """Completes the pending checkpoint if its files are written. All updates before it were found finite.

        Args:
            wait: Whether to wait for the files.
            required: Whether the run stops if it cannot be completed. Otherwise remote storage may fail a few times.

        Returns:
            The path of the checkpoint; None if none was completed.

        Raises:
            RunFailed: A number of it is not finite, or it cannot be written.
        """
        if self._pending is None:
            return None
        limit_s = sum(self._architecture.state_bytes) / MIN_WRITE_BYTES_PER_S
        limit_s += 0 if wait else self._config.pipeline.stall_timeout_s
        while (written := self._pending.written(time.monotonic() - self._taken_at > limit_s)) is None:
            if not wait:
                return None
            time.sleep(POLL_S)
        pending, self._pending = self._pending, None
        self._unwritten -= 1
        if written.not_finite:
            raise RunFailed(
                f"{written.not_finite} is not finite after {pending.snapshot.step} minibatches; the run stopped, and "
                f"{self.kept}; lower training.learning_rate in a new run"
            )
        if not self._publish(pending, written, required=required):
            return None
        self._remove_old()
        return self.checkpoints.path(self.last)

    def restart(self, start: Start, lost: ActorLost) -> Start:
        """Reports a failure, and returns where the run continues: at the last checkpoint, or where it started.

        A newer checkpoint than the last one that was used or taken may exist, if it is damaged and was skipped.

        Raises:
            RunFailed: The checkpoint cannot be read.
        """
        self._say(f"{lost}; {self.kept}")
        if not self.last:
            return start
        try:
            manifest, state = self.checkpoints.read(self.last)
            return Start(state, manifest)
        except CheckpointError as error:
            fix = "; resume it with --skip-damaged" if isinstance(error, DamagedCheckpoint) else ""
            raise RunFailed(f"{lost}, and the run cannot continue: {error}{fix}") from error

    def restore_reported(self, pipeline: Pipeline, *, is_ahead: bool) -> None:
        """Restores the checkpoint that the results belong to: the best one, or the last one if that is damaged.

        Args:
            pipeline: Pipeline of the run.
            is_ahead: Whether its actors may have trained further than to the last checkpoint.
        """
        if self.best and (is_ahead or self.best.name != self.last):
            try:
                pipeline.restore(self.checkpoints.read(self.best.name)[1])
                return
            except DamagedCheckpoint as error:
                self._say(f"warning: {error}; the figures are those of the last checkpoint instead of the best")
                self.best = None
        if is_ahead:
            pipeline.restore(self.checkpoints.read(self.last)[1])

    def _publish(self, pending: _Pending, written: WriteResult, *, required: bool) -> bool:
        """Writes the manifest of a checkpoint, which makes it visible; returns whether that succeeded."""
        name = checkpoint_name(pending.snapshot.position)
        try:
            if written.error:
                raise CheckpointError(written.error)
            self.checkpoints.finish(name, written, pending.position, **pending.facts)
        except CheckpointError as error:
            self._skipped += 1
            if required or not self.checkpoints.folder.is_remote or self._skipped > MAX_SKIPPED:
                raise
            self.best = pending.best_before
            self._say(f"checkpoint {name} was skipped: {error}; the run continues, and {self.kept}")
            return False
        self.last, self._skipped = name, 0
        self._start.state.clear()
        if self.best and self.best.name == name:
            self._on_best(self.checkpoints, name)
        return True

    def _remove_old(self) -> None:
        keep, best = self._config.checkpoint.keep_last, self.best.name if self.best else None
        try:
            self.checkpoints.prune(self.last, keep=keep, spare=best)
        except CheckpointError as error:  # the checkpoint itself is complete
            self._say(f"old checkpoints were not removed: {error}")
