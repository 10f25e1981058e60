"""A training run in its own process, with its own Ray cluster and tracking server, for fault injection."""

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
from ffdist.checkpoint.checkpoints import MANIFEST
from ffdist.config.loading import load_config
from ffdist.errors import RunFailed
from ffdist.runs.folder import CONFIG
from ffdist.tracking.outbox import OUTBOX, RECOVERIES, Outbox
from ffdist.tracking.server import SQLITE
from ffdist.training.recoveries import Recovery

TIMEOUT_S = 600.0
"""Timeout of every wait; generous, because a busy machine is slow without being faulty."""
NODE_READY = "This command will now block"
"""Printed by `ray start --block` when a node has joined the cluster and the cluster's address is in its file."""
MAX_NODE_STARTS = 5
"""Attempts to start a node. Ray allows 30 s for each, and a busy machine may need more."""
MARK = "FFDIST_CHAOS"
"""Environment variable that is set in all processes of a campaign and in no others."""
NODE_OPTIONS = ("--num-cpus=2", "--object-store-memory=300000000", "--disable-usage-stats", "--block")


class NotSurvived(RunFailed):
    """A run did not handle a fault as it should."""


def wait_for(event: str, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """Waits until a condition returns a true value, and returns the value.

    Raises:
        NotSurvived: The timeout has passed.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise NotSurvived(f"timed out after {timeout_s:g} s waiting for {event}")
        time.sleep(0.02)
    return value


class Training:
    """A training run whose driver is a child process. Starts the first driver.

    Args:
        arguments: Configuration and settings, as `ffdist train` takes them.
        runs: Runs folder, which no other run uses.
        address: Address of the Ray cluster.
    """

    def __init__(self, arguments: list[str], runs: Path, address: str) -> None:
        self.runs, self.log = runs, runs / "driver.log"
        self._summary = runs / "summary.json"
        self._confirmed = [each for each in arguments if each.startswith("tracking.uri=")]
        self._options = ["--address", address, "--runs", str(runs), "--summary", str(self._summary)]
        runs.mkdir(parents=True)
        self._start("train", *arguments)

    def _start(self, *arguments: str) -> None:
        """Starts a driver."""
        with self.log.open("a") as log:
            command = [sys.executable, "-m", "ffdist.cli", *arguments, *self._options]
            self.driver = psutil.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def resume(self, *options: str) -> None:
        """Starts a driver that resumes the run."""
        self._start("resume", str(self.folder), *self._confirmed, *options)

    @property
    def folder(self) -> Path:
        """Folder of the run; waits until it exists."""
        folders = wait_for("the run's folder", lambda: self.has_exited or list(self.runs.glob(f"*/{CONFIG}")))
        if folders is True and not list(self.runs.glob(f"*/{CONFIG}")):
            raise NotSurvived(f"the run did not start: {self.last_output()}")
        return next(self.runs.glob(f"*/{CONFIG}")).parent

    @property
    def has_exited(self) -> bool:
        """Whether the driver has exited."""
        return self.driver.poll() is not None

    def wait_for_exit(self) -> int:
        """Waits until the driver exits, and returns its exit code.

        Raises:
            NotSurvived: The driver neither exits nor writes another checkpoint before the timeout.
        """
        while not self.has_exited:
            self.wait_for_checkpoint()
        return int(self.driver.returncode)

    def wait_for_checkpoint(self) -> None:
        """Waits until the run has a new checkpoint or the driver exits.

        Raises:
            NotSurvived: Neither happens before the timeout.
        """
        newest = self.checkpoints()[-1:]
        wait_for("a checkpoint", lambda: self.has_exited or self.checkpoints()[-1:] > newest)

    def summary(self) -> dict[str, Any]:
        """Returns the summary of the finished run."""
        return dict(json.loads(self._summary.read_text()))

    def last_output(self) -> str:
        """Returns the last paragraph of the drivers' output, without the log of Ray."""
        lines = [line for line in self.log.read_text().splitlines() if "(raylet" not in line]
        return " ".join("\n".join(lines).split("\n\n")[-1].split())[-1000:]

    def checkpoints(self) -> list[str]:
        """Returns the names of all complete checkpoints, oldest first."""
        return sorted(path.parent.name for path in self.runs.glob(f"*/checkpoints/*/{MANIFEST}"))

    def recoveries(self) -> list[Recovery]:
        """Returns the recoveries of the run so far."""
        return list(json.loads(Outbox.fact_of(self.folder / OUTBOX, RECOVERIES) or "[]"))

    def step(self) -> int:
        """Returns the step, in minibatches, of the last logged metrics; only valid while no driver runs."""
        batch_size = load_config(str(self.folder / CONFIG)).training.batch_size
        with closing(Outbox(self.folder / OUTBOX, 10**9)) as outbox:
            return max((step for series in outbox.history().values() for step, _ in series), default=0) // batch_size

    def actors(self, name: str) -> list[psutil.Process]:
        """Returns the processes of the actors of a class. Ray includes the class in their command lines."""
        actors = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}") and _is_marked(process):
                    actors.append(process)
        return actors


