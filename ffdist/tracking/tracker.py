"""Tracks a run in MLflow. A background thread sends everything, so that a slow server does not delay training.

Metrics pass through an outbox in the run's folder, so that no crash loses or duplicates them.
"""

import json
import logging
import os
import shlex
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ffdist.config.loading import CONFIG
from ffdist.config.sections import Tracking
from ffdist.config.values import NO_TRACKING
from ffdist.errors import ClusterStopped, ConfigError
from ffdist.export.ffdist_served_model import PROGRAM
from ffdist.export.network import Names, save_network
from ffdist.export.program import save_program
from ffdist.ff.network import Network
from ffdist.storage.files import file_in, path_in
from ffdist.tracking import sync
from ffdist.tracking.outbox import ORIGIN, OUTBOX, REASON, RECOVERIES, STATUS, Outbox, Point
from ffdist.tracking.server import (
    GIT_COMMIT,
    HINT,
    PARENT_RUN,
    active_run_id,
    check_server,
    error_text,
    open_store,
    quiet_mlflow,
)
from ffdist.tracking.sinks import Sinks, check_packages
from ffdist.tracking.sync import LOCK, NETWORK
from ffdist.tracking.system import SystemMonitor

SEND_INTERVAL_S, RETRY_INTERVAL_S = 2.0, 0.5
MAX_UPLOAD_RETRY_S = 60.0
"""Longest time between two attempts to use a failing artifact store during a run."""
LEFTOVERS_TIMEOUT_S = 5.0
"""Longest time that the end of a run waits for the uploads of other runs."""
OPEN_TIMEOUT_S = 60.0
INTERRUPTED_FLUSH_S = 3.0
LOCK_TIMEOUT_S = 5.0


