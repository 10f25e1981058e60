"""A training to be disturbed, in a process of its own, on a cluster and with a tracking server of its own."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from ffdist.chaos.network import ADDRESSES, Link, Network
from ffdist.checkpoint import MANIFEST
from ffdist.config import RunFailed
from ffdist.config_file import load_config
from ffdist.failures import Recovery
from ffdist.start import CONFIG
from ffdist.tracking.outbox import OUTBOX, RECOVERIES, Outbox
from ffdist.tracking.server import SQLITE

PATIENCE_S = 600.0
"""Longest that anything may take before it counts as hanging; generous, because a busy machine is no fault."""
STARTED = "This command will now block"
"""What `ray start --block` prints when a node has joined its cluster, and the cluster's address is in its file."""
STARTS = 5
"""Tries to start a node: Ray gives it 30 s, and a busy machine may need more."""
MARK = "FFDIST_CHAOS"
"""Environment variable that all processes of a campaign have, and no others."""
NODE = ("--num-cpus=2", "--object-store-memory=300000000", "--disable-usage-stats", "--block")


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
            command = [*self._command, *options]
            self.driver = psutil.Popen(command, stdout=log, stderr=log, start_new_session=True)

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
        lines = [line for line in self.log.read_text().splitlines() if "(raylet" not in line]  # Ray's own log
        return " ".join("\n".join(lines).split("\n\n")[-1].split())[-1000:]

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
        folder: Of the server's database and the logs.
        ray_folder: What `private_ray` yields.
        network: Gives each node a host of its own. The driver, the head node and the server are on the first host.
            Without it, both nodes are on loopback.
    """

    def __init__(self, folder: Path, ray_folder: Path, network: Network | None) -> None:
        self.folder, self.database, self.network = folder, folder / "mlflow.db", network
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._first_ip, self._second_ip = ADDRESSES if network else ("127.0.0.1", "127.0.0.1")
        self.start_server()
        words = ["--head", "--port=0", "--include-dashboard=false"]
        self._start_node(f"--node-ip-address={self._first_ip}", *words)
        self.address = (ray_folder / "ray" / "ray_current_cluster").read_text().strip()
        """Of the cluster."""
        self.add_node()
        self.wait_for_server()

    def __enter__(self) -> "Surroundings":
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the end of the processes to `marked`."""

    def set_link(self, link: Link) -> tuple[int, int]:
        """Changes the link between the nodes; returns how many packets it delivered and dropped until now."""
        assert self.network, "campaigns without a network have no faults of it"
        return self.network.set_link(link)

    def lose_node(self) -> None:
        """Kills the node on which the driver is not."""
        processes = [self.second, *self.second.children(recursive=True)]
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=10)

    def add_node(self, **environment: str) -> None:
        """Starts another in its place.

        Args:
            environment: Variables of its processes.
        """
        words = [f"--node-ip-address={self._second_ip}", f"--address={self.address}"]
        with self.network.second_host() if self.network else nullcontext():
            self.second = self._start_node(*words, **environment)

    def repair(self) -> None:
        """Heals the network, and replaces a node that is lost."""
        if self.network:
            self.network.set_link(Link())
        if self.second.poll() is not None:
            self.add_node()

    def _start_node(self, *words: str, **environment: str) -> psutil.Popen:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *NODE, *words]
        for _ in range(STARTS):
            before = self._ray_log().count(STARTED)
            with (self.folder / "ray.log").open("a") as log:
                node = psutil.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
            wait_for("a Ray node", lambda: node.poll() is not None or self._ray_log().count(STARTED) > before)  # noqa: B023
            if node.poll() is None:
                return node
        raise NotSurvived(f"a Ray node does not start: {self._ray_log()[-1000:]}")

    def _ray_log(self) -> str:
        log = self.folder / "ray.log"
        return log.read_text() if log.exists() else ""

    @property
    def uri(self) -> str:
        """Of the tracking server."""
        return f"http://127.0.0.1:{self._port}"

    def start_server(self) -> None:
        """Starts the tracking server, which takes a while."""
        store = [
            "--backend-store-uri",
            f"{SQLITE}{self.database}",
            "--artifacts-destination",
            str(self.folder / "mlflow"),
        ]
        command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(self._port)]
        with (self.folder / "mlflow.log").open("a") as log:
            self.server = psutil.Popen([*command, "--workers", "1"], stdout=log, stderr=log)

    def wait_for_server(self) -> None:
        """Waits until it answers."""

        def answers() -> bool:
            with suppress(OSError):  # the port is open before anything answers at it
                urlopen(f"{self.uri}/health", timeout=60).close()
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
    address, os.environ[MARK] = os.environ.pop("RAY_ADDRESS", None), str(folder)
    try:
        yield
    finally:
        left = [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_marked(process)]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        del os.environ[MARK]
        if address:
            os.environ["RAY_ADDRESS"] = address


def _is_marked(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.environ().get(MARK) == os.environ[MARK])
    return False