class LocalCluster:
    """A Ray cluster of two nodes and an MLflow server on this machine. `mark_processes` ends their processes.

    Args:
        folder: Folder of the server's database and the logs.
        ray_folder: The folder that `private_ray` yields.
        network: Provides a host for each node. The driver, the head node and the server run on the first host. Without
            a network, both nodes use the loopback address.
    """

    def __init__(self, folder: Path, ray_folder: Path, network: Network | None) -> None:
        self.folder, self.database, self.network = folder, folder / "mlflow.db", network
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._port = server.getsockname()[1]
        self._first_ip, self._second_ip = ADDRESSES if network else ("127.0.0.1", "127.0.0.1")
        self.start_server()
        options = ["--head", "--port=0", "--include-dashboard=false"]
        self._start_node(f"--node-ip-address={self._first_ip}", *options)
        self.address = (ray_folder / "ray" / "ray_current_cluster").read_text().strip()
        """Address of the Ray cluster."""
        self.add_node()
        self.wait_for_server()

    def set_link(self, link: Link) -> tuple[int, int]:
        """Changes the link between the nodes; returns what `Network.set_link` returns."""
        assert self.network, "network faults require a network"
        return self.network.set_link(link)

    def lose_node(self) -> None:
        """Kills all processes of the second node, on which the driver does not run."""
        processes = [self.second_node, *self.second_node.children(recursive=True)]
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=10)

    def add_node(self, **environment: str) -> None:
        """Starts a second node.

        Args:
            **environment: Additional environment variables of its processes.
        """
        options = [f"--node-ip-address={self._second_ip}", f"--address={self.address}"]
        with self.network.second_host() if self.network else nullcontext():
            self.second_node = self._start_node(*options, **environment)

    def repair(self) -> None:
        """Restores the link between the nodes, and replaces the second node if it is lost."""
        if self.network:
            self.network.set_link(Link())
        if self.second_node.poll() is not None:
            self.add_node()

    def _start_node(self, *options: str, **environment: str) -> psutil.Popen:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *NODE_OPTIONS, *options]
        for _ in range(MAX_NODE_STARTS):
            before = self._ray_log().count(NODE_READY)
            with (self.folder / "ray.log").open("a") as log:
                node = psutil.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
            wait_for("a Ray node", lambda: node.poll() is not None or self._ray_log().count(NODE_READY) > before)  # noqa: B023
            if node.poll() is None:
                return node
        raise NotSurvived(f"a Ray node did not start: {self._ray_log()[-1000:]}")

    def _ray_log(self) -> str:
        log = self.folder / "ray.log"
        return log.read_text() if log.exists() else ""

    @property
    def uri(self) -> str:
        """URI of the tracking server."""
        return f"http://127.0.0.1:{self._port}"

    def start_server(self) -> None:
        """Starts the tracking server without waiting until it responds."""
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
        """Waits until the tracking server responds."""

        def is_ready() -> bool:
            with suppress(OSError):  # the port is open before the server responds
                urlopen(f"{self.uri}/health", timeout=60).close()
                return True
            return False

        wait_for("the tracking server", is_ready)

    def signal_server(self, signal_number: int) -> list[psutil.Process]:
        """Sends a signal to all processes of the tracking server, and returns the processes."""
        processes = [self.server, *self.server.children(recursive=True)]
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(signal_number)
        return processes


@contextmanager
def mark_processes(folder: Path) -> Iterator[None]:
    """Marks all processes that are started in a `with` block, and kills those that still run at its end."""
    address, os.environ[MARK] = os.environ.pop("RAY_ADDRESS", None), str(folder)
    try:
        yield
    finally:
        remaining = [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_marked(process)]
        for process in remaining:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(remaining, timeout=10)
        del os.environ[MARK]
        if address:
            os.environ["RAY_ADDRESS"] = address


def _is_marked(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.environ().get(MARK) == os.environ[MARK])
    return False
