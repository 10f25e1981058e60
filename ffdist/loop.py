"""The loop of a run: feeds the schedule to a pipeline, takes its results in, in order, and commits what is good."""

import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.checkpoint import PARAMETERS, CommitError, Commits, DamagedCommit, Written, commit_name, weights_sha256
from ffdist.config import Config, RunFailed
from ffdist.evaluation import Evaluation, evaluate
from ffdist.failures import as_warning
from ffdist.ff.layers import MEASURED, METRICS
from ffdist.ff.negatives import NegativesError
from ffdist.ff.network import Network
from ffdist.launch import Pipeline
from ffdist.pipeline.hardware import Hardware
from ffdist.pipeline.runner import Evaluated, Trained
from ffdist.pipeline.schedule import Evaluate, Order, Position, Snapshot, Train, evaluation, evaluation_block, schedule
from ffdist.prepare import Prepared
from ffdist.start import Start, network_of
from ffdist.tracking.averages import Averages
from ffdist.tracking.progress import Display
from ffdist.tracking.timeline import Timeline
from ffdist.tracking.tracker import Tracker

SLOWEST_WRITE = 5e6
"""Bytes per second that the writer of checkpoints must reach before `pipeline.stall_timeout_s` begins to count."""
POLL_S = 0.01
MAX_SKIPPED = 3
"""Checkpoints in a row that remote storage may fail to take before the run stops."""
ALWAYS_MEASURED = [METRICS.index(name) for name in METRICS if name not in MEASURED]


class _Cut(NamedTuple):
    """A commit under way: what the driver knew where the states were taken."""

    snapshot: Snapshot
    written: Callable[[bool], Written | None]
    position: dict[str, Tensor]
    facts: dict[str, Any]
    best_before: tuple[float, str] | None
    """Error and name of the best commit without this one."""


