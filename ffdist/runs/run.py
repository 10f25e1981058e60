"""A finished run: its results, network and plots."""

import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffdist.config.architecture import build_architecture
from ffdist.config.schema import Config
from ffdist.console import track
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.errors import ConfigError
from ffdist.export.network import ARCHITECTURE, load_names, load_network
from ffdist.ff import MAX_CLASSES
from ffdist.ff.encoders import parse_encoder
from ffdist.ff.network import Network, Prediction
from ffdist.ff.optimizers import is_for_inference
from ffdist.pipeline.evaluation import Evaluation, evaluate
from ffdist.pipeline.timeline import TIMELINE, read_timeline
from ffdist.runs.folder import (
    CONFIG,
    SUMMARY,
    Checkpoint,
    as_config_error,
    check_data,
    checkpoints_of,
    config_of,
    find_checkpoint,
    find_run,
    is_model,
    network_of,
    resume_command,
)
from ffdist.storage.files import read_json
from ffdist.storage.paths import find_in_subfolders, kind_of
from ffdist.tracking.outbox import OUTBOX, Outbox


@dataclass(frozen=True)
class Run:
    """A finished run.

    The files in its folder are read on first use, which raises ConfigError if they are damaged.
    """

    folder: Path
    """Contains `config.yaml`, `summary.json`, `metrics.db`, `checkpoints/` and plots."""
    summary: dict[str, Any]
    """Results, as `--summary` writes them; errors in [0, 1]."""
    which: str | None = None
    """Checkpoint to use; see `find`."""
    overrides: tuple[str, ...] = ()
    """Location of its data, if it was moved; see `find`."""

    @classmethod
    def find(
        cls,
        run: str | Path,
        runs: str | Path = "runs",
        *,
        checkpoint: str | None = None,
        overrides: Iterable[str] = (),
    ) -> "Run":
        """Finds a run by its folder, its MLflow run id or the URI of its MLflow model.

        Args:
            run: Folder, id, `runs:/ID`, `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `models:/m-ID`. If the run of a
                model is not in `runs`, the model is downloaded; it predicts, evaluates given samples and is exported.
            runs: Runs folder to search for an id.
            checkpoint: Checkpoint to use: `best`, `last` or a name; by default the best one if the run was validated,
                else the last.
            overrides: `data.path=NEW` or `data.root=NEW` if its data was moved.

        Raises:
            ConfigError: There is no such run, or it is not finished.
        """
        overrides = tuple(overrides)
        if wrong := [each for each in overrides if not each.startswith(("data.path=", "data.root="))]:
            raise ConfigError(
                f"only the location of the data can be changed in a finished run, by data.path=NEW or data.root=NEW "
                f"(given: {' '.join(wrong)})"
            )
        folder = find_run(str(run), Path(runs))
        if is_model(folder):
            return ModelRun.of(folder, checkpoint)
        if kind_of(folder / SUMMARY) != "file":
            config = None
            with suppress(ConfigError):
                config = config_of(folder)
            raise ConfigError(f"{folder} is not finished; resume it with `{resume_command(folder, config)}`")
        with _explain_read_errors(folder / SUMMARY) as path:
            return cls(folder, _check_summary(read_json(folder, path.name)), checkpoint, overrides)

    @classmethod
    def find_all(cls, runs: str | Path = "runs") -> "list[Run]":
        """Returns the finished runs in a runs folder, oldest first; damaged ones are left out."""
        finished = []
        for folder in (path.parent for path in find_in_subfolders(Path(runs), SUMMARY)):
            with suppress(ConfigError):
                finished.append(cls.find(folder))
        return sorted(finished, key=lambda run: (run.folder / CONFIG).stat().st_mtime)

    @cached_property
    def config(self) -> Config:
        """Configuration of the run."""
        return config_of(self.folder, self.overrides)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Checkpoint whose weights are used."""
        return find_checkpoint(checkpoints_of(self.config, self.folder), self.which)

    @property
    def uses_reported_checkpoint(self) -> bool:
        """Whether the run's results and plots belong to the checkpoint that is used."""
        reported = self.summary.get("checkpoint")
        return self.checkpoint.kind == "last" if reported is None else self.checkpoint.name == reported

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset of the run, loaded again.

        Raises:
            ConfigError: It is missing, has changed, or only `train` can get it: arrays, or the result of a function.
        """
        config = self.config
        # A user who names the folder of its files trusts them.
        may_import = config.data.name == "covertype" and any(each.startswith("data.root=") for each in self.overrides)
        validation_samples = config.training.validation_samples
        dataset = load_dataset(
            config.data, seed=config.seed, validation_samples=validation_samples, may_import=may_import
        )
        assert self.checkpoint.manifest, "a model has no dataset"
        check_data(config, dataset, self.checkpoint.manifest, self.folder)
        return dataset

    @cached_property
    def network(self) -> Network:
        """The network of the checkpoint, on the CPU; inference needs only torch."""
        if "encoder" not in self.summary:
            raise ConfigError(
                f"{self.folder} is of an earlier version, which did not record the encoder of samples; train it again"
            )
        encoder, untrained = parse_encoder(self.summary["encoder"]), self.summary.get("untrained_classes", ())
        architecture = build_architecture(self.config, encoder, untrained)
        learned_goodness, chosen = self.summary["runner"] != "backpropagation", self.summary.get("chosen_layers")
        with _explain_read_errors(self.folder / SUMMARY):
            chosen_layers = tuple(chosen) if chosen else None
            architecture = replace(architecture, learned_goodness=learned_goodness, chosen_layers=chosen_layers)
        with as_config_error():
            _, state = checkpoints_of(self.config, self.folder).read(self.checkpoint.name, is_for_inference)
        try:
            return network_of(architecture, state)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{self.folder} contains weights that do not fit the layers of its {CONFIG}") from error

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label; empty if they have none."""
        return list(self.summary.get("class_names", []))

    @property
    def label_column(self) -> str | None:
        """Column that training read the labels from, if any."""
        column: str | None = self.summary.get("data", {}).get("columns", {}).get("label", self.config.data.label_column)
        return column

    @property
    def features(self) -> list[str]:
        """Names of the columns of the table that it was trained on; empty for images and for arrays without names."""
        return list(self.summary.get("data", {}).get("features", []))

    @property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Points of each metric of the run, as samples seen and value."""
        with _explain_read_errors(self.folder / OUTBOX) as path:
            return Outbox.history_of(path)

    def predict(self, samples: Any) -> Prediction:
        """Predicts by readout and by goodness.

        Args:
            samples: `[N, D]` or `[N, ...]` in the type and shape of the training samples. Images are uint8, 0 to 255,
                `[N, channels, height, width]`, or `[N, height, width]` if they are grayscale. Rows of a table are
                numbers of any type, or a pandas table, whose columns are found by their names.

        Raises:
            ConfigError: The samples have another type or shape than those of the dataset, or there are none.
        """
        encoder, samples = self.network.architecture.encoder, self._to_tensor(samples)
        shape, expected = tuple(samples.shape), encoder.shape
        accepted = (encoder.size,), expected, expected[1:] if expected[0] == 1 else expected
        is_number = encoder.dtype.is_floating_point and not samples.dtype.is_complex
        if not (is_number or samples.dtype == encoder.dtype) or shape[1:] not in accepted or not shape[0]:
            raise ConfigError(
                f"samples must be {str(encoder.dtype).removeprefix('torch.')} of shape [N, {str(list(expected))[1:]} "
                f"with N > 0 (given: {samples.dtype}, {list(shape)})"
            )
        samples = samples.reshape(-1, encoder.size).to(encoder.dtype)
        if not samples.isfinite().all():
            raise ConfigError("samples must be finite numbers of the type float32; remove or fill the others")
        return self.network.predict(samples, lambda batches: track(batches, "predicting"))

    def _to_tensor(self, samples: Any) -> Tensor:
        if hasattr(samples, "to_numpy"):
            columns = {str(name): name for name in getattr(samples, "columns", ())}
            if missing := [name for name in self.features if name not in columns]:
                raise ConfigError(
                    f"samples must have the columns that the network was trained on (missing: "
                    f"{', '.join(missing[:10])})"
                )
            samples = samples[[columns[name] for name in self.features]] if self.features else samples
            try:
                samples = samples.to_numpy("float32" if self.features else None)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"samples must be numbers ({error}); convert the others") from error
        if isinstance(samples, np.ndarray) and not samples.flags.writeable:
            samples = samples.copy()  # torch would warn
        return torch.as_tensor(samples)

    def _to_class_numbers(self, labels: Any) -> Tensor:
        """Returns labels as numbers; class names become their numbers."""
        values = [] if isinstance(labels, Tensor) else list(labels)
        if not any(isinstance(value, str) for value in values):
            return torch.as_tensor(labels if isinstance(labels, Tensor) else np.asarray(labels))
        numbers = {name: number for number, name in enumerate(self.class_names)}
        if unknown := [value for value in values if value not in numbers]:
            raise ConfigError(
                f"labels must be names of classes (given: {unknown[0]!r}, classes: {', '.join(self.class_names[:10])})"
            )
        return torch.tensor([numbers[value] for value in values])

    def plot(self, to: Path | str | None = None) -> list[Path]:
        """Draws the run's plots again and returns their paths.

        Args:
            to: Folder of the plots; by default the run's folder.

        Raises:
            ConfigError: The dataset is not available, the folder cannot be written, or a plot cannot be drawn; all
                other plots are drawn.
        """
        from ffdist.plotting.figures import draw_plots  # importing matplotlib is slow

        if to is None and not self.uses_reported_checkpoint:
            raise ConfigError(
                f"{self.folder} contains the plots of its checkpoint {self.summary.get('checkpoint', 'last')}; give "
                f"another folder for those of {self.checkpoint.name}, with --output"
            )
        folder, history = Path(to or self.folder), self.metrics
        with _explain_read_errors(self.folder / TIMELINE):
            spans = read_timeline(self.folder)
        dataset = self.dataset
        test = self.evaluate(dataset.samples["test"], dataset.labels["test"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the folder {folder} cannot be created ({error.strerror}); give another --output"
            ) from error
        failures: list[str] = []
        is_trusted = ":" not in self.config.negatives.kind
        if not is_trusted:
            logging.getLogger(__name__).warning(
                "plots of negatives are skipped, because a run's folder must not cause imports (negatives.kind: %s)",
                self.config.negatives.kind,
            )
        args = (folder, self.config, dataset, self.network, test, history, spans, failures.append)
        paths = list(draw_plots(*args, with_negatives=is_trusted))
        if failures:
            raise ConfigError("; ".join(failures))
        return paths

    def evaluate(self, samples: Any, labels: Any) -> Evaluation:
        """Returns the errors on samples.

        Args:
            samples: See `predict`.
            labels: True labels `[N]`: numbers, or names of classes.

        Raises:
            ConfigError: The samples or labels do not fit the network, or each other.
        """
        prediction, architecture = self.predict(samples), self.network.architecture
        labels = self._to_class_numbers(labels)
        wrong = labels.is_floating_point() or not ((labels >= 0) & (labels < architecture.classes)).all()
        if wrong or labels.shape != prediction.label.shape:
            raise ConfigError(
                f"labels must be integers in [0, {architecture.classes}), one per sample "
                f"(samples: {len(prediction.label)}, labels: {labels.dtype}, {list(labels.shape)})"
            )
        by_readout = prediction.probabilities.argmax(-1) if architecture.has_readout else None
        return evaluate(prediction.goodness, by_readout, labels.long(), architecture)


@dataclass(frozen=True)
class ModelRun(Run):
    """A run of which only the MLflow model is on this machine. What needs more of the run raises ConfigError."""

    @classmethod
    def of(cls, folder: Path, checkpoint: str | None) -> "ModelRun":
        """Returns the run of a model in a folder.

        Raises:
            ConfigError: A checkpoint is chosen, or the files are damaged.
        """
        if checkpoint is not None:
            raise ConfigError(
                f"a model has the weights of one checkpoint only (given: {checkpoint}, model: {folder}); leave "
                f"--checkpoint out"
            )
        with _explain_read_errors(folder / ARCHITECTURE):
            names = load_names(folder)
        data = {"features": names.features}
        return cls(folder, {"class_names": names.class_names, "data": data, "mlflow_run_id": ""})

    @cached_property
    def network(self) -> Network:
        """The network of the model."""
        with _explain_read_errors(self.folder / ARCHITECTURE):
            return load_network(self.folder)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model."""
        return Checkpoint("model", "", f"model {self.folder}", None)

    @property
    def uses_reported_checkpoint(self) -> bool:
        """Whether results belong to the model; there are none."""
        return True

    @cached_property
    def dataset(self) -> Dataset:
        """Not available."""
        raise self._missing("dataset")

    @property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Not available."""
        raise self._missing("metrics")

    def _missing(self, part: str) -> ConfigError:
        return ConfigError(
            f"{self.folder} is only a model, without the {part} of its run; use the folder of the run on the machine "
            f"that has it (ffdist evaluate: add --data)"
        )


def _check_summary(summary: Any) -> dict[str, Any]:
    """Returns a summary if its entries have the right types and sizes.

    Raises:
        ValueError: Some have not; the message names them.
    """
    if not isinstance(summary, dict):
        raise ValueError("it is not a JSON object")
    names = summary.get("class_names", [])
    data = summary.get("data", {})
    columns, features = (data.get("columns", {}), data.get("features", [])) if isinstance(data, dict) else (None, None)
    chosen = summary.get("chosen_layers")
    classes, untrained = summary.get("classes", 1), summary.get("untrained_classes", [])
    checks = {
        "runner": isinstance(summary.get("runner"), str),
        "mlflow_run_id": isinstance(summary.get("mlflow_run_id"), str),
        "mlflow_tracking_uri": isinstance(summary.get("mlflow_tracking_uri"), str),
        "test_readout_error": isinstance(summary.get("test_readout_error", ""), float | None),
        "chosen_layers": chosen is None or (isinstance(chosen, list) and [*map(type, chosen)] == [int, int]),
        "classes": isinstance(classes, int) and 1 <= classes <= MAX_CLASSES,
        "untrained_classes": isinstance(untrained, list) and all(isinstance(each, int) for each in untrained),
        "class_names": isinstance(names, list) and all(isinstance(name, str) for name in names),
        "data": isinstance(columns, dict)
        and isinstance(features, list)
        and all(isinstance(name, str) for name in (*columns.values(), *features)),
    }
    if "encoder" in summary:
        parse_encoder(summary["encoder"])
    if wrong := [key for key, is_valid in checks.items() if not is_valid]:
        raise ValueError(f"missing, or of the wrong type or size: {', '.join(wrong)}")
    return summary


@contextmanager
def _explain_read_errors(path: Path) -> Iterator[Path]:
    """Re-raises read errors in a `with` block as ConfigError that names the file."""
    try:
        yield path
    except (OSError, ValueError, KeyError, sqlite3.Error) as error:
        raise ConfigError(f"{path} is missing or damaged ({error!r}); train the run again") from error
