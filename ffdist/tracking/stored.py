"""Models in the tracking store: which one a URI names, and its files."""

import hashlib
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ffdist.errors import ConfigError
from ffdist.storage.files import path_in
from ffdist.tracking.model import CHECKPOINT, DATA, NAME
from ffdist.tracking.server import default_uri, error_text, open_client, quiet_mlflow, update_artifact_paths

RUNS, MODELS = "runs:/", "models:/"
"""Schemes of MLflow's URIs of runs and models."""
MODEL_URI = re.compile(r"(?P<id>m-[^/@]+)|(?P<name>[^/@]+)(/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))")
DOWNLOADS = ".models"
"""Folder of downloaded models in the runs folder."""


class StoredModel(NamedTuple):
    """A model in the tracking store."""

    key: str
    """Its id; of a version without one, name and version."""
    run_id: str
    """MLflow id of the run that made it."""
    checkpoint: str | None
    """Checkpoint with its weights, if that is known."""
    location: str
    """URI of its files."""


def run_id_of(uri: str) -> str:
    """Returns the MLflow run id in `ID`, `runs:/ID` or `runs:/ID/model`."""
    return uri.removeprefix(RUNS).removesuffix(f"/{NAME}")


def find_model(uri: str, tracking_uri: str, runs: Path) -> StoredModel:
    """Finds a model: `runs:/ID` is the model of a run's results, `models:/...` is one of MLflow's model URIs.

    Args:
        uri: URI of the model: `runs:/ID`, `runs:/ID/model`, `models:/NAME/VERSION`, `models:/NAME@ALIAS` or
            `models:/m-ID`.
        tracking_uri: Tracking URI.
        runs: Runs folder, which may hold the tracking database.

    Raises:
        ConfigError: There is no such model, or the tracking store cannot be reached.
    """
    if tracking_uri == default_uri(runs):
        update_artifact_paths(runs)
    with open_client(tracking_uri) as client, quiet_mlflow():
        if uri.startswith(RUNS):
            return _model_of_run(client, uri)
        match = MODEL_URI.fullmatch(uri.removeprefix(MODELS))
        if not match:
            raise ConfigError(
                f"a model must be models:/NAME/VERSION, models:/NAME@ALIAS or models:/m-ID (given: {uri:.200})"
            )
        if match["id"]:
            return _stored(client.get_logged_model(match["id"]))
        if match["alias"]:
            version = client.get_model_version_by_alias(match["name"], match["alias"])
        else:
            version = client.get_model_version(match["name"], match["version"])
        if version.model_id:
            return _stored(client.get_logged_model(version.model_id))
        return StoredModel(f"{version.name}-{version.version}", version.run_id, None, version.source)


def download_model(model: StoredModel, tracking_uri: str, runs: Path) -> Path:
    """Returns a folder in the runs folder with the files of the network of a model; downloads them if necessary.

    Raises:
        ConfigError: The files cannot be downloaded, or the model is not one of ffdist.
    """
    store = hashlib.sha256(tracking_uri.encode()).hexdigest()[:8]  # equal versions of two stores are two models
    path = runs / DOWNLOADS
    try:
        path = path_in(runs, f"{DOWNLOADS}/{store}-{model.key}")
        if path.is_dir():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with quiet_mlflow(), TemporaryDirectory(dir=path.parent) as temporary:
            from mlflow.artifacts import download_artifacts

            source = f"{model.location.rstrip('/')}/data/{DATA}"
            files = download_artifacts(artifact_uri=source, dst_path=temporary, tracking_uri=tracking_uri)
            try:
                Path(files).rename(path)
            except OSError:
                if not path.is_dir():  # else another process has downloaded it meanwhile
                    raise
    except Exception as error:  # MLflow, artifact stores and the network raise many types
        raise ConfigError(
            f"the model {model.key} at {tracking_uri} cannot be downloaded ({error_text(error)}); it must have been "
            f"logged by this version of ffdist, and {runs / DOWNLOADS} must be a writable folder"
        ) from error
    return path


def _model_of_run(client: Any, uri: str) -> StoredModel:
    for output in reversed(client.get_run(run_id_of(uri)).outputs.model_outputs):
        model = client.get_logged_model(output.model_id)
        if model.name == NAME:
            return _stored(model)
    raise ConfigError(
        f"{uri} has no model, and its folder is not in the runs folder; set --runs to the folder that contains it"
    )


def _stored(model: Any) -> StoredModel:
    return StoredModel(model.model_id, model.source_run_id, model.tags.get(CHECKPOINT), model.artifact_location)
