"""A training to be disturbed, in a process of its own, on a cluster and with a tracking server of its own."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ffdist.checkpoint import MANIFEST
from ffdist.config import RunFailed
from ffdist.config_file import load_config
from ffdist.failures import Recovery
from ffdist.start import CONFIG
from ffdist.tracking.outbox import OUTBOX, RECOVERIES, Outbox
from ffdist.tracking.server import SQLITE

PATIENCE_S = 150.0
"""Longest that anything may take before it counts as hanging."""
MARK = "FFDIST_CHAOS"
"""Environment variable that all processes of a campaign have, and no others."""
NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 300_000_000, "node_ip_address": "127.0.0.2"}


class NotSurvived(RunFailed):
    """A training did not take a fault as it should."""


def wait_for(what: str, there: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Waits until something is there, and returns it.

    Raises:
        NotSurvived: It does not come.
    """
    deadline = time.monotonic() + patience_s
    while not (found := there()):
        if time.monotonic() > deadline:
            raise NotSurvived(f"{what} did not come in {patience_s:g} s")
        time.sleep(0.02)
    return found


class Training:
    """A training that is started, and resumed as often as need be.

    Args:
        words: Configuration and settings.
        runs: A runs folder of its own.
        address: Of the cluster.
    """

    def __init__(self, words: list[str], runs: Path, address: str) -> None:
        self.runs, self.log = runs, runs / "driver.log"
        self._summary = runs / "summary.json"
        self._command = [sys.executable, "-m", "ffdist.cli", "train", *words, "--address", address]
        self._command += ["--runs", str(runs), "--summary", str(self._summary)]
        runs.mkdir(parents=True)
        self.go()

    def go(self, *options: str) -> None:
        """Starts a driver."""
        with self.log.open("a") as log:
            self.driver = psutil.Popen([*self._command, *options], stdout=log, stderr=log)

    def resume(self, *options: str) -> None:
        """Starts a driver that goes on with the run."""
        self.go("--resume", str(self.folder), *options)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        found = wait_for("the run's folder", lambda: self.ended or list(self.runs.glob(f"*/{CONFIG}")))
        if found is True and not list(self.runs.glob(f"*/{CONFIG}")):
            raise NotSurvived(f"the training did not begin: {self.told()}")
        return next(self.runs.glob(f"*/{CONFIG}")).parent

    @property
    def ended(self) -> bool:
        """Whether there is no driver any more."""
        return self.driver.poll() is not None

    def end(self) -> int:
        """Waits for the driver's end, and returns its exit code.

        Raises:
            NotSurvived: It neither ends nor commits.
        """
        while not self.ended:
            self.wait_for_commit()
        return int(self.driver.returncode)

    def wait_for_commit(self) -> None:
        """Waits for a commit newer than all there are, or the driver's end.

        Raises:
            NotSurvived: Neither comes.
        """
        newest = self.commits()[-1:]
        wait_for("a commit", lambda: self.ended or self.commits()[-1:] > newest)

    def summary(self) -> dict[str, Any]:
        """Returns the figures that the run ended with."""
        return dict(json.loads(self._summary.read_text()))

    def told(self) -> str:
        """Returns the last thing that a driver told."""
        return " ".join(self.log.read_text().split("\n\n")[-1].split())[-1000:]

    def commits(self) -> list[str]:
        """Returns the names of all whole commits, oldest first."""
        return sorted(path.parent.name for path in self.runs.glob(f"*/commits/*/{MANIFEST}"))

    def recoveries(self) -> list[Recovery]:
        """Returns what the run recovered from so far."""
        return list(json.loads(Outbox.fact_of(self.folder / OUTBOX, RECOVERIES) or "[]"))

    def step(self) -> int:
        """Returns after how many minibatches the last metrics came, once the driver is dead."""
        batch_size = load_config(str(self.folder / CONFIG)).training.batch_size
        with closing(Outbox(self.folder / OUTBOX, 10**9)) as outbox:
            return max((step for series in outbox.history().values() for step, _ in series), default=0) // batch_size

    def actors(self, name: str) -> list[psutil.Process]:
        """Returns the processes of actors; Ray names them by their class."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}") and _is_marked(process):
                    found.append(process)
        return found


class Surroundings:
    """A Ray cluster of two nodes and an MLflow server on this machine, for the length of a `with` block.

    Args:
        folder: Gets the server's database.
    """

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder, self.database = folder, folder / "mlflow.db"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.start_server()
        self._cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        self._second = self._cluster.add_node(**NODE)
        self.wait_for_server()

    def __enter__(self) -> "Surroundings":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(Exception):  # its processes end, one way or the other
            self._cluster.shutdown()

    @property
    def address(self) -> str:
        """Of the cluster."""
        return str(self._cluster.address)

    @property
    def uri(self) -> str:
        """Of the tracking server."""
        return f"http://127.0.0.1:{self._port}"

    def lose_node(self) -> None:
        """Kills the node on which the driver is not."""
        self._cluster.remove_node(self._second, allow_graceful=False)

    def add_node(self) -> None:
        """Brings another in its place."""
        self._second = self._cluster.add_node(**NODE)

    def start_server(self) -> None:
        """Starts the tracking server, which takes a while."""
        store = [
            "--backend-store-uri",
            f"{SQLITE}{self.database}",
            "--artifacts-destination",
            str(self._folder / "mlflow"),
        ]
        command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(self._port)]
        with (self._folder / "mlflow.log").open("a") as log:
            self.server = psutil.Popen([*command, "--workers", "1"], stdout=log, stderr=log)

    def wait_for_server(self) -> None:
        """Waits until it answers."""

        def answers() -> bool:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return True
            return False

        wait_for("the tracking server", answers)

    def signal_server(self, number: int) -> list[psutil.Process]:
        """Sends a signal to all its processes, and returns them."""
        processes = [self.server, *self.server.children(recursive=True)]
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(number)
        return processes


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Marks all processes that are started in a `with` block, and leaves none of them behind."""
    os.environ[MARK] = str(folder)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        yield
    finally:
        left = [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_marked(process)]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        del os.environ[MARK]


def _is_marked(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.environ().get(MARK) == os.environ[MARK])
    return False
