"""Observers of a run: progress display, metrics, plots, checkpoints and recoveries."""

from typing import Any

from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.runner import Pipeline, Trained
from ffdist.pipeline.schedule import Evaluate
from ffdist.training.resume import Start


class Observer:
    """Receives the events of a run, in their order. Methods do nothing unless they are overridden."""

    def on_start(self, start: Start, pipeline: Pipeline) -> None:
        """The actors are ready. Called again for each recovery, with the checkpoint that it starts from."""

    def on_restore(self, step: int) -> None:
        """All state is restored; `step` minibatches of the run are done."""

    def on_chunk(self, trained: Trained, step: int) -> None:
        """A chunk was trained on, and all its numbers are finite; `step` minibatches are done."""

    def on_block(self, block: Evaluate) -> None:
        """A block of samples was evaluated."""

    def on_evaluation(self, split: str, evaluation: Evaluation, step: int) -> None:
        """A whole split was evaluated, after `step` minibatches."""

    def on_checkpoint(self, path: str) -> None:
        """A checkpoint was completed; the training may have continued since its state was taken."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """The run has its results, which are not saved yet."""