class Tracker:
    """Context manager for one MLflow run. With the tracking URI `none`, the run is recorded in its folder only.

    Entering the block opens the tracking store in the background. Leaving it sends everything that is pending and sets
    the status to finished, failed or, after an interrupt, killed. Uploads that fail stay in the run's folder. The next
    run in the same runs folder sends them, and marks this run as killed if its process died.

    Args:
        uri: Tracking URI, as `tracking_uri` returns it.
        config: Section `tracking` of the configuration.
        runs: Runs folder, which holds the artifacts of the default database.
        is_new: Whether a run is begun, not resumed. Only a new run uses MLFLOW_RUN_ID, and can get a parent run.

    Raises:
        ConfigError: The tracking store cannot be reached, or a package is missing.
    """

    def __init__(self, uri: str, config: Tracking, *, runs: Path, is_new: bool = True) -> None:
        self.uri, self.run_id, self.experiment = uri, "", ""
        """Tracking URI, MLflow run id, which is empty until `begin` or `resume` is called, and experiment."""
        self.is_on, self._parent_id = uri != NO_TRACKING, active_run_id(uri) if is_new else ""
        """Whether the run is tracked by MLflow, and id of its parent run or empty."""
        self._release_lock, self._num_users = threading.Lock(), 2  # this object and its thread use the outbox
        self._programs: TemporaryDirectory[str] | None = None
        self._config, self._runs = config, runs
        self._given_id, self._is_new = os.environ.get("MLFLOW_RUN_ID", "") if is_new else "", is_new
        self._client: Any = None
        self._experiment_id, self._samples = "", 0
        self._sinks: Sinks | None = None
        self._is_refused = False
        self._folder, self._lock = Path(), FileLock("")
        self._outbox: Outbox | None = None
        self._open_event, self._failure = threading.Event(), ""
        self._is_flush_short = False
        self._close_event, self._deadline = threading.Event(), float("inf")
        self._next_upload_at, self._upload_wait_s = 0.0, 0.0
        check_server(uri)
        check_packages(config.also)
        self._thread = threading.Thread(target=self._run_thread, name="tracker", daemon=True)
        self._leftovers_thread: threading.Thread | None = None
        self._stop_leftovers = threading.Event()
        self._plot_executor = ThreadPoolExecutor(1, "plots")

    def __enter__(self) -> "Tracker":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | ClusterStopped)
        status = "FINISHED" if kind is None else "KILLED" if killed else "FAILED"
        is_flush_short = killed or self._is_flush_short
        self._deadline = time.monotonic() + (INTERRUPTED_FLUSH_S if is_flush_short else self._config.flush_timeout_s)
        if kind is not None or is_flush_short:
            self._stop_leftovers.set()
        self._plot_executor.shutdown(cancel_futures=is_flush_short)
        if self._outbox:
            self.note_end(status)
            self._note(REASON, error_text(error[0]) if isinstance(error[0], Exception) else "")
        self._close_event.set()
        if self._sinks:
            self._sinks.close(max(0.0, self._deadline - time.monotonic()) + 1)
        self._thread.join(self._deadline - time.monotonic() + 1)
        if self._outbox:
            with suppress(sqlite3.Error):
                self._warn_about_uploads(self._outbox)
        self._release()
        if self._leftovers_thread and not self._stop_leftovers.is_set():
            self._leftovers_thread.join(LEFTOVERS_TIMEOUT_S)
        self._stop_leftovers.set()

    def shorten_flush(self) -> None:
        """Shortens the final flush, as after an interrupt."""
        self._is_flush_short = True

    def _release(self) -> None:
        """Closes the outbox and unlocks the run's folder, if this is the second call and thus the last use of both."""
        with self._release_lock:
            self._num_users -= 1
            if self._outbox and not self._num_users:
                self._outbox.close()
                self._lock.release()
                if self._programs:
                    self._programs.cleanup()

    def begin(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Waits for the store to open, creates the MLflow run, and then the outbox in the run's folder.

        If MLFLOW_RUN_ID is set, that run is used. As MLflow does, it is removed, so that the next run gets its own.

        Args:
            folder: Folder of the run. Its name becomes the name of the MLflow run, unless `tracking.name` is set.
            parameters: Parameters to log.

        Raises:
            ConfigError: The store cannot be opened or rejects the run, or another process is training it.
        """
        self.wait_until_open()
        if self.is_on:
            given_id = os.environ.pop("MLFLOW_RUN_ID", "") if self._given_id else ""  # another thread may have used it
            is_given = given_id == self._given_id != ""
            self.run_id = given_id if is_given else self._create_run(self._config.name or folder.name)
        self._open_outbox(folder).add_call("parameters", {name: str(value) for name, value in parameters.items()})

    def _create_run(self, name: str) -> str:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking.context.registry import resolve_tags
        from mlflow.utils.git_utils import get_git_commit

        tags = resolve_tags()
        if commit := get_git_commit(str(Path.cwd())):
            tags[GIT_COMMIT] = commit
        if self._parent_id:
            tags[PARENT_RUN] = self._parent_id
        try:
            return str(self._client.create_run(self._experiment_id, run_name=name, tags=tags).info.run_id)
        except MlflowException as error:
            raise ConfigError(f"tracking at {self.uri} is not possible ({error_text(error)}); {HINT}") from error

    def resume(self, folder: Path, run_id: str) -> None:
        """Waits for the store to open and resumes a run. Points that the server has are not sent again.

        Args:
            folder: Folder of the run.
            run_id: MLflow run id; empty if the run is not tracked by MLflow.

        Raises:
            ConfigError: The store cannot be opened or does not have the run, or another process is training it.
        """
        if self.is_on != bool(run_id):
            before = f"with MLflow run {run_id}" if run_id else "without MLflow"
            raise ConfigError(
                f"{folder} was started {before} and can only be resumed so (tracking URI: {self.uri}); set "
                f"tracking.uri to {'its tracking store' if run_id else NO_TRACKING}"
            )
        self.wait_until_open()
        if not self.is_on:
            self._open_outbox(folder)
            return
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
            metrics, self.run_id = run.data.metrics, run_id
            if os.environ.get("MLFLOW_RUN_ID") == run_id:
                del os.environ["MLFLOW_RUN_ID"]  # as in `begin`
            self.experiment = self._client.get_experiment(run.info.experiment_id).name
            outbox = self._open_outbox(folder)
            for name in metrics:
                history = self._client.get_metric_history(run_id, name)
                outbox.add_sent(Point(name, point.value, point.timestamp, point.step) for point in history)
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise ConfigError(
                f"tracking at {self.uri} cannot resume run {run_id} ({error_text(error)}); set --runs to its original "
                f"value, or {HINT}"
            ) from error

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Queues metrics, with the number of samples seen as `step`; returns immediately."""
        assert self._outbox, "begin or resume must be called first"
        self._samples = step
        self._outbox.add(metrics, step)

    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Returns the (samples seen, value) pairs of each metric of the run."""
        assert self._outbox, "begin or resume must be called first"
        return self._outbox.history()

    def recoveries(self) -> list[dict[str, Any]]:
        """Returns the recoveries that `note_recoveries` stored."""
        return _read_recoveries(self._outbox) if self._outbox else []

    def note_recoveries(self, recoveries: list[dict[str, Any]]) -> None:
        """Stores the recoveries of the run in its outbox, so that a resumed run can read them."""
        self._note(RECOVERIES, json.dumps(recoveries))

    def note_origin(self, origin: Path) -> None:
        """Stores the run that this run takes its initial weights from."""
        self._note(ORIGIN, str(origin))

    def note_end(self, status: str) -> None:
        """Stores the final MLflow status, which a later run sends if this one cannot; `left` is emptied once sent."""
        self._note("left", status)
        self._note(STATUS, status)

    def _note(self, key: str, value: str) -> None:
        assert self._outbox, "begin or resume must be called first"
        with suppress(sqlite3.Error):  # on a full disk another error is raised anyway
            self._outbox.set_facts(**{key: value})

    def log_tags(self, tags: dict[str, str]) -> None:
        """Queues tags; returns immediately."""
        self._queue_call("tags", tags)

    def log_artifact(self, path: Path) -> None:
        """Queues a file in the run's folder; returns immediately, so the file must not change afterwards."""
        self._queue_call("artifact", path.resolve().relative_to(self._folder.resolve()).as_posix())

    def log_dataset(self, dataset: dict[str, Any]) -> None:
        """Queues a split of the dataset; returns immediately.

        Args:
            dataset: Its `name`, `digest` (SHA-256), `source`, `profile` (JSON) and `context` (`training`, `validation`
                or `testing`).
        """
        self._queue_call("dataset", dataset)

    def log_model(
        self,
        network: Network,
        names: Names,
        example: Tensor,
        *,
        checkpoint: str,
        step: int,
        evaluations: dict[str, dict[str, Any]],
        is_final: bool = True,
    ) -> None:
        """Queues a network as a model of the run. The final one is also registered, if `tracking.register` is set.

        Args:
            network: Network to log.
            names: Names of its classes and features.
            example: Input example `[D]`.
            checkpoint: Name of the checkpoint that has its weights.
            step: Number of samples seen at this checkpoint.
            evaluations: Evaluations of this network, whose metrics are linked to the model: by split, the number of
                samples seen (`step`), and `name` and `digest` of the dataset, as for `log_dataset`.
            is_final: Whether the results of the run belong to this network.
        """
        if not self.is_on:
            return
        folder = path_in(self._folder, NETWORK if is_final else f"{NETWORK}-{checkpoint}")
        folder.mkdir(exist_ok=True)
        try:
            save_network(network, folder, names)
            shutil.copyfile(file_in(self._folder, CONFIG), folder / CONFIG)
            if is_final and self._outbox:  # nothing is trained any more, so another process is not needed
                self._programs = TemporaryDirectory(prefix="ffdist-", ignore_cleanup_errors=True)
                program = Path(self._programs.name) / PROGRAM
                save_program(network, names, program)
                self._outbox.programs[folder.name] = program
        except BaseException:  # a folder that no upload names would stay
            shutil.rmtree(folder, ignore_errors=True)
            raise
        content = {"folder": folder.name, "example": example.tolist(), "checkpoint": checkpoint, "step": step}
        self._queue_call("model", content | {"evaluations": evaluations})
        if is_final and self._config.register:
            self._queue_call("register", self._config.register)

    def _queue_call(self, kind: str, content: Any) -> None:
        assert self._outbox, "begin or resume must be called first"
        self._outbox.add_call(kind, content)

    def draw(self, plot: Callable[[Path], Path | None]) -> None:
        """Draws a plot in the background and logs it as an artifact; returns immediately.

        Args:
            plot: Draws into the run's folder, and returns the path of the file or None.
        """

        def draw() -> None:
            try:
                if path := plot(self._folder):
                    self.log_artifact(path)
            except Exception as error:  # a plot must not stop the run
                logging.getLogger(__name__).warning("a plot could not be drawn (%s)", error_text(error))

        self._plot_executor.submit(draw)

    def wait_until_open(self) -> None:
        """Waits until the tracking store is open.

        Raises:
            ConfigError: The store cannot be opened.
        """
        if not self._open_event.wait(OPEN_TIMEOUT_S):
            self._failure = f"no answer within {OPEN_TIMEOUT_S:g} s"
        if self.is_on and not self._client:
            hint = "" if self._is_refused else f"; {HINT}"
            raise ConfigError(f"tracking at {self.uri} is not possible ({self._failure}){hint}")

    def _open_outbox(self, folder: Path) -> Outbox:
        """Locks the run's folder and opens its outbox."""
        try:
            self._lock = FileLock(file_in(folder, LOCK), thread_local=False)  # the tracker's thread may release it
            self._lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout:
            raise ConfigError(f"{folder} is being trained by another process; wait until it is done") from None
        except ValueError as error:
            raise ConfigError(str(error)) from error
        try:
            outbox = Outbox(folder / OUTBOX, self._config.outbox_bytes, is_sent=self.is_on)
            _read_recoveries(outbox)  # fails before anything is written
            outbox.set_facts(
                uri=self.uri, run_id=self.run_id, left="KILLED", **{STATUS: "KILLED", REASON: ""}
            )  # sent if this process dies
        except (sqlite3.DatabaseError, OSError, ValueError) as error:
            self._lock.release()
            raise ConfigError(
                f"{folder / OUTBOX} is damaged or cannot be written ({error}); remove it, which loses the points that "
                f"were not sent"
            ) from error
        self._folder, self._outbox = folder, outbox
        self._sinks = Sinks(outbox, self._config.also) if self._config.also else None
        return outbox

    def _warn_about_uploads(self, outbox: Outbox) -> None:
        log, rejected = logging.getLogger(__name__), outbox.rejected()
        points, calls = outbox.num_pending, outbox.num_calls
        if self.run_id and (points or calls or outbox.fact("left")):
            log.warning(
                "not everything was tracked at %s (%s): %d points and %d other uploads wait; `ffdist sync %s` or "
                "the next run in %s sends them",
                *(self.uri, self._failure or "the final flush timed out", points, calls),
                *(shlex.quote(str(self._folder)), self._runs),
            )
        if rejected:
            log.warning("not everything was tracked at %s; rejected: %s", self.uri, "; ".join(rejected))
        if outbox.has_dropped_points:
            log.warning("pending points exceeded tracking.outbox_bytes; some points of each metric were dropped")

    def _run_thread(self) -> None:
        try:
            if self.is_on:
                with quiet_mlflow():
                    self._open()
                    self._send_until_closed(self._client)
            else:
                self._open_event.set()
                self._close_event.wait()
        except Exception as error:  # of MLflow, its store, the network or a full disk; reported by the main thread
            self._failure, self._is_refused = error_text(error), isinstance(error, ConfigError)
        finally:
            self._open_event.set()
            self._release()

    def _open(self) -> None:
        name = None if self._given_id else self._config.experiment  # the run is in an experiment already
        run_id = self._given_id or self._parent_id
        client, experiment = open_store(self.uri, name, self._runs, run_id, needs_experiment=self._is_new)
        if experiment:
            self._experiment_id, self.experiment = experiment.experiment_id, experiment.name
        self._client = client  # last, because `wait_until_open` checks it
        self._open_event.set()

    def _send_until_closed(self, client: Any) -> None:
        monitor = None
        with suppress(Exception):  # internals of MLflow, which may change between versions
            monitor = SystemMonitor()
        while True:
            closing = self._close_event.wait(SEND_INTERVAL_S)
            if self._outbox and monitor and not closing:
                with suppress(Exception):  # from hardware counters or a full disk
                    self._outbox.add(monitor.metrics(), self._samples)
            done = not self._outbox or self._send(client, self._outbox, self.run_id, ended=closing)
            if done and self._outbox and not self._leftovers_thread:  # its own folder is locked by now, and is skipped
                args = (client, self.uri, self._runs, self._stop_leftovers.is_set)
                thread = threading.Thread(target=sync.send_leftovers, args=args, name="leftovers", daemon=True)
                thread.start()
                self._leftovers_thread = thread
            if closing and (done or time.monotonic() > self._deadline):
                return
            if not done:
                time.sleep(RETRY_INTERVAL_S)

    def _send(self, client: Any, outbox: Outbox, run_id: str, *, ended: bool) -> bool:
        """Sends pending uploads; stops at the first error unless the run has ended. Returns whether all were sent."""
        uploads = ended or time.monotonic() >= self._next_upload_at
        steps: list[Callable[[], None]] = [
            lambda: sync.send_points(client, outbox, run_id),
            *[lambda: sync.send_status(client, outbox, run_id)] * ended,
            lambda: self._send_calls(client, outbox, run_id, uploads=uploads),
        ]
        had_failed, self._failure = bool(self._failure), ""
        for step in steps:
            try:
                if had_failed:
                    check_server(self.uri)  # takes seconds, whereas MLflow retries for minutes
                step()
            except Exception as error:  # the server may come back
                self._failure = self._failure or error_text(error)
                if not ended:
                    break
        return not self._failure and not outbox.num_calls

    def _send_calls(self, client: Any, outbox: Outbox, run_id: str, *, uploads: bool) -> None:
        try:
            sync.send_calls(client, outbox, run_id, self.uri, uploads=uploads)
            self._upload_wait_s = 0.0 if uploads else self._upload_wait_s
        except Exception:
            if uploads:  # exponential backoff, because each attempt may delay the points
                self._upload_wait_s = min(MAX_UPLOAD_RETRY_S, max(SEND_INTERVAL_S, 2 * self._upload_wait_s))
                self._next_upload_at = time.monotonic() + self._upload_wait_s
            raise


def _read_recoveries(outbox: Outbox) -> list[dict[str, Any]]:
    try:
        recoveries = json.loads(outbox.fact(RECOVERIES) or "[]")
    except (TypeError, RecursionError) as error:
        raise ValueError(f"its {RECOVERIES} cannot be read") from error
    if not (isinstance(recoveries, list) and all(isinstance(each, dict) and "lost" in each for each in recoveries)):
        raise ValueError(f"its {RECOVERIES} must be a list of objects with the key 'lost'")
    return recoveries
