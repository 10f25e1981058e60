"""Many faults over several runs, each of which must end as the one that nothing befell."""

import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ffdist.chaos.faults import BESIDE, KINDS, Fault
from ffdist.chaos.training import NotSurvived, Surroundings, Training, marked, wait_for
from ffdist.checkpoint import commit_name
from ffdist.config import Config, ConfigError
from ffdist.failures import Recovery
from ffdist.pipeline.blueprint import CHUNK
from ffdist.pipeline.schedule import Position
from ffdist.prepare import prepare
from ffdist.tracking.averages import is_learned
from ffdist.tracking.server import metric_histories

FAULTS_A_RUN = 10
COMMITS_A_RUN = 40
DISTURBED = 0.85
"""Share of a run that faults fall in: one that comes when the run is done would not be recovered from."""
STALL_TIMEOUT_S = 6.0
STEPS = ("noticing", "placing", "starting", "restoring", "replaying")
"""Of a recovery."""
HEAD = ("fault", "injected", "survived", "chunks redone", *STEPS, "seconds", "weights equal", "metrics whole")


class Injected(NamedTuple):
    """What came of a fault."""

    kind: str
    run: int
    survived: bool
    told: str
    """What went wrong, if something did."""
    redone: int
    """Chunks."""
    seconds: dict[str, float]
    """Of each step of the recovery."""


class End(NamedTuple):
    """What a run ends with."""

    weights_sha256: str
    learned: dict[str, list[tuple[int, float]]]
    """Metrics that no clock decides."""
    doubled: list[str]
    """Metrics that have a step twice."""


