"""The training loop, from dataset to digest, on either runner."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ffdist.checkpoint import commits, prune, weights_sha256, write_commit
from ffdist.config import Config, ConfigError
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.data.order import Order
from ffdist.evaluation import Evaluation, evaluate
from ffdist.ff.network import Architecture
from ffdist.ff.update import Update, rate_gain
from ffdist.pipeline.chunk import Evaluate, Snapshot, Train, schedule
from ffdist.pipeline.partition import layer_costs, partition
from ffdist.pipeline.runner import Blueprint, Evaluated, Runner, Trained, serial_runner
from ffdist.tracking.averages import Averages
from ffdist.tracking.plots import History, plot_confusion, plot_layers
from ffdist.tracking.progress import Display
from ffdist.tracking.tracker import Tracker, default_uri, tracking_uri

EVALUATION_ROWS = 2200
"""Most rows of an evaluation block; fixed, because the shape of a product decides the order of its sums."""

RunnerName = Literal["ray", "serial"]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    """Holds `config.yaml`, `commits/` and pictures."""
    summary: dict[str, Any]
    """The final figures, as `--summary` writes them; errors in [0, 1]."""


def train(
    config: Config, *, runner: RunnerName = "ray", address: str | None = "local", runs: Path = Path("runs"), name: str = "run"
) -> Run:
    """Trains a network, evaluates it and keeps it.

    Args:
        config: What to train.
        runner: `ray` spreads the stages over actors; `serial` runs the same in this process.
        address: Ray cluster to join; `local` starts one, None joins the one that this machine is part of, if any.
        runs: Folder that gets the run's own folder, and the tracking database where nothing else is set.
        name: Start of the run's name.

    Raises:
        ConfigError: Something asked for cannot be; nothing was trained.
    """
    started = time.perf_counter()
    dataset = load_dataset(config.data, seed=config.seed, validation_samples=config.training.validation_samples)
    order = Order(config.seed, len(dataset.labels["train"]), config.training.batch_size)
    if not order.minibatches:
        raise ConfigError(
            f"training.batch_size must be at most the number of training samples "
            f"(batch_size: {order.batch_size}, training samples: {order.samples})"
        )
    architecture = build_architecture(config, dataset)
    folder = _new_folder(runs, name)
    (folder / "config.yaml").write_text(config.to_yaml())
    parameters = dict(_flat(config.model_dump(mode="json"))) | {"runner": runner}
    with ExitStack() as stack:
        tracker = stack.enter_context(
            Tracker(tracking_uri(config.tracking, runs), config.tracking, runs=runs, name=folder.name, parameters=parameters)
        )
        display = stack.enter_context(Display(config.training.epochs, order.minibatches))
        opened = _open_ray if runner == "ray" else _open_serial
        pipeline, stages = stack.enter_context(
            opened(config, architecture, order, dataset, address=address, tracker=tracker, display=display)
        )
        tracker.log_artifact(folder / "config.yaml")
        outcome = _Loop(config, dataset, order, folder, tracker, display).run(pipeline)
        summary = {
            **outcome,
            "epochs": config.training.epochs,
            "wall_s": time.perf_counter() - started,
            "runner": runner,
            "stages": stages,
            "mlflow_run_id": tracker.run_id,
            "mlflow_tracking_uri": tracker.uri,
        }
        tracker.log_tags({"weights_sha256": summary["weights_sha256"], "stages": str(stages), "folder": str(folder)})
    display.say(_closing_words(summary, folder, is_default_store=tracker.uri == default_uri(runs), runs=runs))
    return Run(folder, summary)


def build_architecture(config: Config, dataset: Dataset) -> Architecture:
    """Returns the network that a configuration describes, for the images and classes of a dataset."""
    training = config.training
    return Architecture(
        pixels=dataset.pixels,
        classes=dataset.classes,
        units=tuple(config.model.layers),
        label=config.data.label,
        predict_from=config.predict_from,
        seed=config.seed,
        update=Update(training.learning_rate, training.weight_decay, training.smoothing),
        peer_strength=training.peer_normalization,
        readout_update=Update(training.readout_learning_rate, training.readout_weight_decay, training.smoothing),
        precision=training.precision,
    )


class _Loop:
    """Feeds the schedule to a runner and takes its results in, in order."""

    def __init__(
        self, config: Config, dataset: Dataset, order: Order, folder: Path, tracker: Tracker, display: Display
    ) -> None:
        self._config, self._dataset, self._order, self._folder = config, dataset, order, folder
        self._tracker, self._display = tracker, display
        self._history: History = {}
        self._best: tuple[float, Path | None] = (float("inf"), None)

    def run(self, pipeline: Runner) -> dict[str, Any]:
        """Runs the whole schedule and returns the figures that it ends with."""
        config, order = self._config, self._order
        orders = schedule(
            epochs=config.training.epochs,
            minibatches=order.minibatches,
            chunk_size=config.pipeline.chunk_size,
            gain=partial(rate_gain, epochs=config.training.epochs),
            validation_samples=len(self._dataset.labels["validation"]),
            test_samples=len(self._dataset.labels["test"]),
            evaluate_every=config.training.evaluate_every,
            evaluation_block=max(1, EVALUATION_ROWS // (self._dataset.classes + 1)),
        )
        averages = Averages(config.tracking.every_minibatches, order.batch_size)
        blocks: list[Evaluated] = []
        evaluations: dict[str, Evaluation] = {}
        steps, train_s, train_start = 0, 0.0, time.perf_counter()
        digest = ""
        for ordered, result in pipeline.run(orders):
            if isinstance(ordered, Train) and isinstance(result, Trained):
                steps, train_s = ordered.step + ordered.count, time.perf_counter() - train_start
                self._display.update(steps)
                for samples, metrics in averages.add(ordered, result):
                    self._log(metrics, samples)
            elif isinstance(ordered, Evaluate) and isinstance(result, Evaluated):
                blocks.append(result)
                if ordered.last:
                    evaluations[ordered.split] = self._evaluate(ordered.split, blocks, steps)
                    blocks = []
            elif isinstance(ordered, Snapshot) and callable(result):
                state = result()
                digest = weights_sha256(state)
                validation = evaluations.get("validation")
                self._commit(state, ordered, validation)
        for samples, metrics in averages.rest(steps):
            self._log(metrics, samples)
        test = evaluations["test"]
        self._tracker.log_artifact(plot_layers(self._history, self._folder / "layers.png"))
        self._tracker.log_artifact(plot_confusion(test.confusion, self._folder / "confusion.png"))
        return {
            "weights_sha256": digest,
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
        metrics = {f"{split}/goodness_error": found.goodness_error, f"{split}/readout_error": found.readout_error}
        metrics |= {f"{split}/layer_{layer}_error": value for layer, value in enumerate(found.layer_errors, 1)}
        self._log(metrics, steps * self._order.batch_size)
        if split == "validation":
            epoch = steps // self._order.minibatches
            self._display.say(
                f"epoch {epoch}: validation error {found.goodness_error:.2%} by goodness, "
                f"{found.readout_error:.2%} by readout"
            )
        return found

    def _commit(self, state: Any, at: Snapshot, validation: Evaluation | None) -> None:
        folder = self._folder / "commits"
        error = validation.goodness_error if validation else None
        commit = write_commit(folder, state, step=at.step, epochs=at.epochs, validation_goodness_error=error)
        if error is not None and error < self._best[0]:
            self._best = (error, commit)
        prune(folder, keep=self._config.checkpoint.keep, spare=self._best[1])
        assert commit in commits(folder)


@contextmanager
def _open_serial(
    config: Config, architecture: Architecture, order: Order, dataset: Dataset, *, tracker: Tracker, display: Display, **_: Any
) -> Iterator[tuple[Runner, int]]:
    layers = len(architecture.units)
    stages = layers if config.pipeline.stages == "auto" else config.pipeline.stages
    cuts = partition(layer_costs(architecture.widths), stages)
    device = "cuda" if config.pipeline.device != "cpu" and torch.cuda.is_available() else "cpu"
    display.say(f"serial: {stages} stages in one process, {config.pipeline.threads_per_stage} threads, {device}")
    tracker.wait_until_open()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.pipeline.threads_per_stage)
    try:
        blueprint = _blueprint(config, architecture, order, cuts, device)
        yield serial_runner(blueprint.assemble(_make, dataset.images, dataset.labels["train"])), stages
    finally:
        torch.set_num_threads(threads)


def _make(part: type, *args: Any) -> Any:
    return part(*args)


@contextmanager
def _open_ray(
    config: Config,
    architecture: Architecture,
    order: Order,
    dataset: Dataset,
    *,
    address: str | None,
    tracker: Tracker,
    display: Display,
) -> Iterator[tuple[Runner, int]]:
    from ffdist.runtime.placement import cluster_resources, connect, decide, object_store_bytes

    with connect(address):
        from ffdist.runtime.runner import ray_runner

        resources = cluster_resources()
        placement = decide(
            config.pipeline, layers=len(architecture.units), negative_actors=config.negatives.actors, resources=resources
        )
        cuts = partition(layer_costs(architecture.widths), placement.stages)
        _check_bytes(config, architecture, order, dataset, object_store_bytes())
        on = f"{placement.stage_gpus:g} GPU" if placement.device == "cuda" else f"{placement.stage_cpus:g} CPU"
        display.say(
            f"ray: {placement.stages} stages on {placement.device}, {on} each, "
            f"layers {', '.join(_span(cut) for cut in cuts)}; {config.negatives.actors} negative actors, 1 readout"
        )
        tracker.wait_until_open()
        blueprint = _blueprint(config, architecture, order, cuts, placement.device)
        with (
            display.console.status("starting actors"),
            ExitStack() as stack,
        ):
            pipeline = stack.enter_context(
                ray_runner(
                    blueprint,
                    placement,
                    images=dataset.images,
                    labels=dataset.labels["train"],
                    threads=config.pipeline.threads_per_stage,
                    max_in_flight=config.pipeline.max_in_flight,
                )
            )
            yield pipeline, placement.stages


def _blueprint(config: Config, architecture: Architecture, order: Order, cuts: list[range], device: str) -> Blueprint:
    return Blueprint(
        architecture, order, config.negatives.kind, config.negatives.actors, cuts, config.tracking.every_minibatches, device
    )


def _check_bytes(config: Config, architecture: Architecture, order: Order, dataset: Dataset, store: int) -> None:
    values = 3 * order.batch_size * min(config.pipeline.chunk_size, order.minibatches) * sum(architecture.units)
    flying = config.pipeline.max_in_flight * max(values, EVALUATION_ROWS * sum(architecture.units))
    needed = flying * architecture.compute_dtype.itemsize + sum(images.nbytes for images in dataset.images.values())
    if needed > store / 2:
        raise ConfigError(
            f"images and chunks in flight may fill half of Ray's object store (needed: {needed:,} bytes, "
            f"half of the store: {store // 2:,}); set pipeline.chunk_size or pipeline.max_in_flight lower"
        )


def _span(layers: range) -> str:
    return str(layers.start + 1) if len(layers) == 1 else f"{layers.start + 1}-{layers.stop}"


def _new_folder(runs: Path, name: str) -> Path:
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        folder = runs / (stem if not number else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"the runs folder {runs} cannot be written ({error.strerror}); set --runs DIR") from error
        return folder
    raise ConfigError(f"the runs folder {runs} holds too many runs of this second; wait a second")


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _closing_words(summary: dict[str, Any], folder: Path, *, is_default_store: bool, runs: Path) -> str:
    by_layer = ", ".join(f"{error:.2%}" for error in summary["layer_errors"])
    look = "ffdist ui" + ("" if runs == Path("runs") else f" --runs {runs}")
    lines = [
        f"test error      {summary['test_goodness_error']:.2%} by goodness, {summary['test_readout_error']:.2%} by readout",
        f"  layer alone   {by_layer}",
        f"trained in      {summary['train_s']:.1f} s, {summary['samples_per_s']:,.0f} samples/s; "
        f"{summary['wall_s']:.1f} s with start and evaluation",
        *([f"best commit     {summary['best_commit']}"] if summary["best_commit"] else []),
        f"weights_sha256  {summary['weights_sha256']}",
        f"run             {folder}",
        f"tracked         {summary['mlflow_tracking_uri']}, run {summary['mlflow_run_id']}",
        *([f"look at it      {look}"] if is_default_store else []),
    ]
    return "\n".join(lines)
