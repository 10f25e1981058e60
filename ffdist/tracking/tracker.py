"""The MLflow run of a training: everything is sent by a thread of its own, so that a slow server slows nothing.

Metrics go by way of an outbox in the run's folder, so that none is lost or doubled, whoever dies.
"""

import json
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ffdist.config import ConfigError
from ffdist.exported import save_network
from ffdist.ff.network import Network
from ffdist.sections import Tracking
from ffdist.tracking import sending
from ffdist.tracking.outbox import ORIGIN, OUTBOX, RECOVERIES, Outbox, Point
from ffdist.tracking.sending import LOCK, NETWORK, RETRY_EVERY_S
from ffdist.tracking.server import WAY_OUT, brief, check_server, make_run, open_store
from ffdist.tracking.system import System

SEND_EVERY_S = 2.0
OPEN_TIMEOUT_S = 60.0
INTERRUPTED_FLUSH_S = 3.0
LOCK_TIMEOUT_S = 5.0

Call = Callable[[Any, str], Any]
"""Something to be told to MLflow's client about a run."""


class Tracker:
    """One MLflow run, open for the length of a `with` block.

    The store opens, and gets the run, beside what follows. Leaving the block sends what is left and marks the run
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
        self.uri, self._run_id, self._making = uri, "", threading.Lock()
        self._config, self._runs = config, runs
        self._client: Any = None
        self._experiment_id, self._samples = "", 0
        self._folder, self._lock = Path(), FileLock("")
        self._outbox: Outbox | None = None
        self._calls: deque[Call] = deque()
        self._opened, self._failure, self._refused = threading.Event(), "", set[str]()
        self._closing, self._deadline = threading.Event(), float("inf")
        check_server(uri)
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def __enter__(self) -> "Tracker":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        status = "FINISHED" if kind is None else "KILLED" if killed else "FAILED"
        self._deadline = time.monotonic() + (INTERRUPTED_FLUSH_S if killed else self._config.flush_timeout_s)
        if self._outbox:
            self.note_end(status)
        self._closing.set()
        self._thread.join(self._deadline - time.monotonic() + 1)
        if self._outbox:
            with suppress(sqlite3.Error):
                self._tell_what_is_left(self._outbox)
            if not self._thread.is_alive():
                self._outbox.close()
            self._lock.release()

    def begin(self, folder: Path, parameters: dict[str, Any]) -> None:
        """Begins the run in its folder; the store gets it once that is open.

        Args:
            folder: Of the run; its name is the run's.
            parameters: Logged once.

        Raises:
            ConfigError: Another process is training it.
        """
        self._take(folder).add_call("parameters", {name: str(value) for name, value in parameters.items()})

    @property
    def run_id(self) -> str:
        """The run's, of MLflow; waits until the store has the run.

        Raises:
            ConfigError: The store cannot be opened, or refuses the run.
        """
        self._wait_until_open()
        assert self._outbox, "the run has begun"
        with self._making:
            if not self._run_id:
                self._run_id = make_run(self.uri, self._client, self._experiment_id, self._folder.name)
                self._outbox.note(run_id=self._run_id)
        return self._run_id

    def resume(self, folder: Path, run_id: str) -> None:
        """Goes on with a run, once the store is open; points that the server has are not sent again.

        Args:
            folder: Of the run.
            run_id: Of MLflow.

        Raises:
            ConfigError: The store cannot be opened or lacks the run, or another process is training it.
        """
        self._wait_until_open()
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
        """Has metrics sent, with the number of samples seen as `step`; returns at once.

        Raises:
            ConfigError: The store could not be opened, or refused the run.
        """
        assert self._outbox, "the run has begun"
        if self._opened.is_set():
            self._wait_until_open()
        self._samples = step
        self._outbox.add(metrics, step)

    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Returns all metrics of the run, as samples seen and value."""
        assert self._outbox, "the run has begun"
        return self._outbox.history()

    def recoveries(self) -> list[dict[str, Any]]:
        """Returns what the run recovered from, as it was noted."""
        return list(json.loads((self._outbox.fact(RECOVERIES) if self._outbox else None) or "[]"))

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
        self._tell("artifact", path.name)

    def log_dataset(self, dataset: dict[str, Any]) -> None:
        """Has it noted what the run is trained on, as `server.log_dataset` takes it; returns at once."""
        self._tell("dataset", dataset)

    def log_model(self, network: Network, names: Sequence[str], image: Tensor, register: str | None) -> None:
        """Has a network kept with the run as a model, as `log_model` and `register_model` of model.py take it."""
        (self._folder / NETWORK).mkdir(exist_ok=True)
        save_network(network, self._folder / NETWORK, names)
        self._tell("model", {"image": image.tolist(), "names": list(names)})
        if register:
            self._tell("register", register)

    def _tell(self, what: str, content: Any) -> None:
        assert self._outbox, "the run has begun"
        self._outbox.add_call(what, content)

    def do(self, call: Call) -> None:
        """Has MLflow's client told something that only this process can tell; returns at once."""
        self._calls.append(call)

    def _wait_until_open(self) -> None:
        if not self._opened.wait(OPEN_TIMEOUT_S):
            self._failure = f"no answer in {OPEN_TIMEOUT_S:g} s"
        if not self._client:
            raise ConfigError(f"tracking at {self.uri} is not possible ({self._failure}); {WAY_OUT}")

    def _take(self, folder: Path) -> Outbox:
        """Takes the run's folder for this process alone."""
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout:
            raise ConfigError(f"{folder} is being trained by another process; wait until it is done") from None
        try:
            outbox = Outbox(folder / OUTBOX, self._config.outbox_bytes)
            outbox.note(uri=self.uri, run_id=self._run_id, left="KILLED")  # if nothing else comes
        except sqlite3.DatabaseError as error:
            self._lock.release()
            raise ConfigError(
                f"{folder / OUTBOX} is damaged or cannot be written ({error}); remove it, and points that were not "
                f"sent are lost"
            ) from error
        self._folder, self._outbox = folder, outbox
        return outbox

    def _tell_what_is_left(self, outbox: Outbox) -> None:
        log, points, calls = logging.getLogger(__name__), outbox.num_waiting, outbox.num_calls
        if self._run_id and (points or calls or outbox.fact("left")):
            log.warning(
                "not everything was tracked at %s (%s): %d points, and %d pictures and others, wait in %s; the next "
                "run in %s sends them",
                *(self.uri, self._failure or "its time to flush is over", points, calls, outbox.folder, self._runs),
            )
        elif refused := "; ".join(filter(None, self._refused)):
            log.warning("not everything was tracked at %s: %s", self.uri, refused)
        if outbox.thinned:
            log.warning("the server was away for so long that only every few points of each metric were kept")

    def _work(self) -> None:
        try:
            client, self._experiment_id = open_store(self.uri, self._config.experiment, self._runs)
            self._client = client
        except Exception as error:  # whatever MLflow, its store or the network raises, who asks for the store is told
            self._failure = brief(error)
            return
        finally:
            self._opened.set()
        leftovers, system = True, System()
        while True:
            closing = self._closing.wait(SEND_EVERY_S)
            if self._outbox and not closing:
                with suppress(Exception):  # of a processor's or a graphics card's counters, or of a full disk
                    self._outbox.add(system.metrics(), self._samples)
            try:
                done = not self._outbox or self._send(client, self._outbox, self.run_id, ended=closing)
            except ConfigError as error:  # the store refuses the run, and whoever asks next is told
                self._client, self._failure = None, brief(error.__cause__ or error)
                return
            if done and leftovers and (self._outbox or closing):  # by now its own folder is locked, and passed over
                leftovers = False
                sending.send_leftovers(client, self.uri, self._runs)
            if closing and (done or time.monotonic() > self._deadline):
                return
            if not done:
                time.sleep(RETRY_EVERY_S)

    def _send(self, client: Any, outbox: Outbox, run_id: str, *, ended: bool) -> bool:
        """Sends all that waits, or, at the end, as much of it as can be; says whether it was all."""
        steps: list[Callable[[], None]] = [
            lambda: sending.send_points(client, outbox, run_id),
            *[lambda: sending.send_end(client, outbox, run_id)] * ended,
            lambda: self._refused.add(sending.send_calls(client, outbox, run_id, self.uri)),
            lambda: self._make_calls(client, run_id),
        ]
        self._failure = ""
        for step in steps:
            try:
                step()
            except Exception as error:  # whatever it is, the server may come back
                self._failure = self._failure or brief(error)
                if not ended:
                    break
        return not self._failure

    def _make_calls(self, client: Any, run_id: str) -> None:
        while self._calls:
            self._refused.add(sending.attempt(partial(self._calls[0], client, run_id), self.uri))
            self._calls.popleft()
