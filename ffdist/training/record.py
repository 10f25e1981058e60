"""The record of a run: in MLflow, in its folder and on the terminal."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from ffdist.config.loading import parse_config
from ffdist.config.schema import Config
from ffdist.data.datasets import Dataset
from ffdist.errors import RunFailed
from ffdist.runs.folder import CONFIG
from ffdist.storage.folder import Folder
from ffdist.tracking.tracker import Tracker
from ffdist.training.progress import Display
from ffdist.training.resume import Start

CONTEXTS = {"train": "training", "validation": "validation", "test": "testing"}
"""MLflow's names of the splits."""


class Record:
    """Records a run.

    Args:
        tracker: Sends metrics, tags and files to MLflow.
        display: Shows progress on the terminal.
        folder: Folder of the run.
    """

    def __init__(self, tracker: Tracker, display: Display, folder: Path) -> None:
        self.tracker, self.display, self.folder = tracker, display, folder

    def begin(
        self, config: Config, dataset: Dataset, start: Start, options: dict[str, str], init_from: Path | str | None
    ) -> None:
        """Begins or resumes the run. If MLflow refuses a new run, its folder is removed.

        Args:
            config: Configuration of the run.
            dataset: Dataset of the run.
            start: Where the run starts.
            options: Parameters that are not part of the configuration, by name.
            init_from: Folder of the run whose weights are the initial weights, if any.

        Raises:
            ConfigError: MLflow refuses the run, or another process is training it.
        """
        manifest = start.manifest
        if not manifest:
            parameters = config.flat() | {"data.label": dataset.encoder.label} | options
            parameters |= {"init_from": str(Path(init_from))} if init_from else {}
            try:
                self.tracker.begin(self.folder, parameters)
            except BaseException:
                with suppress(OSError):  # it is not empty if another process uses it
                    self.folder.rmdir()
                raise
        before = parse_config(manifest.config, str(self.folder)) if manifest else config
        if manifest:
            self.tracker.resume(self.folder, manifest.mlflow_run_id)
        has_moved = (before.data, before.checkpoint) != (config.data, config.checkpoint)
        if has_moved or not (self.folder / CONFIG).is_file():  # the folder may be lost, and its checkpoints elsewhere
            Folder(str(self.folder), RunFailed).put(CONFIG, config.to_yaml().encode())
        if manifest:
            self.tracker.log_tags({"resumed": "; ".join(start.remarks)})
        else:
            if init_from:
                self.tracker.note_origin(Path(init_from))
            self.tracker.log_artifact(self.folder / CONFIG)
            for split in dataset.labels:
                if len(dataset.labels[split]):
                    self.tracker.log_dataset(_describe(config, dataset, split))
        self.tracker.log_tags({"folder": str(self.folder.resolve())} | config.tracking.tags)
        for remark in start.remarks:
            self.say(remark)

    def say(self, text: str, **tags: str) -> None:
        """Prints a line, and sets tags of the run in MLflow."""
        self.display.say(text)
        if tags:
            self.tracker.log_tags(tags)

    def log(self, metrics: dict[str, float], samples: int) -> None:
        """Logs metrics by name, after a number of samples."""
        self.tracker.log_metrics(metrics, samples)
        self.display.show(metrics)


def _describe(config: Config, dataset: Dataset, split: str) -> dict[str, Any]:
    return {
        "name": config.data.name,
        "digest": dataset.sha256(split),
        "source": str(config.data.path or config.data.name),
        "profile": {
            "samples": len(dataset.labels[split]),
            "classes": dataset.classes,
            "shape of a sample": dataset.shape,
        },
        "context": CONTEXTS[split],
    }
