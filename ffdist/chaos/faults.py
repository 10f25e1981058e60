"""Real faults: signals, lost nodes, damaged files, a full disk, tracking server outages, network problems."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

import psutil

from ffdist.chaos.network import Link, Network
from ffdist.chaos.training import LocalCluster, NotSurvived, Training, wait_for
from ffdist.checkpoint.checkpoints import MANIFEST

OUTAGE_S = 5.0
"""Duration of a temporary fault."""
SHORT_PARTITION_S = 2.0
"""Short enough for TCP and Ray to recover. Ray declares a node dead after 15 to 60 s."""
CLOCK_ERROR_S = 3600
ACTOR_CLASSES = ("StageActor", "ReadoutActor", "NegativeActor", "WriterActor")
RUN_FAILED, CONFIG_ERROR, INTERRUPTED = 1, 2, 130
"""Exit codes of the driver."""


class Fault:
    """A fault to inject into a run; `KINDS` has a function for each kind.

    Args:
        training: The run.
        cluster: The cluster that the run uses.
        rng: Source of all random choices.
    """

    def __init__(self, training: Training, cluster: LocalCluster, rng: random.Random) -> None:
        self.training, self.cluster, self._rng = training, cluster, rng
        self.injected_at = time.time()
        """Time of the injection, in seconds since 1970."""
        self.step = 0
        """Minibatches done when the driver was killed; 0 for other faults."""

    def kill_two_actors(self) -> None:
        """`kill -9` of two actors of different classes at once."""
        self.kill(*self._rng.sample(ACTOR_CLASSES, 2))

    def kill_during_recovery(self) -> None:
        """`kill -9` of a stage, and of an actor that is started during the recovery."""
        old, before = self._processes(), len(self.training.recoveries())
        self.kill("StageActor")
        wait_for("the failure to be noticed", lambda: len(self.training.recoveries()) > before)
        self._signal(wait_for("new actors", lambda: set(self._processes()) - set(old)), signal.SIGKILL)

    def suspend_stage(self) -> None:
        """SIGSTOP to a stage."""
        self._signal(self._actors("StageActor"), signal.SIGSTOP)

    def lose_node(self) -> None:
        """`kill -9` of all processes of the node on which the driver does not run."""
        self.injected_at = time.time()
        self.cluster.lose_node()

    def kill_driver(self) -> None:
        """`kill -9` of the driver; the run is resumed."""
        self._stop_driver()
        self.training.resume()

    def terminate_all(self) -> None:
        """SIGTERM to the driver and all actors, as sent by systemd and Slurm; the run is resumed."""
        self.terminate(others=self._processes())

    def tear_checkpoint(self) -> None:
        """`kill -9` of the driver, leaving a checkpoint as if a random one of its writes had been interrupted."""
        self._stop_driver()
        newest = self._newest_checkpoint()
        torn = newest.with_name(f"{newest.name[:-6]}{int(newest.name[-6:]) + 1:06d}")
        files = sorted(newest.glob("*"), key=lambda file: (file.name == MANIFEST, file.name))
        num_complete = self._rng.randrange(len(files))
        torn.mkdir()
        for file in files[:num_complete]:
            shutil.copy(file, torn)
        interrupted = files[num_complete]
        half = interrupted.read_bytes()[: interrupted.stat().st_size // 2]
        (torn / f"{interrupted.name}.0123abcd.part").write_bytes(half)
        self.training.resume()

    def flip_byte(self) -> None:
        """A flipped bit in the newest checkpoint; the driver must reject it, and resume from the previous one."""
        wait_for("two checkpoints", lambda: self.training.has_exited or len(self.training.checkpoints()) > 1)
        self._stop_driver()
        file = self._rng.choice(sorted(self._newest_checkpoint().iterdir()))
        content = bytearray(file.read_bytes())
        content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(8)
        file.write_bytes(content)
        self.training.resume()
        self._expect_exit(CONFIG_ERROR, str(file))
        self.training.resume("--skip-damaged")

    def fill_disk(self) -> None:
        """A file size limit on the checkpoint writer; the driver must name the last checkpoint. The run is resumed."""
        writer = self._actors("WriterActor")[-1]
        self.injected_at = time.time()
        writer.rlimit(psutil.RLIMIT_FSIZE, (100, 100))
        self._expect_exit(RUN_FAILED, "cannot be written", "its last good checkpoint is")
        self.training.resume()

    def suspend_server(self) -> None:
        """SIGSTOP to the tracking server for `OUTAGE_S`."""
        self.injected_at = time.time()
        self.cluster.signal_server(signal.SIGSTOP)
        time.sleep(OUTAGE_S)
        self.cluster.signal_server(signal.SIGCONT)

    def restart_server(self) -> None:
        """`kill -9` of the tracking server; it is restarted."""
        self.injected_at = time.time()
        psutil.wait_procs(self.cluster.signal_server(signal.SIGKILL), timeout=10)  # each keeps the port open
        self.cluster.start_server()
        self.cluster.wait_for_server()

    def break_server(self) -> None:
        """The tracking server has no table of metrics for `OUTAGE_S`, so its responses are errors."""
        self.injected_at = time.time()
        self._change_database("alter table metrics rename to hidden")
        time.sleep(OUTAGE_S)
        self._change_database("alter table hidden rename to metrics")

    def partition_until_lost(self) -> None:
        """A partition that heals after Ray has declared the node dead; the node must then exit by itself."""
        before = len(self.training.recoveries())
        self.injected_at = time.time()
        self.cluster.set_link(Link(loss=1))
        self.wait_for_recovery(before)
        self.cluster.set_link(Link())
        wait_for("the exit of the node that Ray declared dead", lambda: self.cluster.second_node.poll() is not None)

    def set_clock_forward(self) -> None:
        """`kill -9` of the driver; the second node is replaced by one whose clock is an hour ahead."""
        self._stop_driver()
        self.cluster.lose_node()
        self.cluster.add_node(**clock_environment(self.cluster.folder))
        self.injected_at = time.time()
        self.training.resume()

    def wait_for_recovery(self, before: int) -> None:
        """Waits until the run has recovered or the driver has exited.

        Args:
            before: Number of recoveries before the fault.
        """

        def is_over() -> bool:
            return self.training.has_exited or "replayed" in (self.training.recoveries()[before:] or [{}])[-1]

        wait_for("the recovery", is_over)

    def change_link(self, link: Link, duration_s: float = OUTAGE_S) -> None:
        """Changes the link between the nodes for a time; fails if that affected no packet."""
        self.cluster.set_link(link)
        self.injected_at = time.time()
        time.sleep(duration_s)
        delivered, dropped = self.cluster.set_link(Link())
        if not (dropped if link.loss else delivered):
            raise NotSurvived(f"the fault affected no packet (delivered: {delivered}, dropped: {dropped})")

    def _actors(self, name: str) -> list[psutil.Process]:
        actors = wait_for(f"a {name}", lambda: self.training.has_exited or self.training.actors(name))
        if actors is True:
            raise NotSurvived("the driver exited before the fault was injected")
        return list(actors)

    def _processes(self) -> list[psutil.Process]:
        return [process for name in ACTOR_CLASSES for process in self.training.actors(name)]

    def kill(self, *names: str) -> None:
        """`kill -9` of an actor of each class at once."""
        processes = [self._rng.choice(self._actors(name)) for name in names]
        self.injected_at = time.time()
        for process in processes:
            process.kill()

    def _signal(self, processes: Iterable[psutil.Process], signal_number: int) -> None:
        process = self._rng.choice(sorted(processes, key=lambda process: process.pid))
        self.injected_at = time.time()
        process.send_signal(signal_number)

    def _stop_driver(self) -> None:
        self.injected_at = time.time()
        self.training.driver.kill()
        self.training.driver.wait()
        self.step = self.training.step()

    def terminate(self, *output: str, group: bool = False, others: Sequence[psutil.Process] = ()) -> None:
        """SIGTERM to the driver, and to its process group or other processes; the run is resumed."""
        self.injected_at = time.time()
        for process in (self.training.driver, *others):
            process.send_signal(signal.SIGTERM)
        if group:
            os.killpg(self.training.driver.pid, signal.SIGTERM)
        self._expect_exit(INTERRUPTED, *output)
        self.training.resume()

    def _expect_exit(self, code: int, *texts: str) -> None:
        actual, output = self.training.wait_for_exit(), self.training.last_output()
        if actual != code or not all(text in output for text in texts):
            expected = " and ".join([f"exit code {code}", *(f"`{text}`" for text in texts)])
            raise NotSurvived(f"the driver must exit with {expected}, but its exit code is {actual}: {output}")

    def _newest_checkpoint(self) -> Path:
        return self.training.folder / "checkpoints" / self.training.checkpoints()[-1]

    def _change_database(self, statement: str) -> None:
        with closing(sqlite3.connect(self.cluster.database, timeout=30)) as database:
            database.execute(statement)


KINDS: dict[str, Callable[[Fault], None]] = {
    "stage": lambda fault: fault.kill("StageActor"),
    "readout": lambda fault: fault.kill("ReadoutActor"),
    "negative actor": lambda fault: fault.kill("NegativeActor"),
    "checkpoint writer": lambda fault: fault.kill("WriterActor"),
    "two actors at once": Fault.kill_two_actors,
    "actor during recovery": Fault.kill_during_recovery,
    "stuck stage": Fault.suspend_stage,
    "lost node": Fault.lose_node,
    "driver": Fault.kill_driver,
    "SIGTERM": lambda fault: fault.terminate("resume with: ffdist resume"),  # as sent by a cluster at preemption
    "SIGTERM to the group": lambda fault: fault.terminate(
        "resume with: ffdist resume", group=True
    ),  # as sent by `timeout`
    "SIGTERM to all": Fault.terminate_all,
    "torn checkpoint": Fault.tear_checkpoint,
    "flipped byte": Fault.flip_byte,
    "full disk": Fault.fill_disk,
    "server hangs": Fault.suspend_server,
    "server refuses": Fault.restart_server,
    "server answers 500": Fault.break_server,
    "network delay": lambda fault: fault.change_link(Link(delay_s=0.1)),  # a round-trip time of 200 ms
    "packet loss": lambda fault: fault.change_link(Link(loss=0.05)),
    "limited bandwidth": lambda fault: fault.change_link(Link(bytes_per_s=200_000)),  # 1.6 Mbit/s
    "short partition": lambda fault: fault.change_link(Link(loss=1), SHORT_PARTITION_S),  # heals before Ray notices
    "long partition": Fault.partition_until_lost,
    "wrong clock": Fault.set_clock_forward,
}
NETWORK_KINDS = {"network delay", "packet loss", "limited bandwidth", "short partition", "long partition"}
TRANSIENT_KINDS = {"server hangs", "server refuses", "server answers 500"} | NETWORK_KINDS - {"long partition"}
"""Kinds of faults that a run continues through, without a recovery."""


def clock_environment(folder: Path) -> dict[str, str]:
    """Returns environment variables that set the clock of a process forward by `CLOCK_ERROR_S`.

    libfaketime must not change CLOCK_MONOTONIC, because it does not intercept all calls that wait for it. With this
    option its `clock_nanosleep` fails (libfaketime 0.9.10), which `time.sleep` calls, so `time.sleep` is replaced.

    Args:
        folder: Folder for the Python module that replaces `time.sleep`.
    """
    command = ["faketime", "-m", "-f", f"+{CLOCK_ERROR_S}", "printenv", "LD_PRELOAD"]
    library = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    sleep = "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
    (folder / "sitecustomize.py").write_text(sleep)
    clock = {"LD_PRELOAD": library, "FAKETIME": f"+{CLOCK_ERROR_S}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return clock | {"PYTHONPATH": str(folder)}


def impossible_kinds() -> dict[str, str]:
    """Returns the kinds of faults that cannot be injected on this machine, each with the reason."""
    impossible: dict[str, str] = {}
    try:
        Network().close()
    except OSError as error:
        impossible |= dict.fromkeys(sorted(NETWORK_KINDS), f"no network namespaces with TUN devices: {error}")
    if not shutil.which("faketime"):
        impossible["wrong clock"] = "faketime is not installed"
    return impossible
