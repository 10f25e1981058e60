"""The training loop, from dataset to digest, on any runner."""

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from ffdist.checkpoint import prune, weights_sha256, write_commit
from ffdist.config import Config, ConfigError
from ffdist.data.datasets import Dataset
from ffdist.data.order import SampleOrder
from ffdist.evaluation import Evaluation, evaluate
from ffdist.ff.negatives import NegativesError
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.partition import partition
from ffdist.pipeline.runner import Blueprint, Evaluated, Runner, Trained, serial_runner, torch_threads
from ffdist.pipeline.schedule import EVALUATION_ROWS, Evaluate, Snapshot, Train, schedule
from ffdist.pipeline.stage import State
from ffdist.prepare import prepare
from ffdist.runtime.cluster import check_object_store, cluster_resources, connect, machine_resources
from ffdist.runtime.placement import decide, describe, reserve
from ffdist.tracking.averages import Averages
from ffdist.tracking.plots import History, plot_confusion, plot_layers
from ffdist.tracking.progress import Display, closing_words
from ffdist.tracking.tracker import Tracker, how_to_look, tracking_uri

RunnerName = Literal["ray", "serial", "backpropagation"]
SUMMARY = "summary.json"
"""Final figures in the folder of a run."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    """Holds `config.yaml`, `summary.json`, `commits/` and pictures."""
    summary: dict[str, Any]
    """The final figures, as `--summary` writes them; errors in [0, 1]."""


def train(
    config: Config,
    *,
    runner: RunnerName = "ray",
    address: str | None = "local",
    runs: Path = Path("runs"),
    name: str = "run",
) -> Run:
    """Trains a network, evaluates it and keeps it.

    Args:
        config: What to train.
        runner: `ray` spreads the stages over actors; `serial` runs the same in this process; `backpropagation` trains
            the same layers end to end in this process, as a reference.
        address: Ray cluster to join; `local` starts one, None joins the one that this machine is part of, if any.
        runs: Folder that gets the run's own folder, and the tracking database where nothing else is set.
        name: Start of the run's name.

    Raises:
        ConfigError: Something asked for cannot be; nothing was trained.
    """
    started = time.perf_counter()
    if runner == "backpropagation":
        config = config.by_backpropagation()
    dataset, order, architecture, plan = prepare(config)
    _make_folder(runs)
    with ExitStack() as stack:
        uri = tracking_uri(config.tracking, runs)
        tracker = stack.enter_context(Tracker(uri, config.tracking, runs=runs))  # opens while Ray starts
        display = stack.enter_context(Display(config.passes, order.minibatches))
        if runner == "ray":
            display.doing("starting Ray")
            stack.enter_context(connect(address))
        placement = decide(
            config.pipeline,
            layers=len(architecture.layers),
            negative_actors=plan.num_parts,
            resources=cluster_resources() if runner == "ray" else machine_resources(),
        )
        blueprint = Blueprint(
            architecture,
            order,
            negatives=plan,
            jitter=config.data.jitter,
            stage_layers=partition(architecture.weights, placement.stages),
            measure_every=config.tracking.every_minibatches,
            device=placement.device,
        )
        if runner == "ray":
            in_flight = blueprint.bytes_in_flight(config.pipeline.chunk_size, config.pipeline.max_in_flight)
            check_object_store(images=sum(split.nbytes for split in dataset.images.values()), in_flight=in_flight)
            group = stack.enter_context(reserve(placement.bundles(plan.num_parts)))
        folder = _new_folder(runs, name)
        (folder / "config.yaml").write_text(config.to_yaml())
        tracker.begin(folder.name, config.flat() | {"runner": runner})
        tracker.log_artifact(folder / "config.yaml")
        decided = describe(runner, placement, blueprint)
        tracker.log_tags({"decided": decided, "folder": str(folder.resolve())})
        display.say(decided)
        images, labels = dataset.images, dataset.labels["train"]
        pipeline: Runner | Backpropagation
        if runner == "ray":
            from ffdist.runtime.runner import ray_runner

            display.doing("starting actors")
            opened = ray_runner(blueprint, group, config.pipeline, images=images, labels=labels)
            pipeline = stack.enter_context(opened)
        else:
            stack.enter_context(torch_threads(config.pipeline.threads_per_stage))
            if runner == "serial":
                pipeline = serial_runner(blueprint, images, labels)
            else:
                pipeline = Backpropagation(blueprint, images, labels)
        try:
            figures = _Loop(config, dataset, order, folder, tracker, display).run(pipeline)
        except NegativesError as error:
            raise ConfigError(f"negatives.kind={plan.kind}: {error}") from error
        summary = {
            **figures,
            "epochs": config.passes,
            "wall_s": time.perf_counter() - started,
            "runner": runner,
            "stages": placement.stages,
            "mlflow_run_id": tracker.run_id,
            "mlflow_tracking_uri": tracker.uri,
        }
        tracker.log_tags({"weights_sha256": summary["weights_sha256"]})
        tracker.log_metrics({"train_s": summary["train_s"]}, config.passes * order.minibatches * order.batch_size)
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2))
    display.say(closing_words(summary, folder, look=how_to_look(tracker.uri, runs)))
    return Run(folder, summary)


class _Loop:
    """Feeds the schedule to a runner and takes its results in, in order."""

    def __init__(
        self, config: Config, dataset: Dataset, order: SampleOrder, folder: Path, tracker: Tracker, display: Display
    ) -> None:
        self._config, self._dataset, self._order, self._folder = config, dataset, order, folder
        self._tracker, self._display = tracker, display
        self._history: History = {}
        self._best: tuple[float, Path | None] = (float("inf"), None)

    def run(self, pipeline: Runner | Backpropagation) -> dict[str, Any]:
        """Runs the whole schedule and returns the figures that it ends with."""
        config, order = self._config, self._order
        tried = self._dataset.classes if config.data.label != "none" else 0
        orders = schedule(
            epochs=config.training.epochs,
            minibatches=order.minibatches,
            chunk_size=config.pipeline.chunk_size,
            greedy_layers=len(config.model.layers) if config.training.schedule == "greedy" else None,
            validation_samples=len(self._dataset.labels["validation"]),
            test_samples=len(self._dataset.labels["test"]),
            evaluate_every=config.training.evaluate_every,
            evaluation_block=max(1, EVALUATION_ROWS // (1 + tried)),
        )
        averages = Averages(config.tracking.every_minibatches, order.batch_size)
        blocks: list[Evaluated] = []
        evaluations: dict[str, Evaluation] = {}
        steps, train_s, train_start = 0, 0.0, time.perf_counter()
        state: State = {}
        for ordered, result in pipeline.run(orders):
            if isinstance(ordered, Train) and isinstance(result, Trained):
                steps, train_s = ordered.step + ordered.num_minibatches, time.perf_counter() - train_start
                self._display.update(steps)
                for samples, metrics in averages.add(ordered, result):
                    self._log(metrics, samples)
            elif isinstance(ordered, Evaluate) and isinstance(result, Evaluated):
                self._display.doing(f"evaluating, {ordered.split}")
                blocks.append(result)
                if ordered.last:
                    evaluations[ordered.split] = self._evaluate(ordered.split, blocks, steps)
                    blocks = []
            elif isinstance(ordered, Snapshot) and callable(result):
                state = result()
                self._commit(state, ordered, evaluations.get("validation"))
        for samples, metrics in averages.rest(steps):
            self._log(metrics, samples)
        test = evaluations["test"]
        if "layer_1/loss" in self._history:
            self._tracker.log_artifact(plot_layers(self._history, self._folder / "layers.png"))
        by = "readout" if test.goodness_error is None else "goodness"
        self._tracker.log_artifact(plot_confusion(test.confusion, by, self._folder / "confusion.png"))
        return {
            "weights_sha256": weights_sha256(state),
            "test_goodness_error": test.goodness_error,
            "test_readout_error": test.readout_error,
            "layer_errors": test.layer_errors,
            "samples_per_s": steps * order.batch_size / train_s,
            "train_s": train_s,
            "best_commit": str(self._best[1]) if self._best[1] else None,
        }

    def _log(self, metrics: dict[str, float], samples: int) -> None:
        self._tracker.log_metrics(metrics, samples)
        self._display.update(samples // self._order.batch_size, metrics)
        for name, value in metrics.items():
            self._history.setdefault(name, []).append((samples, value))

    def _evaluate(self, split: str, blocks: list[Evaluated], steps: int) -> Evaluation:
        labels, classes = self._dataset.labels[split], self._dataset.classes
        found = evaluate(blocks, labels, classes=classes, predict_from=self._config.predict_from)
        metrics = {f"{split}/readout_error": found.readout_error}
        if found.goodness_error is not None:
            metrics[f"{split}/goodness_error"] = found.goodness_error
        metrics |= {f"{split}/layer_{layer}_error": value for layer, value in enumerate(found.layer_errors or [], 1)}
        self._log(metrics, steps * self._order.batch_size)
        if split == "validation":
            epoch = steps // self._order.minibatches
            self._display.say(f"epoch {epoch}: validation error {found.in_words()}")
        return found

    def _commit(self, state: State, at: Snapshot, validation: Evaluation | None) -> None:
        folder = self._folder / "commits"
        error = validation.chief_error if validation else None
        commit = write_commit(folder, state, step=at.step, epochs=at.epochs, validation_error=error)
        if error is not None and error < self._best[0]:
            self._best = (error, commit)
        prune(folder, keep=self._config.checkpoint.keep, spare=self._best[1])


def _new_folder(runs: Path, name: str) -> Path:
    """Makes the folder of a run; of runs that start in one second, each gets its own."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(
        folder for number in count(1) if _make_folder(folder := runs / (f"{stem}-{number}" if number > 1 else stem))
    )


def _make_folder(folder: Path) -> bool:
    """Makes a folder and says whether it is new."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be written ({error.strerror}); set --runs DIR") from error
    return True
