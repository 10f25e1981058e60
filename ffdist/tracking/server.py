"""Where runs are tracked: finding the server or database, and asking it."""

import base64
import json
import logging
import os
import shlex
import sqlite3
import ssl
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock

from ffdist.config import ConfigError
from ffdist.files import file_in
from ffdist.sections import Tracking, absolute_store, hold_no_secret

WAY_OUT = "make it reachable, or set tracking.uri to another place"
SQLITE = "sqlite:///"
GIT_COMMIT = "mlflow.source.git.commit"
"""Tag that MLflow's UI shows as a run's version."""
TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's UI open on runs and curves, not on its pages for language models."""
DESCRIPTION = "mlflow.note.content"
"""Tag that MLflow's UI shows as a run's description, as Markdown."""
ARTIFACT_COLUMNS = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)
"""Where MLflow's database keeps paths of artifacts."""
RUNS = "select run_uuid from runs join experiments using (experiment_id) where artifact_location = ?"
MADE = (
    "select artifact_location from experiments join experiment_tags using (experiment_id) where key = ? and value = ?"
)
EXPERIMENT = Tracking().experiment
VIEW = "ffdist"
COLUMNS = (
    *("attributes.`Created`", "attributes.`Description`", "attributes.`Duration`"),
    *("metrics.`test/goodness_error`", "metrics.`test/readout_error`"),
    *("params.`model.layers`", "params.`negatives.kind`", "params.`training.epochs`", "params.`seed`"),
)
"""What the table of runs shows; MLflow's own choice has no figure among them."""


_QUIET = ("mlflow", "alembic")
_LOGGERS = [logging.getLogger(name) for name in ("", "sqlalchemy", "sqlalchemy.engine", *_QUIET)]
"""Whose levels MLflow sets when it makes a database."""
_levels: dict[logging.Logger, int] = {}
_quiet_blocks, _quieting = 0, threading.Lock()


def default_uri(runs: Path) -> str:
    """Returns the database under a runs folder, as MLflow names it."""
    return f"{SQLITE}{runs.resolve() / 'mlflow.db'}"


def tracking_uri(config: Tracking, runs: Path) -> str:
    """Returns where a run is tracked: the configuration's word, else the environment's, else the runs folder.

    Raises:
        ConfigError: There is a password in it, or a database's path that would be taken for another.
    """
    try:
        named = hold_no_secret(os.environ.get("MLFLOW_TRACKING_URI", ""))
        uri = config.uri or (absolute_store(named) if named else default_uri(runs))
    except ValueError as error:
        raise ConfigError(f"MLFLOW_TRACKING_URI: {error}") from None
    if uri.startswith(SQLITE) and ("?" in uri or unquote(uri) != uri):
        raise ConfigError(f"a database's path must hold no ? and nothing like %20 ({uri}); set --runs or tracking.uri")
    return uri


def how_to_look(uri: str, experiment: str, runs: Path) -> str:
    """Returns the command or address that shows what was tracked."""
    if uri == default_uri(runs):
        where = "" if runs == Path("runs") else f" --runs {shlex.quote(str(runs))}"
        return f"ffdist ui{where}" + ("" if experiment == EXPERIMENT else f" --experiment {shlex.quote(experiment)}")
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def log_to_run(uri: str, run_id: str, metrics: dict[str, float], *, beside: str) -> None:
    """Adds metrics to a run that has ended.

    Args:
        uri: Where it is tracked.
        run_id: The run's.
        metrics: By name.
        beside: A metric with whose last point they stand; so the same once more makes no second point.

    Raises:
        ConfigError: It is not at `uri`, or cannot be reached there.
    """
    with a_client(uri) as client:
        points = [(point.step, point.timestamp) for point in client.get_metric_history(run_id, beside)]
        step, timestamp = max(points, default=(None, None))
        for name, value in metrics.items():
            client.log_metric(run_id, name, value, timestamp, step)


