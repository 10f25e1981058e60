"""A finished run: its figures, its network and its pictures."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffdist.config import Config, ConfigError
from ffdist.config_file import load_config
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.evaluation import Evaluation, evaluate
from ffdist.ff.negatives import NegativesError
from ffdist.ff.network import Network, Prediction
from ffdist.pipeline.runner import Evaluated
from ffdist.prepare import build_architecture
from ffdist.screen import track
from ffdist.start import CONFIG, SUMMARY, commits_of, find_run, network_of, newest
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

    @classmethod
    def find(cls, run: str | Path, runs: str | Path = "runs") -> "Run":
        """Finds a run by its folder, or by its MLflow run id.

        Args:
            run: Either.
            runs: Runs folder, where an id is looked for.

        Raises:
            ConfigError: There is none, or it is not finished.
        """
        folder = find_run(str(run), Path(runs))
        if not (folder / SUMMARY).is_file():
            raise ConfigError(f"{folder} is not finished; go on with it by `ffdist train CONFIG --resume {folder}`")
        with _reading(folder / SUMMARY) as path:
            return cls(folder, json.loads(path.read_text()))

    @cached_property
    def config(self) -> Config:
        """What was trained."""
        return load_config(str(self.folder / CONFIG))

    @cached_property
    def dataset(self) -> Dataset:
        """What it was trained on, read anew."""
        config = self.config
        return load_dataset(config.data, seed=config.seed, validation_samples=config.training.validation_samples)

    @cached_property
    def network(self) -> Network:
        """The network as it was at the end, on this processor; using it takes torch alone."""
        if not {"shape", "classes"} <= self.summary.keys():
            raise ConfigError(
                f"{self.folder} is of an earlier version, which did not note its images' shape; train anew"
            )
        channels, height, width = self.summary["shape"]
        architecture = build_architecture(self.config, (channels, height, width), self.summary["classes"])
        architecture = replace(architecture, learned_goodness=self.summary["runner"] != "backpropagation")
        _, state = newest(commits_of(self.config, self.folder))
        try:
            return network_of(architecture, state)
        except (RuntimeError, KeyError) as error:
            raise ConfigError(f"{self.folder} holds the weights of other layers than its {CONFIG} has") from error

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in their order; none where they have none."""
        return list(self.summary.get("class_names", []))

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
        """Draws the run anew and returns the pictures' paths.

        Args:
            to: Folder to draw into; the run's own where there is none.

        Raises:
            ConfigError: Its dataset or negatives of one's own are not at hand, or the folder cannot be written.
        """
        from ffdist.pictures import draw_pictures  # matplotlib takes a while

        dataset, folder = self.dataset, Path(to or self.folder)
        test = self.evaluate(dataset.images["test"], dataset.labels["test"])
        with _reading(self.folder / TIMELINE):
            spans = read_timeline(self.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return list(draw_pictures(folder, self.config, dataset, self.network, test, self.metrics, spans))
        except NegativesError as error:
            raise ConfigError(f"negatives.kind={self.config.negatives.kind}: {error}") from error
        except OSError as error:
            raise ConfigError(
                f"pictures cannot be drawn into {folder} ({error.strerror}); give another --to"
            ) from error

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


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Makes of a file that cannot be read for the length of a `with` block words that name it."""
    try:
        yield path
    except (OSError, ValueError, KeyError, sqlite3.Error) as error:
        raise ConfigError(f"{path} is missing or damaged ({error!r}); train the run again") from error
