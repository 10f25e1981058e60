"""Results of a run: its summary, plots, timeline and model."""

import json
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ffdist.checkpoint.checkpoints import Checkpoints, Manifest, weights_sha256
from ffdist.config.schema import Config
from ffdist.errors import RunFailed, as_warning
from ffdist.export.network import Names
from ffdist.ff.encoders import encoder_entry
from ffdist.ff.network import Network
from ffdist.ff.optimizers import is_for_inference
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.runner import Pipeline, Trained
from ffdist.pipeline.timeline import Timeline
from ffdist.runs.folder import SUMMARY, network_of
from ffdist.storage.folder import Folder
from ffdist.tracking.server import DESCRIPTION
from ffdist.training.checkpointing import Checkpointer
from ffdist.training.loop import Loop
from ffdist.training.observer import Observer
from ffdist.training.prepare import Prepared
from ffdist.training.progress import description
from ffdist.training.record import Record
from ffdist.training.recoveries import Recoveries
from ffdist.training.resume import Start
from ffdist.training.session import Session


class Reporter(Observer):
    """Collects what a run reports, and writes it at the end.

    Args:
        config: Configuration of the run.
        prepared: Inputs of the run.
        record: Of the run.
    """

    def __init__(self, config: Config, prepared: Prepared, record: Record) -> None:
        self._config, self._architecture, self._dataset = config, prepared.architecture, prepared.dataset
        self._tracker, self._folder, self._say = record.tracker, record.folder, record.say
        self._num_minibatches = prepared.order.num_minibatches
        self._timeline = Timeline()
        self._to_draw: deque[tuple[Evaluation, Tensor, str]] = deque(maxlen=1)  # the newest validation
        self._first_chunk_at: float | None = None

    def on_start(self, start: Start, pipeline: Pipeline) -> None:
        """Begins a new timeline."""
        self._timeline = Timeline()

    def on_chunk(self, trained: Trained, step: int) -> None:
        """Adds a chunk to the timeline."""
        self._first_chunk_at = self._first_chunk_at or time.time()
        self._timeline.add(trained)

    def on_evaluation(self, split: str, evaluation: Evaluation, step: int) -> None:
        """Draws the goodness of the validation samples while the training continues."""
        if split != "validation" or evaluation.goodness_error is None or "plots" not in self._config.tracking.artifacts:
            return
        epoch = step // self._num_minibatches
        self._to_draw.append((evaluation, self._dataset.labels[split], f"epoch_{epoch:04}"))
        self._tracker.draw(self._draw_validation)

    def finish(
        self,
        loop: Loop,
        checkpointer: Checkpointer,
        session: Session,
        recoveries: Recoveries,
        started: float,
    ) -> dict[str, Any]:
        """Reports the end of the run, writes its summary, and then plots, timeline and model; returns the summary.

        Args:
            loop: Of the run.
            checkpointer: Of the run.
            session: Of the run.
            recoveries: Of the run.
            started: Start of the run, in seconds since 1970.
        """
        test, checkpoints = loop.test, checkpointer.checkpoints
        manifest, state = checkpoints.read(checkpointer.reported, is_for_inference)
        assert test, "the run ends with a test"
        samples = loop.step * self._config.training.batch_size
        summary: dict[str, Any] = {
            "weights_sha256": weights_sha256(state),
            "encoder": encoder_entry(self._dataset.encoder),
            "classes": self._dataset.classes,
            "class_names": list(self._dataset.names),
            "untrained_classes": list(self._dataset.untrained),
            "data": self._dataset.facts,
            "test_goodness_error": test.goodness_error,
            "test_readout_error": test.readout_error,
            "test_fitted_readout_error": None,
            "test_balanced_error": test.balanced_error,
            "class_errors": test.class_errors,
            "layer_errors": test.layer_errors,
            "chosen_layers": list(chosen) if (chosen := loop.architecture.chosen_layers) else None,
            "samples_per_s": samples / loop.train_s,
            "train_s": loop.train_s,
            "checkpoint": checkpointer.reported,
            "best_checkpoint": checkpoints.path(checkpointer.best.name) if checkpointer.best else None,
            "epochs": loop.step // self._num_minibatches,
            "stopped": loop.stopping.reason,
            "mlflow_run_id": self._tracker.run_id,
            "mlflow_tracking_uri": self._tracker.uri,
            "predicted_samples_per_s": session.placed.predicted_samples_per_s,
            "start_s": self._first_chunk_at - started if self._first_chunk_at else None,
            "wall_s": time.time() - started,
            "runner": session.runner,
            "precision": session.precision.value,
            "stages": len(session.placed.blueprint.stage_layers),
            "recoveries": recoveries.recoveries,
        }
        network = network_of(loop.architecture, state)
        loop.end(summary)  # before the summary is saved: if a callback fails, the run can be resumed
        self._tracker.log_tags({name: summary[name] for name in ("weights_sha256", "stopped") if summary[name]})
        self._tracker.log_metrics({"train_s": loop.train_s}, samples)
        self._tracker.note_end("FINISHED")
        Folder(str(self._folder), RunFailed).put(SUMMARY, json.dumps(summary, indent=2).encode())
        log_model = partial(self._log_model, network, manifest, checkpointer.reported, samples)
        self._illustrate(test, network, summary, log_model)
        return summary

    def log_best(self, checkpoints: Checkpoints, name: str) -> None:
        """Logs the network of a new best checkpoint, if `tracking.artifacts` says so; a failure is a warning."""
        if "checkpoints" in self._config.tracking.artifacts:
            with as_warning(self._warn, f"the network of checkpoint {name} could not be logged"):
                manifest, state = checkpoints.read(name, is_for_inference)
                self._log_model(network_of(self._architecture, state), manifest, name)

    def _log_model(self, network: Network, manifest: Manifest, name: str, test_step: int | None = None) -> None:
        """Queues a network as a model, with the evaluations of its weights. Only the final one was tested."""
        dataset, step = self._dataset, manifest.step * self._config.training.batch_size
        steps = {
            "validation": step if manifest.validation_error is not None else None,
            "test": test_step,
        }
        self._tracker.log_model(
            network,
            Names(dataset.names, dataset.origin.features),
            dataset.samples["test"][0],
            checkpoint=name,
            step=step,
            evaluations={
                split: {"step": each, "name": dataset.name, "digest": dataset.sha256(split)}
                for split, each in steps.items()
                if each is not None
            },
            is_final=test_step is not None,
        )

    def _illustrate(
        self, test: Evaluation, network: Network, summary: dict[str, Any], log_model: Callable[[], None]
    ) -> None:
        """Draws plots and queues uploads; any failure is a warning."""
        try:
            if "model" in self._config.tracking.artifacts:
                with as_warning(self._warn, "the model could not be kept"):
                    log_model()
            self._draw_and_upload(test, network)
            self._tracker.log_tags({DESCRIPTION: description(summary, self._folder)} | self._config.tracking.tags)
        except KeyboardInterrupt:
            self._tracker.shorten_flush()
            self._say("warning: interrupted; the run is finished, but not all plots are drawn or uploaded")
        except Exception as error:
            self._say(f"warning: the run is finished, but not all plots are drawn or uploaded ({error!r})")

    def _draw_and_upload(self, test: Evaluation, network: Network) -> None:
        dataset, tracker, tracking = self._dataset, self._tracker, self._config.tracking
        spans = self._timeline.spans
        if spans:
            with as_warning(self._warn, "the timeline could not be written"):
                tracker.log_artifact(self._timeline.write(self._folder))
        if "plots" not in tracking.artifacts:
            return
        from ffdist.plotting.figures import draw_plots  # matplotlib takes a while

        args = (self._folder, self._config, dataset, network, test, tracker.history(), spans, self._warn)
        for picture in draw_plots(*args):
            tracker.log_artifact(picture)

    def _draw_validation(self, folder: Path) -> Path | None:
        from ffdist.plotting.figures import draw_goodness  # matplotlib is slow to import; the training continues

        try:
            return draw_goodness(folder, self._architecture, *self._to_draw.pop())
        except IndexError:  # already drawn
            return None

    def _warn(self, text: str) -> None:
        self._say(f"warning: {text}")