def metric_histories(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Returns all points of a run, as step and value, by metric.

    Raises:
        ConfigError: It is not at `uri`, or cannot be reached there.
    """
    with a_client(uri) as client:
        return {
            name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
            for name in client.get_run(run_id).data.metrics
        }


def runs_page(uri: str, experiment: str) -> str:
    """Returns where MLflow's UI shows the runs of an experiment, after its host, and prepares the view of them.

    Args:
        uri: Tracking server or database.
        experiment: Its name.

    Raises:
        ConfigError: It is not there, or cannot be reached.
    """
    with a_client(uri) as client:
        found = find_experiment(client, uri, experiment)
        view = json.dumps({"selectedColumns": COLUMNS}).encode()  # as the UI itself keeps a view that is shared
        tag = "deflate;" + base64.b64encode(zlib.compress(view)).decode()
        client.set_experiment_tag(found.experiment_id, f"mlflow.sharedViewState.{VIEW}", tag)
    return f"/#/experiments/{found.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def find_experiment(client: Any, uri: str, name: str) -> Any:
    """Returns MLflow's experiment of a name.

    Raises:
        ConfigError: There is none.
    """
    if found := client.get_experiment_by_name(name):
        return found
    names = ", ".join(known.name for known in client.search_experiments(max_results=20))
    raise ConfigError(f"there is no experiment {name} at {uri} (there are: {names}); set --experiment")


@contextmanager
def a_client(uri: str) -> Iterator[Any]:
    """Opens MLflow's client for the length of a `with` block.

    Raises:
        ConfigError: What is asked of the server or database at `uri` is not there, or it cannot be reached.
    """
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise ConfigError(
            f"there is no tracking database at {uri}, where the runs should be; "
            "correct the address, or bring it back there"
        )
    check_server(uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(uri)
    except MlflowException as error:
        raise ConfigError(f"tracking at {uri} does not give what is asked ({brief(error)})") from error


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Has MLflow and its database library log errors alone, for the length of a `with` block in whatever thread.

    Raises:
        ConfigError: MLflow cannot be imported, because the user has no home folder.
    """
    try:
        import mlflow  # noqa: F401, which sets its own level
    except RuntimeError as error:
        raise ConfigError(f"MLflow needs a home folder ({error}); set HOME") from error

    global _quiet_blocks
    with _quieting:
        _quiet_blocks += 1
        for logger in _LOGGERS if _quiet_blocks == 1 else ():
            _levels[logger] = logger.level
            if logger.name in _QUIET:
                logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _quieting:
            _quiet_blocks -= 1
            for logger in _LOGGERS if not _quiet_blocks else ():
                logger.setLevel(_levels[logger])


def open_store(uri: str, experiment: str, runs: Path) -> tuple[Any, str]:
    """Returns MLflow's client and the experiment's id; makes database and experiment where they are missing.

    Args:
        uri: As `tracking_uri` returns it.
        experiment: Its name.
        runs: Runs folder; artifacts of the default database lie in it.
    """
    from mlflow import MlflowClient

    # Two runs that start at once must not both create the database, or the experiment.
    with FileLock(file_in(runs, ".mlflow.lock")):
        if uri.startswith(SQLITE):
            make_database(Path(uri.removeprefix(SQLITE)))
        if uri == default_uri(runs):
            follow_folder(runs)
        client = MlflowClient(uri)
        if found := client.get_experiment_by_name(experiment):
            if found.lifecycle_stage == "deleted":
                raise ConfigError(
                    f"the experiment must be active (experiment: {experiment}, deleted at {uri}); "
                    f"restore it by `mlflow experiments restore`, or set tracking.experiment"
                )
            return client, found.experiment_id
        artifacts = (runs.resolve() / "artifacts").as_uri() if uri == default_uri(runs) else None
        return client, client.create_experiment(experiment, artifacts, TRAINING_VIEW)


def follow_folder(runs: Path) -> None:
    """Has the artifacts of a runs folder's own database lie in that folder, which may have been moved or copied.

    MLflow keeps absolute paths and cannot change them. The location of an experiment is left as it is unless artifacts
    of its runs are in the folder; or, of one that ffdist made, unless it is gone.
    """
    folder = runs.resolve() / "artifacts"
    place = folder.as_uri()
    with suppress(sqlite3.Error), closing(sqlite3.connect(runs.resolve() / "mlflow.db")) as database, database:
        found = {row[0] for row in database.execute("select artifact_location from experiments")}
        made = {row[0] for row in database.execute(MADE, *TRAINING_VIEW.items())}
        for old in found - {place}:
            if isinstance(old, str) and old.startswith("file:///") and old.endswith("/artifacts"):
                is_gone = old in made and not Path(unquote(old.removeprefix("file://"))).exists()
                if is_gone or any((folder / str(row[0])).exists() for row in database.execute(RUNS, (old,))):
                    _move_artifacts(database, old, place)


def _move_artifacts(database: sqlite3.Connection, old: str, new: str) -> None:
    for table, column in ARTIFACT_COLUMNS:
        database.execute(
            f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? or substr({column}, 1, ?) = ?",
            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
        )


def database_has_run(uri: str, run_id: str) -> bool:
    """Says whether a SQLite database of MLflow has a run, without changing it."""
    path = Path(uri.removeprefix(SQLITE))
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        return bool(database.execute("select 1 from runs where run_uuid = ?", (run_id,)).fetchone())
    return False


def uri_of_finished(folder: Path, recorded: str, run_id: str, runs: Path) -> str:
    """Returns where a finished run is tracked, as far as its folder may decide that.

    A folder may come from somebody else. It cannot name a server that is then sent the user's credentials, nor a
    database that MLflow would change.

    Args:
        folder: Of the run.
        recorded: The URI in its summary.
        run_id: Of MLflow.
        runs: Runs folder.

    Raises:
        ConfigError: Only its folder names that place.
    """
    own = default_uri(folder.resolve().parent)
    for uri in (tracking_uri(Tracking(), runs), own):
        if uri == recorded or (uri.startswith(SQLITE) and database_has_run(uri, run_id)):  # which may have been moved
            return uri
    raise ConfigError(
        f"{folder} was tracked at another place than its runs folder ({recorded}); to add figures there, set "
        f"MLFLOW_TRACKING_URI={shlex.quote(recorded)}"
    )


def make_run(uri: str, client: Any, experiment_id: str, name: str) -> str:
    """Makes a run and returns its id.

    Args:
        uri: Where.
        client: MLflow's.
        experiment_id: Of MLflow.
        name: The run's.

    Raises:
        ConfigError: The store refuses it.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils.git_utils import get_git_commit

    tags = resolve_tags()
    if commit := get_git_commit(str(Path.cwd())):
        tags[GIT_COMMIT] = commit
    try:
        run_id: str = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    except MlflowException as error:
        raise ConfigError(f"tracking at {uri} is not possible ({brief(error)}); {WAY_OUT}") from error
    return run_id


def log_dataset(client: Any, run_id: str, *, name: str, digest: str, source: str, profile: dict[str, Any]) -> None:
    """Logs what a run is trained on.

    Args:
        client: MLflow's.
        run_id: The run's.
        name: The dataset's.
        digest: Of its training samples; MLflow takes 36 characters.
        source: Where it is from.
        profile: What is in it.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name, digest[:36], "ffdist", source, profile=json.dumps(profile))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def brief(error: BaseException) -> str:
    """Returns the words of an error, on one line and not too many."""
    return " ".join(str(error).split())[:300]


def make_database(path: Path) -> None:
    """Makes a database where there is none, renamed into place when MLflow is done with its many tables.

    An interrupt among them would leave one that no later run can open.
    """
    from mlflow import MlflowClient

    if path.is_file() and path.stat().st_size:
        return
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    MlflowClient(f"{SQLITE}{part.absolute()}").search_experiments()
    part.rename(path)


def check_server(uri: str) -> None:
    """Asks once, before MLflow does, which would go on asking for minutes."""
    try:
        if uri.startswith(SQLITE):
            with closing(sqlite3.connect(uri.removeprefix(SQLITE))) as database:
                database.execute("pragma schema_version")
        elif uri.startswith(("http://", "https://")):
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
    except (OSError, ValueError, HTTPException, sqlite3.Error) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code < 500:
            return  # it answers, which is all that is asked here; 500 and more may be a proxy's word that it is away
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            return  # MLflow has variables of its own that say what to trust
        raise ConfigError(f"tracking at {uri} is not possible ({error}); {WAY_OUT}") from error
