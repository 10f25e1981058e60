"""The folder of a run: its configuration, checkpoints and network."""

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from ffdist.checkpoint.checkpoints import CheckpointError, Checkpoints, DamagedCheckpoint, Manifest
from ffdist.config.loading import CONFIG as CONFIG
from ffdist.config.loading import load_config
from ffdist.config.schema import Config
from ffdist.config.sections import ARRAYS, Tracking
from ffdist.config.values import NO_TRACKING
from ffdist.data.datasets import Dataset
from ffdist.errors import ConfigError
from ffdist.export.network import ARCHITECTURE
from ffdist.ff.architecture import Architecture
from ffdist.ff.network import Network
from ffdist.ff.specs import Module, layer_entry
from ffdist.pipeline.stage import State
from ffdist.storage.files import UnsafeFile, file_in, read_json
from ffdist.storage.folder import Folder
from ffdist.storage.paths import find_in_subfolders, kind_of
from ffdist.tracking.outbox import OUTBOX, Outbox
from ffdist.tracking.server import tracking_uri
from ffdist.tracking.stored import MODELS, RUNS, download_model, find_model, run_id_of
from ffdist.tracking.sync import LOCK

SUMMARY = "summary.json"
"""File in the folder of a run with the results of a finished run."""
MAX_CONFIG_BYTES = 2**20


def find_run(run: str, runs: Path, checkpoint_uri: str | None = None) -> Path:
    """Returns the folder of a run.

    If the folder is lost, but `checkpoint_uri` contains its checkpoints, returns the folder to create. If
    the run of a model is not in the runs folder, returns a folder that contains only the model (`is_model`).

    Args:
        run: Its folder, its MLflow run id, also as `runs:/ID` or `runs:/ID/model`, or its MLflow model, `models:/...`.
        runs: Runs folder.
        checkpoint_uri: `checkpoint.uri` of the run, if its folder may be lost.

    Raises:
        ConfigError: There is no such run or model.
    """
    if run:
        if os.path.isfile(os.path.join(run, CONFIG)):  # noqa: PTH113, PTH118, Path.is_file raises if `run` is too long
            return Path(run)
        if folder := _folder_of_id(run_id_of(run), runs):
            return folder
        if run.startswith((RUNS, MODELS)):
            return _folder_of_model(run, runs)
        if checkpoint_uri and checkpoints_at(checkpoint_uri, Path(run)).names():
            return runs / Path(run).resolve().name
    raise ConfigError(
        f"RUN must be the folder of a run, the MLflow run id of a run in {runs}, or an MLflow URI, runs:/ID or "
        f"models:/NAME/VERSION (given: {run})"
    )


def _folder_of_id(run_id: str, runs: Path) -> Path | None:
    outboxes = find_in_subfolders(runs, OUTBOX) if run_id else []  # runs without MLflow have an empty id
    return next((path.parent for path in outboxes if Outbox.fact_of(path, "run_id") == run_id), None)


def _folder_of_model(uri: str, runs: Path) -> Path:
    """Returns the folder of the run that made a model, if its results are those of the model; else downloads it."""
    store = tracking_uri(Tracking(), runs)
    model = find_model(uri, store, runs)
    folder = _folder_of_id(model.run_id, runs)
    if folder and (model.checkpoint is None or _reported_checkpoint(folder) == model.checkpoint):
        return folder
    return download_model(model, store, runs)


def _reported_checkpoint(folder: Path) -> Any:
    with suppress(OSError, ValueError, AttributeError):
        return read_json(folder, SUMMARY).get("checkpoint")
    return None


def is_model(folder: Path) -> bool:
    """Returns whether a folder contains a network without the run that made it."""
    return kind_of(folder / ARCHITECTURE) == "file" and kind_of(folder / SUMMARY) != "file"


def config_of(folder: Path, overrides: Iterable[str] = ()) -> Config:
    """Returns the configuration of a run, with overrides applied.

    Raises:
        ConfigError: The configuration is missing or damaged.
    """
    try:
        return load_config(str(file_in(folder, CONFIG, max_bytes=MAX_CONFIG_BYTES)), overrides)
    except (OSError, UnsafeFile) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read ({error}); train the run again") from error


def checkpoints_of(config: Config, folder: Path) -> Checkpoints:
    """Returns the checkpoints of a run: in its folder, or under its name in `checkpoint.uri`."""
    uri = config.checkpoint.uri
    return checkpoints_at(uri, folder) if uri else Checkpoints(Folder(str(folder), CheckpointError, "checkpoints"))


def checkpoints_at(uri: str, folder: Path) -> Checkpoints:
    """Returns the checkpoints of a run that are kept at a URI, under the name of its folder."""
    return Checkpoints(Folder(uri, CheckpointError, folder.resolve().name))


