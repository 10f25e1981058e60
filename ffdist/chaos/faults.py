"""Real faults: signals, lost nodes, torn files, a full disk, a tracking server that is away, a bad network."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import psutil

from ffdist.chaos.network import Link, Network
from ffdist.chaos.training import NotSurvived, Surroundings, Training, wait_for
from ffdist.checkpoint import MANIFEST

OUTAGE_S = 5.0
SHORT_PARTITION_S = 2.0
"""Short enough for TCP and Ray, which declares a node dead after some 15 to 60 s."""
CLOCK_ERROR_S = 3600
PARTS = ("StageActor", "ReadoutActor", "NegativeActor", "WriterActor")
STOPPED, REFUSED, INTERRUPTED = 1, 2, 130
"""Exit codes."""


class Fault:
    """A fault about to befall a training.

    Args:
        training: Which.
        around: Where it runs.
        draw: Decides what the seed is to decide.
    """

    def __init__(self, training: Training, around: Surroundings, draw: random.Random) -> None:
        self.training, self.around, self._draw = training, around, draw
        self.at = time.time()
        """When it struck, in seconds since 1970."""
        self.step = 0
        """Minibatches that a driver had done when it died."""

    def stage(self) -> None:
        """`kill -9` of a stage."""
        self._kill("StageActor")

    def readout(self) -> None:
        """`kill -9` of the readout."""
        self._kill("ReadoutActor")

    def negatives(self) -> None:
        """`kill -9` of a negative actor."""
        self._kill("NegativeActor")

    def writer(self) -> None:
        """`kill -9` of the writer of commits."""
        self._kill("WriterActor")

    def two_parts(self) -> None:
        """`kill -9` of two parts at once."""
        self._kill(*self._draw.sample(PARTS, 2))

    def part_in_recovery(self) -> None:
        """`kill -9` of a stage, and of a part that is started in its place."""
        old, before = self._processes(), len(self.training.recoveries())
        self._kill("StageActor")
        wait_for("its being noticed", lambda: len(self.training.recoveries()) > before)
        self._signal(wait_for("new parts", lambda: set(self._processes()) - set(old)), signal.SIGKILL)

    def stuck_stage(self) -> None:
        """SIGSTOP of a stage."""
        self._signal(self._actors("StageActor"), signal.SIGSTOP)

    def node(self) -> None:
        """All of a node, lost."""
        self.at = time.time()
        self.around.lose_node()

    def driver(self) -> None:
        """`kill -9` of the driver, resumed."""
        self._kill_driver()
        self.training.resume()

    def asked_to_stop(self) -> None:
        """SIGTERM to the driver, as a cluster's preemption, resumed."""
        self._stop("resume with --resume")

    def group_asked_to_stop(self) -> None:
        """SIGTERM to the driver and its process group, as `timeout` sends it, resumed."""
        self._stop("resume with --resume", group=True)

    def all_asked_to_stop(self) -> None:
        """SIGTERM to the driver and all actors, as systemd and Slurm send it, resumed from the last checkpoint."""
        self._stop(others=self._processes())

    def torn_commit(self) -> None:
        """A driver killed amid a commit, at any of its writes."""
        self._kill_driver()
        newest = self._commit()
        torn = newest.with_name(f"{newest.name[:-6]}{int(newest.name[-6:]) + 1:06d}")
        files = sorted(newest.glob("*"), key=lambda file: (file.name == MANIFEST, file.name))
        whole = self._draw.randrange(len(files))
        torn.mkdir()
        for file in files[:whole]:
            shutil.copy(file, torn)
        half = files[whole].read_bytes()[: files[whole].stat().st_size // 2]
        (torn / f"{files[whole].name}.0123abcd.part").write_bytes(half)
        self.training.resume()

    def flipped_byte(self) -> None:
        """A byte of the newest commit flipped while the run is stopped: refused, and resumed from the one before."""
        wait_for("two commits", lambda: self.training.ended or len(self.training.commits()) > 1)
        self._kill_driver()
        file = self._draw.choice(sorted(self._commit().iterdir()))
        content = bytearray(file.read_bytes())
        content[self._draw.randrange(len(content))] ^= 1 << self._draw.randrange(8)
        file.write_bytes(content)
        self.training.resume()
        self._must_end(REFUSED, str(file))
        self.training.resume("--resume-from-older")

    def full_disk(self) -> None:
        """A file-size limit on the writer: stopped in order, and resumed."""
        writer = self._actors("WriterActor")[-1]
        self.at = time.time()
        writer.rlimit(psutil.RLIMIT_FSIZE, (100, 100))
        self._must_end(STOPPED, "cannot be written", "its last good commit is")
        self.training.resume()

    def server_hangs(self) -> None:
        """SIGSTOP of the tracking server, for a while."""
        self.at = time.time()
        self.around.signal_server(signal.SIGSTOP)
        time.sleep(OUTAGE_S)
        self.around.signal_server(signal.SIGCONT)

    def server_refuses(self) -> None:
        """The tracking server killed, and started again."""
        self.at = time.time()
        psutil.wait_procs(self.around.signal_server(signal.SIGKILL), timeout=10)  # each holds the port
        self.around.start_server()
        self.around.wait_for_server()

    def server_fails(self) -> None:
        """The tracking server without its table of metrics for a while: it answers with errors."""
        self.at = time.time()
        self._change_database("alter table metrics rename to away")
        time.sleep(OUTAGE_S)
        self._change_database("alter table away rename to metrics")

    def network_delay(self) -> None:
        """A round trip of 200 ms between the nodes, for a while."""
        self._disturb_link(Link(delay_s=0.1), OUTAGE_S)

    def packet_loss(self) -> None:
        """One packet in 20 is lost between the nodes, for a while."""
        self._disturb_link(Link(loss=0.05), OUTAGE_S)

    def limited_bandwidth(self) -> None:
        """A link of 1.6 Mbit/s between the nodes, for a while."""
        self._disturb_link(Link(bytes_per_s=200_000), OUTAGE_S)

    def short_partition(self) -> None:
        """A partition that heals before Ray declares the node dead."""
        self._disturb_link(Link(loss=1), SHORT_PARTITION_S)

    def long_partition(self) -> None:
        """A partition that heals after Ray has declared the node dead, which then ends by itself."""
        before = len(self.training.recoveries())
        self.at = time.time()
        self.around.set_link(Link(loss=1))
        self.wait_for_recovery(before)
        self.around.set_link(Link())
        wait_for("the end of the node that Ray declared dead", lambda: self.around.second.poll() is not None)

    def wrong_clock(self) -> None:
        """The node on which the driver is not replaced by one whose clock is an hour ahead."""
        self._kill_driver()
        self.around.lose_node()
        self.around.add_node(**clock_environment(self.around.folder))
        self.at = time.time()
        self.training.resume()

    def wait_for_recovery(self, before: int) -> None:
        """Waits until the run has recovered from what struck it, or has ended without having to.

        Args:
            before: Number of recoveries before the fault.
        """

        def recovered() -> bool:
            return self.training.ended or "replayed" in (self.training.recoveries()[before:] or [{}])[-1]

        wait_for("the recovery", recovered)

    def _disturb_link(self, link: Link, seconds: float) -> None:
        self.around.set_link(link)
        self.at = time.time()
        time.sleep(seconds)
        delivered, dropped = self.around.set_link(Link())
        if not (dropped if link.loss else delivered):
            raise NotSurvived(f"no packet met the fault (delivered: {delivered}, dropped: {dropped})")

    def _actors(self, name: str) -> list[psutil.Process]:
        found = wait_for(f"a {name}", lambda: self.training.ended or self.training.actors(name))
        if found is True:
            raise NotSurvived("the run ended before the fault")
        return list(found)

    def _processes(self) -> list[psutil.Process]:
        return [process for name in PARTS for process in self.training.actors(name)]

    def _kill(self, *names: str) -> None:
        doomed = [self._draw.choice(self._actors(name)) for name in names]
        self.at = time.time()
        for process in doomed:
            process.kill()

    def _signal(self, processes: "list[psutil.Process] | set[psutil.Process]", number: int) -> None:
        chosen = self._draw.choice(sorted(processes, key=lambda process: process.pid))
        self.at = time.time()
        chosen.send_signal(number)

    def _kill_driver(self) -> None:
        self.at = time.time()
        self.training.driver.kill()
        self.training.driver.wait()
        self.step = self.training.step()

    def _stop(self, *words: str, group: bool = False, others: Sequence[psutil.Process] = ()) -> None:
        self.at = time.time()
        for process in (self.training.driver, *others):
            process.send_signal(signal.SIGTERM)
        if group:
            os.killpg(self.training.driver.pid, signal.SIGTERM)
        self._must_end(INTERRUPTED, *words)
        self.training.resume()

    def _must_end(self, code: int, *words: str) -> None:
        ended, told = self.training.end(), self.training.told()
        if ended != code or not all(word in told for word in words):
            expected = " and ".join([f"exit code {code}", *(f"`{word}`" for word in words)])
            raise NotSurvived(f"the driver should end with {expected}, and ended with {ended}: {told}")

    def _commit(self) -> Path:
        return self.training.folder / "commits" / self.training.commits()[-1]

    def _change_database(self, statement: str) -> None:
        with closing(sqlite3.connect(self.around.database, timeout=30)) as database:
            database.execute(statement)


KINDS: dict[str, Callable[[Fault], None]] = {
    "stage": Fault.stage,
    "readout": Fault.readout,
    "negative actor": Fault.negatives,
    "writer of commits": Fault.writer,
    "two parts at once": Fault.two_parts,
    "part during recovery": Fault.part_in_recovery,
    "stuck stage": Fault.stuck_stage,
    "lost node": Fault.node,
    "driver": Fault.driver,
    "SIGTERM": Fault.asked_to_stop,
    "SIGTERM to the group": Fault.group_asked_to_stop,
    "SIGTERM to all": Fault.all_asked_to_stop,
    "torn commit": Fault.torn_commit,
    "flipped byte": Fault.flipped_byte,
    "full disk": Fault.full_disk,
    "server hangs": Fault.server_hangs,
    "server refuses": Fault.server_refuses,
    "server answers 500": Fault.server_fails,
    "network delay": Fault.network_delay,
    "packet loss": Fault.packet_loss,
    "limited bandwidth": Fault.limited_bandwidth,
    "short partition": Fault.short_partition,
    "long partition": Fault.long_partition,
    "wrong clock": Fault.wrong_clock,
}
NETWORK = {"network delay", "packet loss", "limited bandwidth", "short partition", "long partition"}
BESIDE = {"server hangs", "server refuses", "server answers 500"} | NETWORK - {"long partition"}
"""Faults that a run need not recover from: it continues."""


def clock_environment(folder: Path) -> dict[str, str]:
    """Returns environment variables that set the clocks of processes forward.

    libfaketime must leave CLOCK_MONOTONIC alone, because it misses some of the calls that wait for it. But then its
    `clock_nanosleep`, which is Python's `time.sleep`, fails (libfaketime 0.9.10), so Python sleeps in another way.

    Args:
        folder: For a Python module.
    """
    command = ["faketime", "-m", "-f", f"+{CLOCK_ERROR_S}", "printenv", "LD_PRELOAD"]
    library = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    sleep = "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
    (folder / "sitecustomize.py").write_text(sleep)
    clock = {"LD_PRELOAD": library, "FAKETIME": f"+{CLOCK_ERROR_S}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return clock | {"PYTHONPATH": str(folder)}


def impossible_kinds() -> dict[str, str]:
    """Returns the kinds of faults that this machine does not permit, and why."""
    impossible: dict[str, str] = {}
    try:
        Network().close()
    except OSError as error:
        impossible |= dict.fromkeys(sorted(NETWORK), f"no network namespaces with TUN devices: {error}")
    if not shutil.which("faketime"):
        impossible["wrong clock"] = "faketime is not installed"
    return impossible