class Report(NamedTuple):
    """What a campaign came to."""

    faults: list[Injected]
    ends: dict[int, End | None]
    truth: End
    seconds: float

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each kind of fault; times are medians in seconds."""
        return [self._row(kind, [fault for fault in self.faults if fault.kind == kind]) for kind in KINDS]

    def _row(self, kind: str, faults: list[Injected]) -> dict[str, Any]:
        ends = [self.ends[fault.run] for fault in faults]
        steps = {step: _median(fault.seconds.get(step) for fault in faults) for step in STEPS}
        counts = {
            "injected": len(faults),
            "survived": sum(fault.survived for fault in faults),
            "chunks redone": _median(fault.redone for fault in faults),
        }
        same = sum(end.weights_sha256 == self.truth.weights_sha256 for end in ends if end)
        whole = sum(end.learned == self.truth.learned and not end.doubled for end in ends if end)
        total = _median(sum(fault.seconds.values()) for fault in faults if fault.seconds)
        return {"fault": kind, **counts, **steps, "seconds": total, "weights equal": same, "metrics whole": whole}

    @property
    def unbroken(self) -> bool:
        """Whether there were faults, and every one was survived and left no trace in weights and metrics."""
        return (
            bool(self.faults)
            and None not in self.ends.values()
            and all(
                row["injected"] == row["survived"] == row["weights equal"] == row["metrics whole"]
                for row in self.rows()
            )
        )


class Campaign:
    """Runs a configuration undisturbed, and then with faults, several a run, until all of them are injected.

    Args:
        words: Configuration and settings, as `ffdist train` takes them.
        config: What they mean.
        faults: How many; every kind comes about equally often.
        seed: Decides their order, their victims and moments.
        minutes: When to stop injecting, whatever is left.

    Raises:
        ConfigError: The configuration cannot be trained.
    """

    def __init__(self, words: Sequence[str], config: Config, *, faults: int, seed: int, minutes: float) -> None:
        minibatches, draw = prepare(config).order.minibatches, random.Random(seed)
        rounds = math.ceil(faults / len(KINDS))
        self._left = [kind for _ in range(rounds) for kind in draw.sample(list(KINDS), len(KINDS))][:faults]
        self._draw, self._faults, self._seconds = draw, faults, minutes * 60
        steps, size = config.passes * minibatches, config.pipeline.chunk_size
        self._chunk_size = CHUNK if size == "auto" else size
        self._last = commit_name(Position(*divmod(int(steps * DISTURBED), minibatches)))
        self._words = [
            *words,
            *("pipeline.max_failures=1000", f"pipeline.stall_timeout_s={STALL_TIMEOUT_S}"),
            f"pipeline.chunk_size={self._chunk_size}",
            *(f"checkpoint.every_minibatches={max(1, steps // COMMITS_A_RUN)}", "checkpoint.keep=3"),
        ]
        self._folder = Path(tempfile.mkdtemp(prefix="ffdist-chaos-"))
        self.report: Report | None = None

    def run(self) -> Report:
        """Runs it; what went wrong, if something did, can be read in its folder.

        Raises:
            ConfigError: The undisturbed run fails.
        """
        start = time.monotonic()
        try:
            with Progress(transient=True) as bar, marked(self._folder):
                task = bar.add_task("starting a cluster and a tracking server", total=self._faults)
                with Surroundings(self._folder) as around:
                    bar.update(task, description="undisturbed")
                    undisturbed = self._training("undisturbed", around)
                    if undisturbed.end():
                        raise ConfigError(f"without any fault it fails: {undisturbed.told()}")
                    self.report = Report([], {}, _end(undisturbed, around), 0.0)
                    while self._left and time.monotonic() - start < self._seconds:
                        number = len(self.report.ends) + 1
                        bar.update(task, description=f"run {number}")
                        training = self._training(f"run_{number}", around)
                        try:
                            for injected in self._disturb(number, training, around):
                                self.report.faults.append(injected)
                                bar.advance(task)
                                bar.console.print(_line(injected), highlight=False)
                            ended = training.end() == 0
                        except NotSurvived:
                            training.driver.kill()
                            ended = False
                        self.report.ends[number] = _end(training, around) if ended else None
                        if not ended:
                            bar.console.print(f"run {number} did not end well: {training.told()}", highlight=False)
            return self.report._replace(seconds=time.monotonic() - start)
        finally:
            if not self.report or self.report.unbroken:
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                Console().print(f"see {self._folder}", highlight=False)

    def _training(self, name: str, around: Surroundings) -> Training:
        return Training([*self._words, f"tracking.uri={around.uri}"], self._folder / name, around.address)

    def _disturb(self, number: int, training: Training, around: Surroundings) -> Iterator[Injected]:
        """Injects faults, each after a commit that follows the recovery from the one before."""
        for _ in range(min(FAULTS_A_RUN, len(self._left))):
            training.wait_for_commit()
            time.sleep(self._draw.random() / 2)
            if training.ended or training.commits()[-1] > self._last:
                return
            yield self._inject(self._left.pop(0), number, Fault(training, around, self._draw))

    def _inject(self, kind: str, number: int, fault: Fault) -> Injected:
        training, told, seconds, redone = fault.training, "", dict[str, float](), 0
        before = len(training.recoveries())
        try:
            KINDS[kind](fault)
            if kind in BESIDE:
                training.wait_for_commit()
            else:
                wait_for("the recovery", lambda: "replayed" in (training.recoveries()[before:] or [{}])[-1])
                recoveries = training.recoveries()[before:]
                redone = max(fault.step, *(recovery["step"] for recovery in recoveries)) - recoveries[-1]["from"]
                seconds = _steps(fault.at, recoveries[-1])
        except (NotSurvived, IndexError, ValueError, psutil.Error) as error:
            told = str(error) or repr(error)
        if kind == "lost node":
            fault.around.add_node()
        return Injected(kind, number, not told, told, math.ceil(redone / self._chunk_size), seconds)


def print_report(report: Report) -> None:
    """Prints the table, in Markdown, and what went wrong."""
    console, table = Console(width=220, highlight=False), Table(*HEAD, box=box.MARKDOWN)
    for row in report.rows():
        table.add_row(*(_in_words(row[column]) for column in HEAD))
    console.print(table)
    for number, end in report.ends.items():
        if end and end.doubled:
            console.print(f"run {number} has steps twice in {', '.join(end.doubled)}")
    console.print(f"{len(report.faults)} faults in {len(report.ends)} runs, {report.seconds / 60:.1f} minutes")


def _steps(at: float, recovery: Recovery) -> dict[str, float]:
    noticed = recovery["at"]
    marks = [at, noticed, *(noticed + recovery[event] for event in ("placed", "started", "restored", "replayed"))]
    return {step: end - start for step, start, end in zip(STEPS, marks, marks[1:], strict=False)}


def _end(training: Training, around: Surroundings) -> End:
    summary = training.summary()
    found = metric_histories(around.uri, summary["mlflow_run_id"])
    learned = {name: series for name, series in found.items() if is_learned(name)}
    doubled = [name for name, series in found.items() if len({step for step, _ in series}) < len(series)]
    return End(summary["weights_sha256"], learned, doubled)


def _line(fault: Injected) -> str:
    if not fault.survived:
        return f"run {fault.run}: {fault.kind}: not survived: {fault.told}"
    took = f", recovered in {sum(fault.seconds.values()):.1f} s" if fault.seconds else ""
    return f"run {fault.run}: {fault.kind}{took}"


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return median(found) if found else None


def _in_words(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
