"""Access to the tracking store, which is an MLflow server or a SQLite database."""

import base64
import json
import logging
import os
import shlex
import sqlite3
import ssl
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock

from ffdist.config.sections import Tracking
from ffdist.config.values import NO_TRACKING, reject_secrets, with_absolute_path
from ffdist.errors import ConfigError
from ffdist.storage.files import file_in

HINT = "make it reachable, or set tracking.uri to another store"
SQLITE = "sqlite:///"
GIT_COMMIT = "mlflow.source.git.commit"
"""Tag that the MLflow UI shows as the version of a run."""
TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}
"""Experiment tag that opens the MLflow UI on runs and curves instead of its pages for language models."""
DESCRIPTION = "mlflow.note.content"
"""Tag that the MLflow UI shows as the description of a run, in Markdown."""
ARTIFACT_COLUMNS = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)
"""Tables and columns of the MLflow database that hold artifact paths."""
RUNS_QUERY = "select run_uuid from runs join experiments using (experiment_id) where artifact_location = ?"
LOCATIONS_QUERY = (
    "select artifact_location from experiments join experiment_tags using (experiment_id) where key = ? and value = ?"
)
DEFAULT_EXPERIMENT = "ffdist"
PARENT_RUN = "mlflow.parentRunId"
"""Tag that nests a run under another one in the MLflow UI."""
VIEW = "ffdist"
VIEW_COLUMNS = (
    *("attributes.`Created`", "attributes.`Description`", "attributes.`Duration`"),
    *("metrics.`test/goodness_error`", "metrics.`test/readout_error`"),
    *("params.`model.layers`", "params.`negatives.kind`", "params.`training.epochs`", "params.`seed`"),
)
"""Columns of the table of runs in the UI; MLflow's default columns contain no metric."""

_QUIET_LOGGERS = ("mlflow", "alembic")
_CHANGED_LOGGERS = [logging.getLogger(name) for name in ("", "sqlalchemy", "sqlalchemy.engine", *_QUIET_LOGGERS)]
"""Loggers whose levels MLflow changes when it creates a database."""
_saved_levels: dict[logging.Logger, int] = {}
_num_quiet_blocks, _quiet_lock = 0, threading.Lock()


def default_uri(runs: Path) -> str:
    """Returns the URI of the default database in a runs folder."""
    return f"{SQLITE}{runs.resolve() / 'mlflow.db'}"


def tracking_uri(config: Tracking, runs: Path) -> str:
    """Returns the tracking URI: `tracking.uri`, else MLFLOW_TRACKING_URI, else the default database of the runs folder.

    Raises:
        ConfigError: The URI has a password, or is the path of a database that MLflow would read as another path.
    """
    try:
        environment_uri = reject_secrets(os.environ.get("MLFLOW_TRACKING_URI", ""))
        uri = config.uri or (with_absolute_path(environment_uri) if environment_uri else default_uri(runs))
    except ValueError as error:
        raise ConfigError(f"MLFLOW_TRACKING_URI: {error}") from None
    if uri.startswith(SQLITE) and ("?" in uri or unquote(uri) != uri):
        raise ConfigError(
            f"a database's path must not contain ? or escapes such as %20 (uri: {uri}); set --runs or tracking.uri"
        )
    return uri


def active_run_id(uri: str) -> str:
    """Returns the id of the MLflow run that this thread has started at a tracking URI, such as in a notebook, or ""."""
    if uri == NO_TRACKING or "mlflow" not in sys.modules:  # a process that has not imported it has no active run
        return ""
    import mlflow  # waits if another thread is importing it

    run = mlflow.active_run() if with_absolute_path(mlflow.get_tracking_uri()) == uri else None
    return str(run.info.run_id) if run else ""


def ui_command(uri: str, experiment: str, runs: Path) -> str:
    """Returns the command or URL that shows the tracked runs; empty if they are not tracked."""
    if uri == NO_TRACKING:
        return ""
    if uri == default_uri(runs):
        runs_option = "" if runs == Path("runs") else f" --runs {shlex.quote(str(runs))}"
        name_option = "" if experiment == DEFAULT_EXPERIMENT else f" --experiment {shlex.quote(experiment)}"
        return f"ffdist ui{runs_option}{name_option}"
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def runs_page(uri: str, experiment: str | None) -> str:
    """Returns the URL path of an experiment's runs in the MLflow UI, and stores a view of them with `VIEW_COLUMNS`.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment, or None for the default one.

    Raises:
        ConfigError: There is no such experiment, or the store cannot be reached.
    """
    with open_client(uri) as client:
        page_experiment = find_experiment(client, uri, experiment)
        view = json.dumps({"selectedColumns": VIEW_COLUMNS}).encode()  # format of the UI's shared views
        tag = "deflate;" + base64.b64encode(zlib.compress(view)).decode()
        client.set_experiment_tag(page_experiment.experiment_id, f"mlflow.sharedViewState.{VIEW}", tag)
    return f"/#/experiments/{page_experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def find_experiment(client: Any, uri: str, name: str | None) -> Any:
    """Returns the MLflow experiment with a name, or the default one: of the environment variables, or else `ffdist`.

    Raises:
        ConfigError: There is no such experiment.
    """
    if existing := _existing_experiment(client, name):
        return existing
    names = ", ".join(each.name for each in client.search_experiments(max_results=20))
    raise ConfigError(f"there is no experiment {_new_name(name)} at {uri} (experiments: {names}); set --experiment")