class Loop:
    """One run of a configuration, from where it starts.

    Args:
        config: What to train.
        prepared: What that asks for.
        commits: Of the run.
        start: Where it starts.
        tracker: Gets every metric.
        display: Shows how far it is.
        note_hardware: Gets the hardware of the parts when they have started; returns what checkpoints record of it.
        mark: Is told what was reached, and after how many minibatches.
    """

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        commits: Commits,
        start: Start,
        tracker: Tracker,
        display: Display,
        note_hardware: Callable[[dict[str, Hardware]], dict[str, Any]],
        mark: Callable[[str, int], None],
    ) -> None:
        self._config, self._dataset, self._order = config, prepared.dataset, prepared.order
        self._commits, self._start, self._tracker, self._display = commits, start, tracker, display
        self._block, self._mark = evaluation_block(prepared.architecture), mark
        self._note_hardware = note_hardware
        self._same: dict[str, Any] = {
            "config": config.model_dump(mode="json"),
            "dataset_sha256": prepared.dataset.sha256("train"),
            "test_dataset_sha256": prepared.dataset.sha256("test"),
        }
        self._architecture, self._timeline = prepared.architecture, Timeline()
        self._averages = Averages(config.tracking.every_minibatches, self._order.batch_size)
        self._test: Evaluation | None = None
        self._validated: tuple[int, float] | None = None  # the last validation's step and error
        self._to_draw: deque[tuple[Evaluation, Tensor, str]] = deque(maxlen=1)  # the newest validation
        self._network: Network | None = None  # what the run came to
        self._cut: _Cut | None = None
        self._skipped = 0  # checkpoints, since the newest one
        self._unwritten = 0  # snapshots submitted and not yet written
        self._train_s = 0.0
        self.step = 0
        """Minibatches done."""
        self.last = ""
        """The newest commit that it started from or made."""
        self._best: tuple[float, str] | None = None
        if manifest := start.manifest:
            self.step, self._train_s, self.last = manifest.step, manifest.train_s, commit_name(start.position)
            if manifest.best_commit is not None and manifest.best_error is not None:
                self._best = manifest.best_error, manifest.best_commit
            self._averages.restore(start.state["position"])
        self._cut_step, self._cut_at = self.step, time.monotonic()
        self.stopped = False
        """Whether the run ended because it was asked to."""

    def run(self, pipeline: Pipeline, asked_to_stop: Callable[[], bool]) -> None:
        """Runs the schedule to its end, or until it is asked to stop.

        Raises:
            PartLost: The pipeline lost a part.
            RunFailed: A number is not finite, and nothing later than it is committed; or something cannot be written.
            NegativesError: There are no more negatives.
        """
        try:
            self._run(pipeline, asked_to_stop)
        except (CommitError, OSError, sqlite3.Error) as error:  # a disk is full or gone
            raise RunFailed(f"{error}; the run stopped, and {self.kept}") from error
        except NegativesError as error:
            raise NegativesError(f"{error}; the run stopped, and {self.kept}") from error

    def _run(self, pipeline: Pipeline, asked_to_stop: Callable[[], bool]) -> None:
        self._mark("started", self.step)
        self._same["made_with"] = self._note_hardware(pipeline.hardware)
        if self._start.state:
            pipeline.restore(self._start.state)
            self._release_state()
        self._mark("restored", self.step)
        self._averages.begin()
        size = pipeline.blueprint.chunk_size
        orders = self._count_snapshots(self._orders(self._schedule(size), asked_to_stop))
        self._take(pipeline.run(orders, self._schedule(size)))
        if len(self._dataset.labels["validation"]) and not self.stopped:
            self._test_best(pipeline, asked_to_stop)

    def _test_best(self, pipeline: Pipeline, asked_to_stop: Callable[[], bool]) -> None:
        """Evaluates the best checkpoint on the test set."""
        try:
            if self.checkpoint != self.last:
                pipeline.restore(self._commits.read(self.checkpoint)[1])
        except DamagedCommit as error:
            self._display.say(f"warning: {error}; the figures are those of the last checkpoint instead of the best")
            self._best = None

        def orders() -> Iterator[Order]:
            for order in evaluation("test", len(self._dataset.labels["test"]), self._block):
                self.stopped = self.stopped or asked_to_stop()
                if self.stopped:
                    return
                yield order

        self._take(pipeline.run(orders(), ()))

    def _take(self, results: Iterator[tuple[Order, Any]]) -> None:
        """Takes in results, in order."""
        blocks: list[Evaluated] = []
        since, before_s = time.perf_counter(), self._train_s
        for order, result in results:
            if isinstance(order, Train) and isinstance(result, Trained):
                self._check_finite(order, result)
                self.step = order.step + order.num_minibatches
                self._mark("chunk", self.step)
                self._train_s = before_s + time.perf_counter() - since
                self._display.update(self.step)
                self._timeline.add(result)
                for samples, metrics in self._averages.add(order, result):
                    self._log(metrics, samples)
            elif isinstance(order, Evaluate) and isinstance(result, Evaluated):
                self._display.doing(f"evaluating, {order.split}")
                blocks.append(result)
                if order.last:
                    self._evaluate(order.split, blocks)
                    blocks = []
            elif isinstance(order, Snapshot) and callable(result):
                self._begin_commit(order, result)
            self._finish_commit(wait=False)
        self._finish_commit(wait=True, required=True)

    @property
    def samples(self) -> int:
        """Samples seen."""
        return self.step * self._order.batch_size

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint that the figures belong to: the best one if the run was validated, else the last."""
        return self._best[1] if self._best else self.last

    @property
    def kept(self) -> str:
        """Says what a run that has to stop can go on from."""
        return f"its last good commit is {self._commits.path(self.last)}" if self.last else "there is no commit yet"

    def figures(self) -> dict[str, Any]:
        """Returns the figures that the run ends with."""
        for samples, metrics in self._averages.rest(self.step):
            self._log(metrics, samples)
        test, (_, state) = self._test, self._commits.read(self.checkpoint, PARAMETERS)
        assert test, "the run ends with it"
        self._network = network_of(self._architecture, state)
        return {
            "weights_sha256": weights_sha256(state),
            "shape": list(self._dataset.shape),
            "classes": self._dataset.classes,
            "class_names": list(self._dataset.names),
            "untrained_classes": list(self._dataset.untrained),
            "data": self._dataset.facts,
            "test_goodness_error": test.goodness_error,
            "test_readout_error": test.readout_error,
            "test_fitted_readout_error": None,
            "layer_errors": test.layer_errors,
            "samples_per_s": self.samples / self._train_s,
            "train_s": self._train_s,
            "checkpoint": self.checkpoint,
            "best_commit": self._commits.path(self._best[1]) if self._best else None,
        }

    def illustrate(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Draws the run's plots, and queues them and its network for upload, once `figures` has been called."""
        test, network, dataset, tracker = self._test, self._network, self._dataset, self._tracker
        assert test, "the run ends with it"
        assert network, "figures come first"
        artifacts = self._config.tracking.artifacts
        if "model" in artifacts:
            with as_warning(warn, "the model could not be kept"):
                tracker.log_model(network, dataset.names, dataset.images["test"][0], self._config.tracking.register)
        if self._timeline.spans:
            with as_warning(warn, "the timeline could not be written"):
                tracker.log_artifact(self._timeline.write(folder))
        if "plots" not in artifacts:
            return
        from ffdist.pictures import draw_pictures  # matplotlib has had time until now

        history, spans = tracker.history(), self._timeline.spans
        for picture in draw_pictures(folder, self._config, dataset, network, test, history, spans, warn):
            tracker.log_artifact(picture)

    def _schedule(self, chunk_size: int) -> Iterator[Order]:
        config, validation_samples = self._config, len(self._dataset.labels["validation"])
        return schedule(
            epochs=config.training.epochs,
            minibatches=self._order.minibatches,
            chunk_size=chunk_size,
            greedy_layers=len(config.model.layers) if config.training.schedule == "greedy" else None,
            validation_samples=validation_samples,
            test_samples=0 if validation_samples else len(self._dataset.labels["test"]),  # else of the best checkpoint
            evaluate_every=config.training.evaluate_every,
            evaluation_block=self._block,
            start=self._start.position,
        )

    def _orders(self, schedule: Iterator[Order], asked_to_stop: Callable[[], bool]) -> Iterator[Order]:
        """Yields the schedule, and a snapshot wherever a commit is due or the run is to stop."""
        at = self._start.position
        kept = at if self._start.manifest else None
        for order in schedule:
            if asked_to_stop():
                self.stopped = True
                if at != kept:
                    yield self._snapshot(at)
                return
            if isinstance(order, Train) and at != kept and self._is_due(self._snapshot(at).step):
                kept = at
                yield self._snapshot(at)
            yield order
            if isinstance(order, Snapshot):
                at = kept = order.position
                self._cut_step, self._cut_at = order.step, time.monotonic()
            elif isinstance(order, Train):
                at = Position(order.epoch, order.first + order.num_minibatches)

    def _release_state(self) -> None:
        """Frees the state that the run started from, once a commit is there to recover from."""
        if self.last:
            self._start.state.clear()

    def _count_snapshots(self, orders: Iterator[Order]) -> Iterator[Order]:
        for order in orders:
            self._unwritten += isinstance(order, Snapshot)
            yield order

    def _snapshot(self, at: Position) -> Snapshot:
        return Snapshot(at, at.epoch * self._order.minibatches + at.minibatch)

    def _is_due(self, step: int) -> bool:
        """Says whether a commit is due after a chunk, and if so, notes that it is taken."""
        checkpoint, now = self._config.checkpoint, time.monotonic()
        every = checkpoint.every_minibatches
        by_steps = every is not None and step // every > self._cut_step // every
        by_time = checkpoint.every_s is not None and now - self._cut_at >= checkpoint.every_s
        due = (by_steps or by_time) and not self._unwritten  # a slow disk would fill the memory
        if due:
            self._cut_step, self._cut_at = step, now
        return due

    def _check_finite(self, chunk: Train, trained: Trained) -> None:
        layers = torch.cat([report.metrics for report in trained.stages], 1)[:, :, ALWAYS_MEASURED]
        finite = torch.cat((layers.isfinite().all(2), trained.readout.metrics.isfinite().all(1, keepdim=True)), 1)
        if not finite.all():
            self._finish_commit(wait=True)  # what was cut before it is good
            minibatch, part = (~finite).nonzero()[0].tolist()
            where = "the readout" if part == layers.shape[1] else f"layer {part + 1}"
            raise RunFailed(
                f"a number in {where} is not finite at minibatch {chunk.first + minibatch} of epoch {chunk.epoch} "
                f"(counted from 0); the run stopped, and {self.kept}; lower training.learning_rate in a new run"
            )

    def _log(self, metrics: dict[str, float], samples: int) -> None:
        self._tracker.log_metrics(metrics, samples)
        self._display.update(self.step, metrics)

    def _evaluate(self, split: str, blocks: list[Evaluated]) -> None:
        labels, classes = self._dataset.labels[split], self._dataset.classes
        found = evaluate(blocks, labels, classes=classes, predict_from=self._config.predict_from)
        metrics = {f"{split}/readout_error": found.readout_error}
        if found.goodness_error is not None:
            metrics[f"{split}/goodness_error"] = found.goodness_error
        metrics |= {f"{split}/layer_{layer}_error": value for layer, value in enumerate(found.layer_errors or [], 1)}
        self._log(metrics, self.samples)
        if split == "test":
            self._test = found
            return
        self._validated, epoch = (self.step, found.chief_error), self.step // self._order.minibatches
        self._display.say(f"epoch {epoch}: validation error {found.in_words()}")
        if found.goodness_error is not None and "plots" in self._config.tracking.artifacts:
            self._to_draw.append((found, labels, f"epoch_{epoch:04}"))
            self._tracker.draw(self._draw_validation)

    def _draw_validation(self, folder: Path) -> Path | None:
        from ffdist.pictures import draw_goodness  # of matplotlib, beside the training

        try:
            return draw_goodness(folder, self._architecture, *self._to_draw.pop())
        except IndexError:  # drawn already
            return None

    def _begin_commit(self, snapshot: Snapshot, written: Callable[[bool], Any]) -> None:
        self._finish_commit(wait=True)
        name, error, best_before = commit_name(snapshot.position), None, self._best
        if self._validated and self._validated[0] == snapshot.step and snapshot.position.minibatch == 0:
            error = self._validated[1]
            if self._best is None or error < self._best[0]:
                self._best = error, name
        facts = {
            **self._same,
            "mlflow_run_id": self._tracker.run_id,
            **snapshot.position._asdict(),
            "step": snapshot.step,
            "train_s": self._train_s,
            "validation_error": error,
            "best_commit": self._best[1] if self._best else None,
            "best_error": self._best[0] if self._best else None,
        }
        position = {key: torch.tensor(value) for key, value in snapshot.position._asdict().items()}
        self._cut = _Cut(snapshot, written, position | self._averages.state(), facts, best_before)

    def _finish_commit(self, *, wait: bool, required: bool = False) -> None:
        """Completes the pending checkpoint if its files are written: all updates before it were found finite.

        Args:
            wait: Whether to wait for the files.
            required: Whether the run stops if it cannot be completed; else remote storage may fail a few times.
        """
        if self._cut is None:
            return
        limit_s = sum(self._architecture.state_bytes) / SLOWEST_WRITE
        limit_s += 0 if wait else self._config.pipeline.stall_timeout_s
        while (written := self._cut.written(time.monotonic() - self._cut_at > limit_s)) is None:
            if not wait:
                return
            time.sleep(POLL_S)
        cut, self._cut = self._cut, None
        self._unwritten -= 1
        if written.not_finite:
            raise RunFailed(
                f"{written.not_finite} is not finite after {cut.snapshot.step} minibatches; the run stopped, and "
                f"{self.kept}; lower training.learning_rate in a new run"
            )
        name = commit_name(cut.snapshot.position)
        try:
            if written.error:
                raise CommitError(written.error)
            self._commits.finish(name, written, cut.position, **cut.facts)
        except CommitError as error:
            self._skipped += 1
            if required or not self._commits.folder.is_remote or self._skipped > MAX_SKIPPED:
                raise
            self._best = cut.best_before
            self._display.say(f"checkpoint {name} was skipped: {error}; the run continues, and {self.kept}")
            return
        self.last, self._skipped = name, 0
        self._release_state()
        try:
            self._commits.prune(name, keep=self._config.checkpoint.keep, spare=self._best[1] if self._best else None)
        except CommitError as error:  # the checkpoint itself is complete
            self._display.say(f"old checkpoints were not removed: {error}")
