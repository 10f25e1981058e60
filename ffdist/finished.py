"""A finished run: its figures, its network and its pictures."""

import logging
import shlex
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffdist.checkpoint import PARAMETERS
from ffdist.config import Config, ConfigError
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.evaluation import Evaluation, evaluate
from ffdist.ff import MOST_CLASSES
from ffdist.ff.negatives import KINDS
from ffdist.ff.network import Network, Prediction
from ffdist.files import read_json
from ffdist.paths import kind_of
from ffdist.pipeline.runner import Evaluated
from ffdist.prepare import build_architecture
from ffdist.screen import track
from ffdist.start import (
    CONFIG,
    SUMMARY,
    Checkpoint,
    check_data,
    commits_of,
    config_of,
    find_checkpoint,
    find_run,
    network_of,
    read_state,
)
from ffdist.tracking.outbox import OUTBOX, Outbox
from ffdist.tracking.timeline import TIMELINE, read_timeline


@dataclass(frozen=True)
class Run:
    """A finished run.

    What is read of its folder is read when it is first asked for, and raises ConfigError where it is damaged.
    """

    folder: Path
    """Holds `config.yaml`, `summary.json`, `metrics.db`, `commits/` and pictures."""
    summary: dict[str, Any]
    """The final figures, as `--summary` writes them; errors in [0, 1]."""
    which: str | None = None
    """The checkpoint to use, as `find` takes it."""
    overrides: tuple[str, ...] = ()
    """Where its data is now, as `find` takes it."""

    @classmethod
    def find(
        cls,
        run: str | Path,
        runs: str | Path = "runs",
        *,
        checkpoint: str | None = None,
        overrides: Iterable[str] = (),
    ) -> "Run":
        """Finds a run by its folder, or by its MLflow run id.

        Args:
            run: Either.
            runs: Runs folder, where an id is looked for.
            checkpoint: `best`, `last` or the name of one; the best one if the run was validated, else the last.
            overrides: `data.path=NEW` or `data.root=NEW` where its data was moved.

        Raises:
            ConfigError: There is none, or it is not finished.
        """
        overrides = tuple(overrides)
        if wrong := [each for each in overrides if not each.startswith(("data.path=", "data.root="))]:
            raise ConfigError(
                f"of a finished run only the place of its data can change, by data.path=NEW or data.root=NEW (given: "
                f"{' '.join(wrong)})"
            )
        folder = find_run(str(run), Path(runs))
        if kind_of(folder / SUMMARY) != "file":
            raise ConfigError(
                f"{folder} is not finished; resume it with `ffdist train CONFIG --resume {shlex.quote(str(folder))}`"
            )
        with _reading(folder / SUMMARY) as path:
            return cls(folder, _checked(read_json(folder, path.name)), checkpoint, overrides)

    @cached_property
    def config(self) -> Config:
        """What was trained."""
        return config_of(self.folder, self.overrides)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that is used."""
        return find_checkpoint(commits_of(self.config, self.folder), self.which)

    @property
    def uses_own_checkpoint(self) -> bool:
        """Whether the checkpoint that is used is the one whose figures and plots the run has."""
        own = self.summary.get("checkpoint")
        return self.checkpoint.kind == "last" if own is None else self.checkpoint.name == own

    @cached_property
    def dataset(self) -> Dataset:
        """What it was trained on, read again.

        Raises:
            ConfigError: It is missing, or other data is there now.
        """
        config = self.config
        dataset = load_dataset(config.data, seed=config.seed, validation_samples=config.training.validation_samples)
        check_data(config, dataset, self.checkpoint.manifest, self.folder)
        return dataset

    @cached_property
    def network(self) -> Network:
        """The network of the checkpoint, on this processor; using it takes torch alone."""
        if not {"shape", "classes"} <= self.summary.keys():
            raise ConfigError(
                f"{self.folder} is of an earlier version, which did not note its images' shape; train anew"
            )
        channels, height, width = self.summary["shape"]
        classes, untrained = self.summary["classes"], self.summary.get("untrained_classes", ())
        architecture = build_architecture(self.config, (channels, height, width), classes, untrained)
        architecture = replace(architecture, learned_goodness=self.summary["runner"] != "backpropagation")
        state = read_state(commits_of(self.config, self.folder), self.checkpoint, PARAMETERS)
        try:
            return network_of(architecture, state)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{self.folder} holds the weights of other layers than its {CONFIG} has") from error

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in their order; none where they have none."""
        return list(self.summary.get("class_names", []))

    @property
    def label_column(self) -> str | None:
        """Column of Parquet files in which training found the labels, where it read some."""
        column: str | None = self.summary.get("data", {}).get("columns", {}).get("label", self.config.data.label_column)
        return column

    @property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """All points of the run, as samples seen and value, by the metric's name."""
        with _reading(self.folder / OUTBOX) as path:
            return Outbox.history_of(path)

    def predict(self, images: Tensor) -> Prediction:
        """Predicts by readout and by goodness.

        Args:
            images: uint8 `[N, D]` or `[N, channels, height, width]`, 0 to 255; grey ones may be `[N, height, width]`.

        Raises:
            ConfigError: There are none, or others than those that the network was trained on.
        """
        architecture, images = self.network.architecture, torch.as_tensor(images)
        shape, own = tuple(images.shape), architecture.shape
        fitting = (architecture.pixels,), own, own[1:] if own[0] == 1 else own
        if images.dtype != torch.uint8 or shape[1:] not in fitting or not shape[0]:
            raise ConfigError(
                f"images must be uint8 of the shape [N, {str(list(own))[1:]}, one or more (given: {images.dtype}, "
                f"{list(shape)})"
            )
        return self.network.predict(images.flatten(1), lambda parts: track(parts, "predicting"))

    def plot(self, to: Path | str | None = None) -> list[Path]:
        """Draws the run's plots again and returns their paths.

        Args:
            to: Folder to draw into; the run's own where there is none.

        Raises:
            ConfigError: Its dataset is not available, the folder cannot be written, or a plot could not be drawn; the
                others were drawn.
        """
        from ffdist.pictures import draw_pictures  # matplotlib takes a while

        if to is None and not self.uses_own_checkpoint:
            raise ConfigError(
                f"{self.folder} keeps the plots of its checkpoint {self.summary.get('checkpoint', 'last')}; give "
                f"another folder for those of {self.checkpoint.name}, by --to"
            )
        folder, history = Path(to or self.folder), self.metrics
        with _reading(self.folder / TIMELINE):
            spans = read_timeline(self.folder)
        dataset = self.dataset
        test = self.evaluate(dataset.images["test"], dataset.labels["test"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder {folder} cannot be made ({error.strerror}); give another --to") from error
        failed: list[str] = []
        trusted = self.config.negatives.kind in KINDS
        if not trusted:
            logging.getLogger(__name__).warning(
                "plots of negatives are left out: a run's folder must not have code imported (negatives.kind: %s)",
                self.config.negatives.kind,
            )
        args = (folder, self.config, dataset, self.network, test, history, spans, failed.append)
        paths = list(draw_pictures(*args, with_negatives=trusted))
        if failed:
            raise ConfigError("; ".join(failed))
        return paths

    def evaluate(self, images: Tensor, labels: Tensor) -> Evaluation:
        """Returns the errors on images as `predict` takes them, with their true labels `[N]`.

        Raises:
            ConfigError: They do not fit the network, or each other.
        """
        found, architecture, labels = self.predict(images), self.network.architecture, torch.as_tensor(labels)
        wrong = labels.is_floating_point() or not ((labels >= 0) & (labels < architecture.classes)).all()
        if wrong or labels.shape != found.label.shape:
            raise ConfigError(
                f"there must be a whole number for each image, from 0 to below {architecture.classes} "
                f"(images: {len(found.label)}, labels: {labels.dtype}, {list(labels.shape)})"
            )
        block = Evaluated([found.goodness], found.probabilities.argmax(-1))
        return evaluate([block], labels.long(), classes=architecture.classes, predict_from=architecture.predict_from)


def _checked(summary: Any) -> dict[str, Any]:
    """Returns a summary if its figures are of the right types and sizes.

    Raises:
        ValueError: One of them is not; the text says which.
    """
    if not isinstance(summary, dict):
        raise ValueError("it holds no figures")
    shape, names = summary.get("shape", [1, 1, 1]), summary.get("class_names", [])
    data = summary.get("data", {})
    columns = data.get("columns", {}) if isinstance(data, dict) else None
    classes, untrained = summary.get("classes", 1), summary.get("untrained_classes", [])
    right = {
        "runner": isinstance(summary.get("runner"), str),
        "mlflow_run_id": isinstance(summary.get("mlflow_run_id"), str),
        "mlflow_tracking_uri": isinstance(summary.get("mlflow_tracking_uri"), str),
        "test_readout_error": isinstance(summary.get("test_readout_error"), float),
        "shape": isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape),
        "classes": isinstance(classes, int) and 1 <= classes <= MOST_CLASSES,
        "untrained_classes": isinstance(untrained, list) and all(isinstance(each, int) for each in untrained),
        "class_names": isinstance(names, list) and all(isinstance(name, str) for name in names),
        "data": isinstance(columns, dict) and all(isinstance(name, str) for name in columns.values()),
    }
    if wrong := [key for key, is_right in right.items() if not is_right]:
        raise ValueError(f"{', '.join(wrong)} is missing, or of a wrong type or size")
    return summary


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Makes of a file that cannot be read for the length of a `with` block words that name it."""
    try:
        yield path
    except (OSError, ValueError, KeyError, sqlite3.Error) as error:
        raise ConfigError(f"{path} is missing or damaged ({error!r}); train the run again") from error
