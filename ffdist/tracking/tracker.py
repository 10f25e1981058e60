"""The MLflow run of a training: everything is sent by a thread of its own, so that a slow server slows nothing.

Metrics go by way of an outbox in the run's folder, so that none is lost or doubled, whoever dies.
"""

import json
import logging
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ffdist.config import ConfigError
from ffdist.exported import save_network
from ffdist.failures import ClusterStopped
from ffdist.ff.network import Network
from ffdist.files import file_in, path_in
from ffdist.sections import Tracking
from ffdist.tracking import sending
from ffdist.tracking.outbox import ORIGIN, OUTBOX, RECOVERIES, Outbox, Point
from ffdist.tracking.sending import LOCK, NETWORK
from ffdist.tracking.server import WAY_OUT, brief, check_server, make_run, open_store, quiet_mlflow
from ffdist.tracking.system import System

SEND_EVERY_S, RETRY_EVERY_S = 2.0, 0.5
UPLOAD_RETRY_S = 60.0
"""Longest time between two tries at an artifact store that fails, during a run."""
LEFTOVERS_S = 5.0
"""Longest time that the end of a run waits for uploads of other runs."""
OPEN_TIMEOUT_S = 60.0
INTERRUPTED_FLUSH_S = 3.0
LOCK_TIMEOUT_S = 5.0