def unconfirmed_settings(config: Config) -> dict[str, Any]:
    """Returns the settings of a run that name code to import, or a tracking server.

    The folder of a run may come from another person, so they are used only if the user repeats them.
    """
    data, uri = config.data, config.tracking.uri
    imports = data.name != ARRAYS and not data.is_loadable
    layers = config.model.layers
    has_modules = any(isinstance(layer, Module) or ":" in (layer.objective or "") for layer in layers)
    settings = {
        "data.name": data.name if imports else None,
        "data.options": data.options or None if imports else None,
        "model.layers": list(map(layer_entry, layers)) if has_modules else None,
        "training.objective": config.training.objective if ":" in config.training.objective else None,
        "negatives.kind": config.negatives.kind if ":" in config.negatives.kind else None,
        "training.callbacks": config.training.callbacks or None,
        "tracking.uri": None if uri in (NO_TRACKING, os.environ.get("MLFLOW_TRACKING_URI")) else uri,
    }
    return {key: value for key, value in settings.items() if value is not None}


def resume_command(folder: Path, config: Config | None) -> str:
    """Returns the command that resumes a run, with the settings that have to be repeated."""
    settings = unconfirmed_settings(config) if config else {}
    texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return shlex.join(["ffdist", "resume", str(folder), *texts])


def is_in_use(folder: Path) -> bool:
    """Returns whether another process trains a run or sends its uploads, or its lock is not a regular file."""
    try:
        with FileLock(file_in(folder, LOCK)).acquire(timeout=0):
            return False
    except (Timeout, OSError, ValueError):
        return True


class Checkpoint(NamedTuple):
    """A checkpoint of a run."""

    name: str
    kind: str
    """`best` (on validation), `last`, or empty for any other."""
    path: str
    manifest: Manifest | None
    """None if only a model of it exists."""

    def __str__(self) -> str:
        """Returns the kind and the path."""
        return f"{self.kind}, {self.path}".removeprefix(", ")


def find_checkpoint(checkpoints: Checkpoints, which: str | None = None) -> Checkpoint:
    """Finds a checkpoint of a run.

    Args:
        checkpoints: Checkpoints of the run.
        which: `best`, `last` or a name; by default the best one if the run was validated, else the last.

    Raises:
        ConfigError: There is no such checkpoint, or it is damaged.
    """
    with as_config_error():
        names = checkpoints.names()
        if not names:
            raise ConfigError(
                f"{checkpoints.folder.path()} contains no complete checkpoint; set checkpoint.uri in the run's "
                f"configuration to the location of its checkpoints, or train the run again"
            )
        if which not in (None, "best", "last", *names):
            raise ConfigError(
                f"a checkpoint must be best, last or the name of one (given: {which}, {checkpoints.folder.path()} has: "
                f"{', '.join(names)})"
            )
        best = None if which == "last" else checkpoints.read_manifest(names[-1]).best_checkpoint
        if which == "best" and best is None:
            raise ConfigError(
                f"{checkpoints.folder.path()} has no best checkpoint, because the run was not validated; use last, or "
                f"set training.validation_samples in a new run"
            )
        name = names[-1] if which == "last" else best or names[-1] if which in (None, "best") else str(which)
        kind = "best" if name == best else "last" if name == names[-1] else ""
        return Checkpoint(name, kind, checkpoints.path(name), checkpoints.read_manifest(name))


def check_data(config: Config, dataset: Dataset, manifest: Manifest, folder: Path) -> None:
    """Checks that a dataset is the one that a run was trained, validated and tested on.

    Raises:
        ConfigError: It is another dataset.
    """
    digests = (
        ("train", "trained", manifest.dataset_sha256),
        ("validation", "validated", manifest.validation_dataset_sha256),
        ("test", "tested", manifest.test_dataset_sha256),
    )
    for split, verb, digest in digests:
        if digest is not None and digest != dataset.sha256(split):
            key = "data.path" if config.data.path else "data.root"
            is_located = config.data.is_loadable or config.data.root
            fix = f"set {key} to the location of the original data" if is_located else "give it the original data"
            raise ConfigError(
                f"{folder} was {verb} on other samples than {config.data.path or config.data.name} contains now (the "
                f"SHA-256 of the {split} samples differs); {fix}"
            )


def network_of(architecture: Architecture, state: State) -> Network:
    """Returns a network for inference, with the weights in a state."""
    parts = architecture.parts.items()
    tensors = {f"{module}.{name}": tensor for key, module in parts for name, tensor in state[key].items()}
    return Network.for_inference(architecture, tensors)


@contextmanager
def as_config_error() -> Iterator[None]:
    """Converts CheckpointError in a `with` block to ConfigError, because no run has started yet."""
    try:
        yield
    except CheckpointError as error:
        raise config_error(error, "restore it from a backup, or train the run again") from error


def config_error(error: CheckpointError, remedy: str) -> ConfigError:
    """Returns the ConfigError for a CheckpointError; a remedy is added if the checkpoint is damaged."""
    return ConfigError(f"{error}; {remedy}" if isinstance(error, DamagedCheckpoint) else str(error))
