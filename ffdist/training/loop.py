"""The loop of a run: submits the schedule to a pipeline and reports the results, in order, to observers."""

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from ffdist.checkpoint.checkpoints import CheckpointError
from ffdist.config.schema import Config
from ffdist.errors import ActorLost, RunFailed
from ffdist.ff.classify import best_layers
from ffdist.ff.layers import MEASURED
from ffdist.ff.negatives import NegativesError
from ffdist.ff.schedules import lr_scales
from ffdist.pipeline.evaluation import Evaluation, evaluate
from ffdist.pipeline.runner import Evaluated, Event, Pipeline, SnapshotTaken, Trained
from ffdist.pipeline.schedule import (
    Command,
    Evaluate,
    Position,
    Snapshot,
    Train,
    evaluation,
    evaluation_block,
    schedule,
)
from ffdist.training.checkpointing import Checkpointer
from ffdist.training.early_stopping import EarlyStopping
from ffdist.training.observer import Observer
from ffdist.training.prepare import Prepared
from ffdist.training.recoveries import Recoveries
from ffdist.training.resume import Start


class Loop:
    """Runs a configuration on one pipeline after another.

    Args:
        config: Configuration of the run.
        prepared: Inputs of the run.
        checkpointer: Takes the checkpoints.
        stopping: Ends the run early.
        recoveries: Records failures, and limits their number.
        observers: Receive all events, before the checkpointer.
    """

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        checkpointer: Checkpointer,
        stopping: EarlyStopping,
        recoveries: Recoveries,
        observers: Sequence[Observer],
    ) -> None:
        self._config, self._dataset, self._order = config, prepared.dataset, prepared.order
        self._prepared, self._checkpointer, self._recoveries = prepared, checkpointer, recoveries
        self.architecture = prepared.architecture
        """Of the network; at the end, with the predicting layers that were chosen on the validation samples."""
        self._observers = [recoveries, *observers, stopping, checkpointer]  # callbacks before early stopping
        self.stopping = stopping
        """Early stopping of the run."""
        self._block_size = evaluation_block(prepared.architecture)
        self._blocks: list[Evaluated] = []
        self.step = 0
        """Number of minibatches done."""
        self.train_s = 0.0
        """Training time, without starts and evaluations."""
        self.test: Evaluation | None = None
        """Of the checkpoint that the results belong to, once the run is finished."""
        self.interrupted = False
        """Whether the run ended because of a stop request, and can be resumed."""

    def run(
        self,
        pipelines: Iterator[AbstractContextManager[Pipeline]],
        start: Start,
        should_stop: Callable[[], bool],
    ) -> None:
        """Runs the schedule to its end, or until a stop is requested.

        Args:
            pipelines: Pipelines to run on. If an actor is lost, the next one continues from the last checkpoint.
            start: Where to start.
            should_stop: Returns whether a stop was requested.

        Raises:
            RunFailed: There were too many failures, a number is not finite, or something cannot be written. Nothing
                later than a number that is not finite is saved.
            NegativesError: No more negatives can be made.
        """
        for pipeline in pipelines:
            self.step, self.train_s, self.test = start.step, start.train_s, None
            self._checkpointer.begin(start)
            try:
                with pipeline as actors:
                    self._run_on(actors, start, should_stop)
                return
            except ActorLost as lost:
                self._recoveries.add(lost, self.step)
                start = self._checkpointer.restart(start, lost)

    def _run_on(self, pipeline: Pipeline, start: Start, should_stop: Callable[[], bool]) -> None:
        """Runs on one pipeline; adds to errors which checkpoint is kept."""
        try:
            self._run(pipeline, start, should_stop)
        except (CheckpointError, OSError, sqlite3.Error) as error:  # a disk is full or gone
            raise RunFailed(f"{error}; the run stopped, and {self._checkpointer.kept}") from error
        except NegativesError as error:
            raise NegativesError(f"{error}; the run stopped, and {self._checkpointer.kept}") from error

    def _run(self, pipeline: Pipeline, start: Start, should_stop: Callable[[], bool]) -> None:
        self._blocks, self.architecture = [], self._prepared.architecture
        for observer in self._observers:
            observer.on_start(start, pipeline)
        if start.state:
            pipeline.restore(start.state)
        for observer in self._observers:
            observer.on_restore(self.step)
        if not self.stopping.reason:  # else the run is resumed where it ended
            chunk_size = pipeline.blueprint.chunk_size
            commands = self._with_snapshots(self._schedule(chunk_size, start.position), start, should_stop)
            self._process(pipeline.run(self._submitting(commands), self._schedule(chunk_size, start.position)))
        if len(self._dataset.labels["validation"]) and not self.interrupted:
            self._checkpointer.restore_reported(pipeline, is_ahead=bool(self.stopping.reason))
            if self._config.chooses_layers:
                self._choose_layers(pipeline, should_stop)
            self._process(pipeline.run(self._blocks_of("test", should_stop), ()))

    def _choose_layers(self, pipeline: Pipeline, should_stop: Callable[[], bool]) -> None:
        """Chooses the predicting layers of the final weights, before the test set is used."""
        events = list(pipeline.run(self._blocks_of("validation", should_stop), ()))
        if not self.interrupted and self.architecture.goodness_predicts:
            goodness = [torch.cat(event.goodness) for event in events if isinstance(event, Evaluated)]
            layers = best_layers(torch.cat(goodness, 1), self._dataset.labels["validation"])
            self.architecture = replace(self.architecture, chosen_layers=(layers.start + 1, layers.stop))

    def _process(self, events: Iterator[Event]) -> None:
        """Reports results, in their order.

        If the run ends at a validation, the snapshot after it is the last result. Commands that were submitted after
        the snapshot are still executed, but their results are ignored.
        """
        since, before_s = time.perf_counter(), self.train_s
        for event in events:
            match event:
                case Trained(chunk):
                    self._check_finite(event)
                    self.step = chunk.step + chunk.num_minibatches
                    self.train_s = before_s + time.perf_counter() - since
                    for observer in self._observers:
                        observer.on_chunk(event, self.step)
                case Evaluated(block):
                    for observer in self._observers:
                        observer.on_block(block)
                    self._add_block(event)
                case SnapshotTaken():
                    self._complete_checkpoint(wait=True)
                    self._checkpointer.on_snapshot(event, self.train_s)
                    if self.stopping.reason:
                        break
            self._complete_checkpoint(wait=False)
        self._complete_checkpoint(wait=True, required=True)

    def _complete_checkpoint(self, *, wait: bool, required: bool = False) -> None:
        if path := self._checkpointer.complete(wait=wait, required=required):
            for observer in self._observers:
                observer.on_checkpoint(path)

    def end(self, summary: dict[str, Any]) -> None:
        """Reports the end of the run; `summary` has its results."""
        for observer in self._observers:
            observer.on_end(summary)

    def _add_block(self, evaluated: Evaluated) -> None:
        self._blocks.append(evaluated)
        split = evaluated.block.split
        if not evaluated.block.last:
            return
        blocks, self._blocks = self._blocks, []
        goodness = torch.cat([torch.cat(block.goodness) for block in blocks], 1)
        predicted = [block.predicted for block in blocks if block.predicted is not None]
        result = evaluate(
            goodness, torch.cat(predicted) if predicted else None, self._dataset.labels[split], self.architecture
        )
        if split == "test":
            self.test = result
        for observer in self._observers:
            observer.on_evaluation(split, result, self.step)

    def _schedule(self, chunk_size: int, start: Position) -> Iterator[Command]:
        config, validation_samples = self._config, len(self._dataset.labels["validation"])
        training = config.training
        return schedule(
            lr_scales=lr_scales(
                training.learning_rate_schedule,
                training.epochs,
                training.warmup_epochs,
                training.learning_rate_steps,
                training.learning_rate_factor,
            ),
            minibatches=self._order.num_minibatches,
            chunk_size=chunk_size,
            greedy_layers=len(config.model.layers) if training.schedule == "greedy" else None,
            validation_samples=validation_samples,
            test_samples=0 if validation_samples else len(self._dataset.labels["test"]),  # else the best one is tested
            validate_every_epochs=training.validate_every_epochs,
            evaluation_block=self._block_size,
            start=start,
        )

    def _with_snapshots(
        self, commands: Iterator[Command], start: Start, should_stop: Callable[[], bool]
    ) -> Iterator[Command]:
        """Yields the schedule, and a snapshot where a checkpoint is due or a stop is requested.

        If the run ends early, the schedule ends at the snapshot after the validation.
        """
        position = start.position
        saved = position if start.manifest else None
        for command in commands:
            if self.stopping.reason and not (isinstance(command, Snapshot) and command.step == self.step):
                return
            if should_stop() and not isinstance(command, Snapshot):  # a validation ends with its snapshot
                self.interrupted = True
                if position != saved:
                    yield self._snapshot(position)
                return
            if isinstance(command, Train) and position != saved:
                snapshot = self._snapshot(position)
                if self._checkpointer.is_due(snapshot.step):
                    saved = position
                    yield snapshot
            yield command
            if isinstance(command, Snapshot):
                position = saved = command.position
            elif isinstance(command, Train):
                position = Position(command.epoch, command.first + command.num_minibatches)

    def _submitting(self, commands: Iterator[Command]) -> Iterator[Command]:
        for command in commands:
            if isinstance(command, Snapshot):
                self._checkpointer.on_submit(command)
            yield command

    def _blocks_of(self, split: str, should_stop: Callable[[], bool]) -> Iterator[Evaluate]:
        for block in evaluation(split, len(self._dataset.labels[split]), self._block_size):
            self.interrupted = self.interrupted or should_stop()
            if self.interrupted:
                return
            yield block

    def _snapshot(self, position: Position) -> Snapshot:
        return Snapshot(position, position.epoch * self._order.num_minibatches + position.minibatch)

    def _check_finite(self, trained: Trained) -> None:
        layers = torch.cat([report.metrics for report in trained.stages], 1)[:, :, : -len(MEASURED)]
        finite = torch.cat((layers.isfinite().all(2), trained.readout_metrics.isfinite().all(1, keepdim=True)), 1)
        if finite.all():
            return
        self._complete_checkpoint(wait=True)  # its state was taken before
        minibatch, part = (~finite).nonzero()[0].tolist()
        where = "the readout" if part == layers.shape[1] else f"layer {part + 1}"
        raise RunFailed(
            f"a number in {where} is not finite at minibatch {trained.chunk.first + minibatch} of epoch "
            f"{trained.chunk.epoch} (counted from 0); the run stopped, and {self._checkpointer.kept}; lower "
            f"training.learning_rate in a new run"
        )
