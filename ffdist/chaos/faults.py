"""What can befall a run, for real: signals, lost nodes, torn and flipped files, a full disk, a server away."""

import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil

from ffdist.chaos.training import NotSurvived, Surroundings, Training, wait_for
from ffdist.checkpoint import MANIFEST

OUTAGE_S = 5.0
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
        self._signal(self.training.actors("StageActor"), signal.SIGSTOP)

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
        self.at = time.time()
        self.training.driver.send_signal(signal.SIGTERM)
        self._must_end(INTERRUPTED, "go on by --resume")
        if time.time() - self.at > 15:
            raise NotSurvived(f"it took {time.time() - self.at:.0f} s to stop, and may take 15")
        self.training.resume()

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
        (writer,) = self.training.actors("WriterActor")
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

    def _processes(self) -> list[psutil.Process]:
        return [process for name in PARTS for process in self.training.actors(name)]

    def _kill(self, *names: str) -> None:
        doomed = [self._draw.choice(self.training.actors(name)) for name in names]
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

    def _must_end(self, code: int, *words: str) -> None:
        ended, told = self.training.end(), self.training.told()
        for word in words:
            if ended != code or word not in told:
                raise NotSurvived(f"it should end with {code} and `{word}`, and ended with {ended}: {told}")

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
    "torn commit": Fault.torn_commit,
    "flipped byte": Fault.flipped_byte,
    "full disk": Fault.full_disk,
    "server hangs": Fault.server_hangs,
    "server refuses": Fault.server_refuses,
    "server answers 500": Fault.server_fails,
}
BESIDE = {"server hangs", "server refuses", "server answers 500"}
"""Faults that a run does not recover from, as it just goes on."""