def experiments_of(client: Any, run_ids: Iterable[str]) -> set[str]:
    """Returns the ids of the experiments of runs; runs that do not exist are left out."""
    from mlflow.exceptions import MlflowException

    experiments = set[str]()
    for run_id in run_ids:
        try:
            experiments.add(client.get_run(run_id).info.experiment_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return experiments


def _existing_experiment(client: Any, name: str | None, run_id: str = "") -> Any | None:
    if run_id and not name:
        return client.get_experiment(_unfinished_run(client, run_id).info.experiment_id)
    experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or not experiment_id:
        return client.get_experiment_by_name(_new_name(name))
    from mlflow.exceptions import MlflowException

    try:
        return client.get_experiment(experiment_id)
    except MlflowException as error:
        raise ConfigError(
            f"MLFLOW_EXPERIMENT_ID must be the id of an experiment (given: {experiment_id}; {error_text(error)}); "
            f"correct it, or set tracking.experiment"
        ) from error


def _unfinished_run(client: Any, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    rule = "MLFLOW_RUN_ID, or the active run, must be a run that has not ended"
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise ConfigError(f"{rule} (run: {run_id}; {error_text(error)}); unset it") from error
    if run.info.status not in ("RUNNING", "SCHEDULED") or run.info.lifecycle_stage == "deleted":
        raise ConfigError(f"{rule} (run: {run_id}, {run.info.status.lower()}, {run.info.lifecycle_stage}); unset it")
    return run


def _new_name(name: str | None) -> str:
    return name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


@contextmanager
def open_client(uri: str) -> Iterator[Any]:
    """Yields an MLflow client, and converts MLflow's exceptions inside the block.

    Raises:
        ConfigError: The store cannot be reached, or a request in the block fails.
    """
    if uri == NO_TRACKING:
        raise ConfigError(
            f"MLflow is switched off, and is needed here (tracking URI: {uri}); set tracking.uri or "
            f"MLFLOW_TRACKING_URI to a tracking store"
        )
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise ConfigError(f"there is no tracking database at {uri}; correct the URI, or restore the database")
    check_server(uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(uri)
    except MlflowException as error:
        raise ConfigError(f"a request to the tracking store at {uri} failed ({error_text(error)})") from error


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Limits the logs of MLflow and Alembic to errors inside the block; blocks of several threads may overlap.

    Raises:
        ConfigError: MLflow cannot be imported, because the user has no home folder.
    """
    try:
        import mlflow  # noqa: F401, the import sets the level of its logger
    except RuntimeError as error:
        raise ConfigError(f"MLflow needs a home folder ({error}); set HOME") from error

    global _num_quiet_blocks
    with _quiet_lock:
        _num_quiet_blocks += 1
        for logger in _CHANGED_LOGGERS if _num_quiet_blocks == 1 else ():
            _saved_levels[logger] = logger.level
            if logger.name in _QUIET_LOGGERS:
                logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _quiet_lock:
            _num_quiet_blocks -= 1
            for logger in _CHANGED_LOGGERS if not _num_quiet_blocks else ():
                logger.setLevel(_saved_levels[logger])


def open_store(
    uri: str, experiment: str | None, runs: Path, run_id: str = "", *, needs_experiment: bool = True
) -> tuple[Any, Any]:
    """Returns an MLflow client and the experiment; creates the database and the experiment if they do not exist.

    Args:
        uri: Tracking URI, as `tracking_uri` returns it.
        experiment: Name of the experiment, or None for the default one, as `find_experiment` returns it.
        runs: Runs folder, which holds the artifacts of the default database.
        run_id: MLflow run whose experiment is the default one.
        needs_experiment: Whether the experiment is used; otherwise it is None, as for a run that is resumed in its own.

    Raises:
        ConfigError: The experiment is deleted, or the run has ended or does not exist.
    """
    from mlflow import MlflowClient

    # Two runs that start at the same time must not both create the database or the experiment.
    with FileLock(file_in(runs, ".mlflow.lock")):
        if uri.startswith(SQLITE):
            create_database(Path(uri.removeprefix(SQLITE)))
        if uri == default_uri(runs):
            update_artifact_paths(runs)
        client = MlflowClient(uri)
        if not needs_experiment:
            return client, None
        if existing := _existing_experiment(client, experiment, run_id):
            if existing.lifecycle_stage == "deleted":
                raise ConfigError(
                    f"the experiment must be active (experiment: {existing.name}, deleted at {uri}); "
                    f"restore it with `mlflow experiments restore`, or set tracking.experiment"
                )
            return client, existing
        artifacts = (runs.resolve() / "artifacts").as_uri() if uri == default_uri(runs) else None
        return client, client.get_experiment(client.create_experiment(_new_name(experiment), artifacts, TRAINING_VIEW))


def update_artifact_paths(runs: Path) -> None:
    """Updates the artifact paths in the default database of a runs folder, which may have been moved or copied.

    MLflow stores absolute paths and has no API to change them. An experiment is updated only if artifacts of its runs
    are in the folder, or if ffdist created it and its old location no longer exists.
    """
    folder = runs.resolve() / "artifacts"
    new = folder.as_uri()
    with suppress(sqlite3.Error), closing(sqlite3.connect(runs.resolve() / "mlflow.db")) as database, database:
        locations = {row[0] for row in database.execute("select artifact_location from experiments")}
        ffdist_locations = {row[0] for row in database.execute(LOCATIONS_QUERY, *TRAINING_VIEW.items())}
        for old in locations - {new}:
            if isinstance(old, str) and old.startswith("file:///") and old.endswith("/artifacts"):
                is_missing = old in ffdist_locations and not Path(unquote(old.removeprefix("file://"))).exists()
                if is_missing or any((folder / str(row[0])).exists() for row in database.execute(RUNS_QUERY, (old,))):
                    _replace_prefix(database, old, new)


def _replace_prefix(database: sqlite3.Connection, old: str, new: str) -> None:
    for table, column in ARTIFACT_COLUMNS:
        database.execute(
            f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? or substr({column}, 1, ?) = ?",
            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
        )


def database_has_run(uri: str, run_id: str) -> bool:
    """Returns whether an MLflow database has a run, without writing to the database."""
    path = Path(uri.removeprefix(SQLITE))
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        return bool(database.execute("select 1 from runs where run_uuid = ?", (run_id,)).fetchone())
    return False


def trusted_uri(folder: Path, summary_uri: str, run_id: str, runs: Path) -> str:
    """Returns the tracking URI of a finished run, if a trusted source confirms it.

    The folder may come from another person. Its URI alone is not used, because MLflow would send the user's
    credentials to that server or modify that database.

    Args:
        folder: Folder of the run.
        summary_uri: Tracking URI in the summary of the run.
        run_id: MLflow run id.
        runs: Runs folder.

    Raises:
        ConfigError: Only the folder of the run names this URI.
    """
    for uri in (tracking_uri(Tracking(), runs), default_uri(folder.resolve().parent)):
        if uri == summary_uri or (uri.startswith(SQLITE) and database_has_run(uri, run_id)):  # it may have been moved
            return uri
    raise ConfigError(
        f"{folder} must be tracked in its runs folder or at MLFLOW_TRACKING_URI (uri: {summary_uri}); to log metrics "
        f"there, set MLFLOW_TRACKING_URI={shlex.quote(summary_uri)}"
    )


def error_text(error: BaseException) -> str:
    """Returns the message of an error on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


def create_database(path: Path) -> None:
    """Creates a database if it does not exist.

    The rename comes after all migrations, because an interrupted migration leaves a database that cannot be opened.
    """
    from mlflow import MlflowClient

    if path.is_file() and path.stat().st_size:
        return
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    MlflowClient(f"{SQLITE}{part.absolute()}").search_experiments()
    part.rename(path)


def check_server(uri: str) -> None:
    """Checks once that the tracking store can be reached, because MLflow itself retries for minutes.

    Raises:
        ConfigError: The store cannot be reached.
    """
    try:
        if uri.startswith(SQLITE):
            with closing(sqlite3.connect(uri.removeprefix(SQLITE))) as database:
                database.execute("pragma schema_version")
        elif uri.startswith(("http://", "https://")):
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
    except (OSError, ValueError, HTTPException, sqlite3.Error) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code < 500:
            return  # the server is up; from 500 on, a proxy may report that it is down
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            return  # MLflow has its own environment variables for certificates
        raise ConfigError(f"tracking at {uri} is not possible ({error}); {HINT}") from error
