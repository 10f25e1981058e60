"""A finished run: its figures, its network and its pictures."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ffdist.config import Config, ConfigError
from ffdist.config_file import load_config
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.evaluation import Evaluation, evaluate
from ffdist.ff.network import Network, Prediction
from ffdist.pipeline.runner import Evaluated
from ffdist.prepare import build_architecture
from ffdist.start import CONFIG, SUMMARY, commits_of, find_run, network_of, newest
from ffdist.tracking.outbox import OUTBOX, Outbox
from ffdist.tracking.timeline import read_timeline

ROWS = 4000
"""Rows that pass through the layers together."""


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
    def find(cls, run: str | Path, runs: Path = Path("runs")) -> "Run":
        """Finds a run by its folder, or by its MLflow run id.

        Args:
            run: Either.
            runs: Runs folder, where an id is looked for.

        Raises:
            ConfigError: There is none, or it is not finished.
        """
        folder = find_run(str(run), runs)
        if not (folder / SUMMARY).is_file():
            raise ConfigError(f"{folder} is not finished; go on with it by `ffdist train CONFIG --resume {folder}`")
        try:
            return cls(folder, json.loads((folder / SUMMARY).read_text()))
        except ValueError as error:
            raise ConfigError(f"{folder / SUMMARY} is damaged ({error}); train the run again") from error

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
        return network_of(architecture, newest(commits_of(self.config, self.folder))[1])

    @property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """All points of the run, as samples seen and value, by the metric's name."""
        return Outbox.history_of(self.folder / OUTBOX)

    def predict(self, images: Tensor) -> Prediction:
        """Predicts by readout and by goodness.

        Args:
            images: uint8 `[N, D]` or `[N, channels, height, width]`, 0 to 255.

        Raises:
            ConfigError: They are others than those that the network was trained on.
        """
        architecture, flat = self.network.architecture, images.flatten(1)
        if images.dtype != torch.uint8 or flat.shape[1] != architecture.pixels:
            raise ConfigError(
                f"images must be uint8 of the shape {list(architecture.shape)} "
                f"(given: {images.dtype}, {list(images.shape[1:])})"
            )
        parts = torch.split(flat, max(1, ROWS // architecture.classes))
        found = [self.network.predict(part) for part in track(parts, "predicting", transient=True)]
        probabilities, goodness, label = zip(*found, strict=True)
        return Prediction(torch.cat(probabilities), torch.cat(goodness, 1), torch.cat(label))

    def plot(self, to: Path | None = None) -> list[Path]:
        """Draws the run anew and returns the pictures' paths.

        Args:
            to: Folder to draw into; the run's own where there is none.

        Raises:
            ConfigError: Its dataset is not at hand, or the folder cannot be written.
        """
        from ffdist.pictures import draw_pictures  # matplotlib takes a while

        dataset, folder = self.dataset, to or self.folder
        test = self.evaluate(dataset.images["test"], dataset.labels["test"])
        spans = read_timeline(self.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return list(draw_pictures(folder, self.config, dataset, self.network, test, self.metrics, spans))
        except OSError as error:
            raise ConfigError(
                f"pictures cannot be drawn into {folder} ({error.strerror}); give another --to"
            ) from error

    def evaluate(self, images: Tensor, labels: Tensor) -> Evaluation:
        """Returns the errors on images as `predict` takes them, with their true labels `[N]`."""
        found, architecture = self.predict(images), self.network.architecture
        block = Evaluated([found.goodness], found.probabilities.argmax(-1))
        return evaluate([block], labels, classes=architecture.classes, predict_from=architecture.predict_from)