class Tracker:
    """One MLflow run, open for the length of a `with` block.

    The store opens beside what follows. Leaving the block sends what is left and marks the run
    finished, failed, or, after an interrupt, killed. What cannot be sent stays in the run's folder, and the
    next run beside it sends it, and marks this one killed if nobody could.

    Args:
        uri: As `tracking_uri` returns it.
        config: Name of the experiment, and how much may wait how long.
        runs: Runs folder; artifacts of the default database lie in it.

    Raises:
        ConfigError: The server or database at `uri` cannot be reached.
    """

    def __init__(self, uri: str, config: Tracking, *, runs: Path) -> None:
        self.uri, self._run_id = uri, ""
        self._releasing, self._sent, self._handed_over = threading.Lock(), False, False
        self._config, self._runs = config, runs
        self._client: Any = None
        self._experiment_id, self._samples = "", 0
        self._folder, self._lock = Path(), FileLock("")
        self._outbox: Outbox | None = None
        self._opened, self._failure = threading.Event(), ""
        self._hurried = False
        self._closing, self._deadline = threading.Event(), float("inf")
        self._uploads_at, self._upload_wait_s = 0.0, 0.0
        check_server(uri)
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._leftovers: threading.Thread | None = None
        self._no_leftovers = threading.Event()
        self._plots = ThreadPoolExecutor(1, "plots")

    def __enter__(self) -> "Tracker":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | ClusterStopped)
        status = "FINISHED" if kind is None else "KILLED" if killed else "FAILED"
        hurried = killed or self._hurried
        self._deadline = time.monotonic() + (INTERRUPTED_FLUSH_S if hurried else self._config.flush_timeout_s)
        if kind is not None or hurried:
            self._no_leftovers.set()
        self._plots.shutdown(cancel_futures=hurried)
        if self._outbox:
            self.note_end(status)
        self._closing.set()
        self._thread.join(self._deadline - time.monotonic() + 1)
        if self._outbox:
            with suppress(sqlite3.Error):
                self._tell_what_is_left(self._outbox)
        with self._releasing:
            self._handed_over = self._thread.is_alive() and not self._sent
        if not self._handed_over:
            self._release()  # otherwise the thread does, after its last upload
        if self._leftovers and not self._no_leftovers.is_set():
            self._leftovers.join(LEFTOVERS_S)
        self._no_leftovers.set()

    def hurry(self) -> None:
        """Shortens the last uploads, as for a run that is asked to stop."""
        self._hurried = True

    def _release(self) -> None:
        """Closes the run's folder, once nothing is written to it or sent from it any more."""
        if self._outbox:
            self._outbox.close()
            self._lock.release()

    def begin(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Creates the MLflow run, and then writes to the run's folder; waits until the store is open.

        Args:
            folder: Of the run; its name is the run's.
            parameters: Logged once.

        Raises:
            ConfigError: The store cannot be opened or refuses the run, or another process is training it.
        """
        self.wait_until_open()
        self._run_id = make_run(self.uri, self._client, self._experiment_id, folder.name)
        self._take(folder).add_call("parameters", {name: str(value) for name, value in parameters.items()})

    @property
    def run_id(self) -> str:
        """ID of the MLflow run."""
        assert self._run_id, "the run has begun"
        return self._run_id

    def resume(self, folder: Path, run_id: str) -> None:
        """Goes on with a run, once the store is open; points that the server has are not sent again.

        Args:
            folder: Of the run.
            run_id: Of MLflow.

        Raises:
            ConfigError: The store cannot be opened or lacks the run, or another process is training it.
        """
        self.wait_until_open()
        from mlflow.exceptions import MlflowException

        try:
            metrics = self._client.get_run(run_id).data.metrics
            self._run_id = run_id
            outbox = self._take(folder)
            for name in metrics:
                history = self._client.get_metric_history(run_id, name)
                outbox.add_sent(Point(name, point.value, point.timestamp, point.step) for point in history)
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise ConfigError(
                f"tracking at {self.uri} cannot go on with run {run_id} ({brief(error)}); set --runs as it was, or "
                f"{WAY_OUT}"
            ) from error

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Has metrics sent, with the number of samples seen as `step`; returns at once."""
        assert self._outbox, "the run has begun"
        self._samples = step
        self._outbox.add(metrics, step)

    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Returns all metrics of the run, as samples seen and value."""
        assert self._outbox, "the run has begun"
        return self._outbox.history()

    def recoveries(self) -> list[dict[str, Any]]:
        """Returns what the run recovered from, as it was noted."""
        return _recoveries(self._outbox) if self._outbox else []

    def note_recoveries(self, recoveries: list[dict[str, Any]]) -> None:
        """Keeps what the run recovered from beside its metrics, for a later driver of it."""
        self._note(RECOVERIES, json.dumps(recoveries))

    def note_origin(self, origin: Path) -> None:
        """Notes the run whose weights this one starts from."""
        self._note(ORIGIN, str(origin))

    def note_end(self, status: str) -> None:
        """Notes how the run ended, so that a later run tells the server if this one cannot; empty once it is told."""
        self._note("left", status)

    def _note(self, key: str, value: str) -> None:
        assert self._outbox, "the run has begun"
        with suppress(sqlite3.Error):  # on a full disk there is worse to tell
            self._outbox.note(**{key: value})

    def log_tags(self, tags: dict[str, str]) -> None:
        """Has tags set; returns at once."""
        self._tell("tags", tags)

    def log_artifact(self, path: Path) -> None:
        """Has a file of the run's folder kept with the run; returns at once, so the file must stay as it is."""
        self._tell("artifact", path.resolve().relative_to(self._folder.resolve()).as_posix())

    def log_dataset(self, dataset: dict[str, Any]) -> None:
        """Has it noted what the run is trained on, as `server.log_dataset` takes it; returns at once."""
        self._tell("dataset", dataset)

    def log_model(self, network: Network, names: Sequence[str], image: Tensor, register: str | None) -> None:
        """Has a network kept with the run as a model, as `log_model` and `register_model` of model.py take it."""
        folder = path_in(self._folder, NETWORK)
        folder.mkdir(exist_ok=True)
        save_network(network, folder, names)
        self._tell("model", {"image": image.tolist(), "names": list(names)})
        if register:
            self._tell("register", register)

    def _tell(self, what: str, content: Any) -> None:
        assert self._outbox, "the run has begun"
        self._outbox.add_call(what, content)

    def draw(self, plot: Callable[[Path], Path | None]) -> None:
        """Draws a plot beside the training and keeps it with the run; returns at once.

        Args:
            plot: Gets the run's folder, and returns the path of what it drew there, if anything.
        """

        def draw() -> None:
            try:
                if path := plot(self._folder):
                    self.log_artifact(path)
            except Exception as error:  # whatever a library raises, the run itself is unharmed
                logging.getLogger(__name__).warning("a plot could not be drawn (%s)", brief(error))

        self._plots.submit(draw)

    def wait_until_open(self) -> None:
        """Waits until the store is open.

        Raises:
            ConfigError: It cannot be opened.
        """
        if not self._opened.wait(OPEN_TIMEOUT_S):
            self._failure = f"no answer in {OPEN_TIMEOUT_S:g} s"
        if not self._client:
            raise ConfigError(f"tracking at {self.uri} is not possible ({self._failure}); {WAY_OUT}")

    def _take(self, folder: Path) -> Outbox:
        """Takes the run's folder for this process alone."""
        try:
            self._lock = FileLock(file_in(folder, LOCK), thread_local=False)  # the tracker's thread may release it
            self._lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout:
            raise ConfigError(f"{folder} is being trained by another process; wait until it is done") from None
        except ValueError as error:
            raise ConfigError(str(error)) from error
        try:
            outbox = Outbox(folder / OUTBOX, self._config.outbox_bytes)
            _recoveries(outbox)  # refused before anything is noted
            outbox.note(uri=self.uri, run_id=self._run_id, left="KILLED")  # if nothing else comes
        except (sqlite3.DatabaseError, OSError, ValueError) as error:
            self._lock.release()
            raise _damaged(folder, error) from error
        self._folder, self._outbox = folder, outbox
        return outbox

    def _tell_what_is_left(self, outbox: Outbox) -> None:
        log, points, calls, rejected = (
            logging.getLogger(__name__),
            outbox.num_waiting,
            outbox.num_calls,
            outbox.rejected(),
        )
        if self._run_id and (points or calls or outbox.fact("left")):
            log.warning(
                "not everything was tracked at %s (%s): %d points and %d other uploads wait; `ffdist sync %s` or "
                "the next run in %s sends them",
                *(self.uri, self._failure or "its time to flush is over", points, calls),
                *(shlex.quote(str(self._folder)), self._runs),
            )
        if rejected:
            log.warning("not everything was tracked at %s; rejected: %s", self.uri, "; ".join(rejected))
        if outbox.thinned:
            log.warning("the server was away for so long that only every few points of each metric were kept")

    def _work(self) -> None:
        try:
            with quiet_mlflow():
                if client := self._open():
                    self._send_until_closed(client)
        except Exception as error:  # such as a full disk; what waits is reported at the end
            self._failure = brief(error)
        finally:
            self._opened.set()
            with self._releasing:
                self._sent = True
            if self._handed_over:
                self._release()

    def _open(self) -> Any:
        try:
            self._client, self._experiment_id = open_store(self.uri, self._config.experiment, self._runs)
        except Exception as error:  # whatever MLflow, its store or the network raises, who asks for the store is told
            self._failure = brief(error)
        finally:
            self._opened.set()
        return self._client

    def _send_until_closed(self, client: Any) -> None:
        system = _system()
        while True:
            closing = self._closing.wait(SEND_EVERY_S)
            if self._outbox and system and not closing:
                with suppress(Exception):  # of a processor's or a graphics card's counters, or of a full disk
                    self._outbox.add(system.metrics(), self._samples)
            done = not self._outbox or self._send(client, self._outbox, self.run_id, ended=closing)
            if done and self._outbox and not self._leftovers:  # by now its own folder is locked, and passed over
                job = (client, self.uri, self._runs, self._no_leftovers.is_set)
                others = threading.Thread(target=sending.send_leftovers, args=job, name="leftovers", daemon=True)
                others.start()
                self._leftovers = others
            if closing and (done or time.monotonic() > self._deadline):
                return
            if not done:
                time.sleep(RETRY_EVERY_S)

    def _send(self, client: Any, outbox: Outbox, run_id: str, *, ended: bool) -> bool:
        """Sends all that waits, or, at the end, as much of it as can be; says whether it was all."""
        uploads = ended or time.monotonic() >= self._uploads_at
        steps: list[Callable[[], None]] = [
            lambda: sending.send_points(client, outbox, run_id),
            *[lambda: sending.send_end(client, outbox, run_id)] * ended,
            lambda: self._send_calls(client, outbox, run_id, uploads=uploads),
        ]
        was_away, self._failure = bool(self._failure), ""
        for step in steps:
            try:
                if was_away:
                    check_server(self.uri)  # which takes seconds, where MLflow would try for minutes
                step()
            except Exception as error:  # whatever it is, the server may come back
                self._failure = self._failure or brief(error)
                if not ended:
                    break
        return not self._failure and not outbox.num_calls

    def _send_calls(self, client: Any, outbox: Outbox, run_id: str, *, uploads: bool) -> None:
        try:
            sending.send_calls(client, outbox, run_id, self.uri, uploads=uploads)
            self._upload_wait_s = 0.0 if uploads else self._upload_wait_s
        except Exception:
            if uploads:  # less and less often, because each try may hold up the points
                self._upload_wait_s = min(UPLOAD_RETRY_S, max(SEND_EVERY_S, 2 * self._upload_wait_s))
                self._uploads_at = time.monotonic() + self._upload_wait_s
            raise


def _system() -> System | None:
    with suppress(Exception):  # of parts of MLflow that may change with its version
        return System()
    return None


def _recoveries(outbox: Outbox) -> list[dict[str, Any]]:
    try:
        found = json.loads(outbox.fact(RECOVERIES) or "[]")
    except (TypeError, RecursionError) as error:
        raise ValueError(f"its {RECOVERIES} cannot be read") from error
    if not (isinstance(found, list) and all(isinstance(each, dict) and "lost" in each for each in found)):
        raise ValueError(f"its {RECOVERIES} are no list of losses")
    return found


def _damaged(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{folder / OUTBOX} is damaged or cannot be written ({error}); remove it, and points that were not sent are "
        f"lost"
    )
