"""The MLflow run of a training: everything is sent by a thread of its own, so that a slow server slows nothing."""

import logging
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from ffdist.config import ConfigError, Tracking

SEND_EVERY_S = 2.0
FLUSH_TIMEOUT_S = 30.0
BATCH = 1000
"""Most metrics that MLflow takes in one request."""


def default_uri(runs: Path) -> str:
    """Returns the database under a runs folder, as MLflow names it."""
    return f"sqlite:///{runs.resolve() / 'mlflow.db'}"


def tracking_uri(config: Tracking, runs: Path) -> str:
    """Returns where a run is tracked: the configuration's word, else the environment's, else the runs folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(runs)


class Tracker:
    """One MLflow run, open for the length of a `with` block.

    It opens beside what follows; `wait_until_open` says whether that went well. Leaving the block sends what is left
    and marks the run finished, failed, or, after an interrupt, killed.

    Args:
        uri: As `tracking_uri` returns it.
        config: Name of the experiment.
        runs: Runs folder; artifacts of the default database lie in it.
        name: Name of the run.
        parameters: Logged once.

    Raises:
        ConfigError: A server at `uri` does not answer.
    """

    def __init__(self, uri: str, config: Tracking, *, runs: Path, name: str, parameters: dict[str, Any]) -> None:
        self.uri, self.run_id = uri, ""
        self._config, self._runs, self._name, self._parameters = config, runs, name, parameters
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
        self._queue.put(lambda client, run: client.set_terminated(run, status))
        self._queue.put(None)
        self._closing.set()
        self._thread.join(self._deadline - time.monotonic() + 1)
        if self._failure and kind is None:
            logging.getLogger(__name__).warning("not everything was tracked at %s: %s", self.uri, self._failure)

    def wait_until_open(self) -> None:
        """Waits until the run exists.

        Raises:
            ConfigError: It cannot be made.
        """
        self._opened.wait()
        if not self.run_id:
            raise ConfigError(
                f"no MLflow run can be made at {self.uri} ({self._failure}); correct tracking.uri or "
                f"MLFLOW_TRACKING_URI, or leave both out to track in the runs folder"
            )

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Has metrics sent, with the number of samples seen as `step`; returns at once."""
        now = time.time_ns() // 1_000_000
        for name, value in metrics.items():
            self._queue.put((name, value, now, step))

    def log_tags(self, tags: dict[str, str]) -> None:
        """Has tags set; returns at once."""
        self._queue.put(lambda client, run: [client.set_tag(run, name, value) for name, value in tags.items()])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Has a file kept with the run; returns at once, so the file must stay as it is."""
        self._queue.put(lambda client, run: client.log_artifact(run, str(path), folder))

    def _work(self) -> None:
        try:
            client = self._open()
        except Exception as error:  # whatever MLflow, its store or the network raises, it is told in wait_until_open
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
            metrics = [Metric(*item) for item in items if isinstance(item, tuple)]
            self._send(lambda metrics=metrics: client.log_batch(self.run_id, metrics))  # type: ignore[misc]
            for item in items:
                if callable(item):
                    self._send(lambda item=item: item(client, self.run_id))  # type: ignore[misc]

    def _send(self, call: Callable[[], Any]) -> None:
        while True:
            try:
                call()
                return
            except Exception as error:  # the server may come back: kept and tried again until the run's end
                self._failure = " ".join(str(error).split())[:300]
                if time.monotonic() > self._deadline:
                    return
                self._closing.wait(SEND_EVERY_S) and time.sleep(0.5)

    def _open(self) -> Any:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        local = self.uri == default_uri(self._runs)
        self._runs.mkdir(parents=True, exist_ok=True)
        # Two runs that start at once must not both create the database, or the experiment.
        with FileLock(self._runs / ".mlflow.lock"):
            client = MlflowClient(self.uri)
            experiment = client.get_experiment_by_name(self._config.experiment)
            artifacts = (self._runs.resolve() / "artifacts").as_uri() if local else None
            identity = experiment.experiment_id if experiment else client.create_experiment(self._config.experiment, artifacts)
        run = client.create_run(identity, run_name=self._name)
        client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in self._parameters.items()])
        self.run_id = run.info.run_id
        return client


def _check_server(uri: str) -> None:
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return  # it answers, which is all that is asked here
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tracking server at {uri} does not answer ({error}); start it, or correct tracking.uri or "
            f"MLFLOW_TRACKING_URI, or leave both out to track in the runs folder"
        ) from error
