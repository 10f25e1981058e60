"""The MLflow run of a training: everything is sent by a thread of its own, so that a slow server slows nothing."""

import logging
import os
import queue
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from ffdist.config import ConfigError
from ffdist.sections import Tracking

SEND_EVERY_S = 2.0
RETRY_EVERY_S = 0.5
OPEN_TIMEOUT_S = 60.0
FLUSH_TIMEOUT_S = 30.0
WAY_OUT = "correct tracking.uri or MLFLOW_TRACKING_URI, or leave both out to track in the runs folder"
TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's UI open on runs and curves, not on its pages for language models."""
SQLITE = "sqlite:///"
TRIES = 3
"""Of what is not a metric, such as an artifact: a store that refuses one must not hold up what follows."""
BATCH = 1000
"""Most metrics that MLflow takes in one request."""


def default_uri(runs: Path) -> str:
    """Returns the database under a runs folder, as MLflow names it."""
    return f"{SQLITE}{runs.resolve() / 'mlflow.db'}"


def tracking_uri(config: Tracking, runs: Path) -> str:
    """Returns where a run is tracked: the configuration's word, else the environment's, else the runs folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(runs)


def how_to_look(uri: str, runs: Path) -> str:
    """Returns the command or address that shows what was tracked."""
    if uri == default_uri(runs):
        return "ffdist ui" if runs == Path("runs") else f"ffdist ui --runs {runs}"
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def log_to_run(uri: str, run_id: str, metrics: dict[str, float]) -> None:
    """Adds metrics to a run that has ended.

    Raises:
        ConfigError: It is not at `uri`, or cannot be reached there.
    """
    with a_client(uri) as client:
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)


@contextmanager
def a_client(uri: str) -> Iterator[Any]:
    """Opens MLflow's client for the length of a `with` block.

    Raises:
        ConfigError: What is asked of the server or database at `uri` is not there, or it cannot be reached.
    """
    _check_server(uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(uri)
    except MlflowException as error:
        raise ConfigError(
            f"tracking at {uri} does not give what is asked ({' '.join(str(error).split())[:300]})"
        ) from error


class Tracker:
    """One MLflow run, open for the length of a `with` block.

    The store opens beside what follows, and `begin` makes the run in it. Leaving the block sends what is left and marks
    the run finished, failed, or, after an interrupt, killed.

    Args:
        uri: As `tracking_uri` returns it.
        config: Name of the experiment.
        runs: Runs folder; artifacts of the default database lie in it.

    Raises:
        ConfigError: The server or database at `uri` cannot be reached.
    """

    def __init__(self, uri: str, config: Tracking, *, runs: Path) -> None:
        self.uri, self.run_id = uri, ""
        self._config, self._runs = config, runs
        self._client: Any = None
        self._experiment_id = ""
        self._queue: queue.Queue[Any] = queue.Queue()
        self._opened, self._failure = threading.Event(), ""
        self._closing, self._deadline = threading.Event(), float("inf")
        _check_server(uri)
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def __enter__(self) -> "Tracker":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        status = "FINISHED" if kind is None else "KILLED" if killed else "FAILED"
        self._deadline = time.monotonic() + (5 if killed else FLUSH_TIMEOUT_S)
        if self.run_id:
            self._queue.put(lambda client, run: client.set_terminated(run, status))
        self._queue.put(None)
        self._closing.set()
        self._thread.join(self._deadline - time.monotonic() + 1)
        if self._thread.is_alive():
            self._failure = "its time to flush is over"
        if self._failure and kind is None:
            logging.getLogger(__name__).warning("not everything was tracked at %s: %s", self.uri, self._failure)

    def begin(self, name: str, parameters: dict[str, Any]) -> None:
        """Makes the run, once the store is open.

        Args:
            name: Name of the run.
            parameters: Logged once.

        Raises:
            ConfigError: The store cannot be opened.
        """
        if not self._opened.wait(OPEN_TIMEOUT_S):
            self._failure = f"no answer in {OPEN_TIMEOUT_S:g} s"
        if not self._client:
            raise ConfigError(f"tracking at {self.uri} is not possible ({self._failure}); {WAY_OUT}")
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        try:
            self.run_id = self._client.create_run(self._experiment_id, run_name=name).info.run_id
            self._client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in parameters.items()])
        except MlflowException as error:
            raise ConfigError(f"tracking at {self.uri} is not possible ({error}); {WAY_OUT}") from error

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Has metrics sent, with the number of samples seen as `step`; returns at once."""
        now = time.time_ns() // 1_000_000
        for name, value in metrics.items():
            self._queue.put((name, value, now, step))

    def log_tags(self, tags: dict[str, str]) -> None:
        """Has tags set; returns at once."""
        self._queue.put(lambda client, run: [client.set_tag(run, name, value) for name, value in tags.items()])

    def log_artifact(self, path: Path) -> None:
        """Has a file kept with the run; returns at once, so the file must stay as it is."""
        self._queue.put(lambda client, run: client.log_artifact(run, str(path)))

    def _work(self) -> None:
        try:
            client = self._open()
        except Exception as error:  # whatever MLflow, its store or the network raises, `begin` tells it
            self._failure = " ".join(str(error).split())[:300]
            return
        finally:
            self._opened.set()
        from mlflow.entities import Metric

        done = False
        while not done:
            items = [self._queue.get()]
            self._closing.wait(SEND_EVERY_S)
            while not self._queue.empty() and len(items) < BATCH:
                items.append(self._queue.get())
            done = items[-1] is None
            if metrics := [Metric(*item) for item in items if isinstance(item, tuple)]:
                self._send(lambda metrics=metrics: client.log_batch(self.run_id, metrics))  # type: ignore[misc]
            for item in items:
                if callable(item):
                    self._send(lambda item=item: item(client, self.run_id), tries=TRIES)  # type: ignore[misc]

    def _send(self, call: Callable[[], Any], *, tries: int | None = None) -> None:
        """Tries until it works, the run has ended and its time to flush is over, or `tries` are used up."""
        for attempt in count(1):
            try:
                call()
                return
            except Exception as error:  # whatever it is, the server may come back
                if attempt == tries or time.monotonic() > self._deadline:
                    self._failure = " ".join(str(error).split())[:300]
                    return
                time.sleep(RETRY_EVERY_S)

    def _open(self) -> Any:
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        local = self.uri == default_uri(self._runs)
        # Two runs that start at once must not both create the database, or the experiment.
        with FileLock(self._runs / ".mlflow.lock"):
            if self.uri.startswith(SQLITE):
                _make_database(Path(self.uri.removeprefix(SQLITE)))
            client = MlflowClient(self.uri)
            experiment = client.get_experiment_by_name(self._config.experiment)
            artifacts = (self._runs.resolve() / "artifacts").as_uri() if local else None
            self._experiment_id = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(self._config.experiment, artifacts, TRAINING_VIEW)
            )
        self._client = client
        return client


def _make_database(path: Path) -> None:
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


def _check_server(uri: str) -> None:
    """Asks once, before MLflow does, which would go on asking for minutes."""
    try:
        if uri.startswith(SQLITE):
            with closing(sqlite3.connect(uri.removeprefix(SQLITE))) as database:
                database.execute("pragma schema_version")
        elif uri.startswith(("http://", "https://")):
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers, which is all that is asked here
    except (OSError, ValueError, HTTPException, sqlite3.Error) as error:
        raise ConfigError(f"tracking at {uri} is not possible ({error}); {WAY_OUT}") from error
