"""Many faults over several runs, each of which must end as the one that nothing befell."""

import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.progress import Progress

from ffdist.chaos.faults import BESIDE, KINDS, NETWORK, Fault, impossible_kinds
from ffdist.chaos.network import Network
from ffdist.chaos.training import PATIENCE_S, NotSurvived, Surroundings, Training, marked
from ffdist.checkpoint import commit_name
from ffdist.config import Config, ConfigError
from ffdist.failures import Recovery
from ffdist.pipeline.blueprint import CHUNK
from ffdist.pipeline.schedule import Position
from ffdist.prepare import prepare
from ffdist.runtime.access import private_ray
from ffdist.tracking.averages import is_learned
from ffdist.tracking.results import results_table
from ffdist.tracking.server import metric_histories

FAULTS_A_RUN = 10
COMMITS_A_RUN = 40
DISTURBED = 0.85
"""Share of a run that faults fall in: one that comes when the run is done would not be recovered from."""
STALL_TIMEOUT_S, STALL_SHARE = 6.0, 0.2
"""A stage that does nothing for this long counts as stuck; the share is that of the undisturbed run's duration."""
STEPS = ("noticing", "placing", "starting", "restoring", "replaying")
"""Of a recovery."""


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

    kinds: list[str]
    skipped: dict[str, str]
    """Kinds that this machine does not permit, and why."""
    faults: list[Injected]
    ends: dict[int, End | str]
    """How each run ended, or why it did not."""
    truth: End
    seconds: float

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each kind of fault; times are medians in seconds."""
        return [self._row(kind, [fault for fault in self.faults if fault.kind == kind]) for kind in self.kinds]

    def _row(self, kind: str, faults: list[Injected]) -> dict[str, Any]:
        ends = [self.ends[fault.run] for fault in faults]
        steps = {step: _median(fault.seconds.get(step) for fault in faults) for step in STEPS}
        counts = {
            "skipped": self.skipped.get(kind, ""),
            "injected": len(faults),
            "survived": sum(fault.survived for fault in faults),
            "chunks redone": _median(fault.redone for fault in faults),
        }
        same = sum(end.weights_sha256 == self.truth.weights_sha256 for end in ends if isinstance(end, End))
        whole = sum(not self._metrics_trace(end) for end in ends if isinstance(end, End))
        total = _median(sum(fault.seconds.values()) for fault in faults if fault.seconds)
        return {"fault": kind, **counts, **steps, "seconds": total, "weights equal": same, "metrics whole": whole}

    def failures(self) -> list[str]:
        """Returns each fault that was not survived, and each run whose end the faults changed, with the cause."""
        failures = [f"{fault.kind} (run {fault.run}): {fault.told}" for fault in self.faults if not fault.survived]
        spoiled = {fault.run for fault in self.faults if not fault.survived}
        for run, end in self.ends.items():
            if run in spoiled and isinstance(end, str):
                continue  # a consequence
            kinds = ", ".join(dict.fromkeys(fault.kind for fault in self.faults if fault.run == run))
            if isinstance(end, str):
                trace = end
            elif end.weights_sha256 != self.truth.weights_sha256:
                trace = "its final weights differ from the undisturbed run's"
            else:
                trace = self._metrics_trace(end)
            if trace:
                failures.append(f"run {run}, with {kinds or 'no fault'}: {trace}")
        return failures if failures or self.faults else ["no fault was injected; give more --minutes"]

    def _metrics_trace(self, end: End) -> str:
        """Returns what faults did to a run's metrics, empty if nothing."""
        if end.doubled:
            return f"metrics with a step twice: {', '.join(end.doubled)}"
        names = sorted(self.truth.learned.keys() | end.learned.keys())
        differing = [name for name in names if self.truth.learned.get(name) != end.learned.get(name)]
        return f"metrics that differ from the undisturbed run's: {', '.join(differing)}" if differing else ""


class Campaign:
    """Runs a configuration undisturbed, and then with faults, several a run, until all of them are injected.

    Args:
        words: Configuration and settings, as `ffdist train` takes them.
        config: What they mean.
        faults: How many; every kind comes about equally often.
        kinds: Kinds of faults; empty for all that this machine permits.
        seed: Decides their order, their victims and moments.
        minutes: When to stop injecting, whatever is left.

    Raises:
        ConfigError: The configuration cannot be trained, or there is no such kind.
    """

    def __init__(
        self, words: Sequence[str], config: Config, *, faults: int, kinds: Sequence[str], seed: int, minutes: float
    ) -> None:
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ConfigError(f"--kind must be one of {', '.join(KINDS)} (given: {', '.join(unknown)})")
        minibatches, draw = prepare(config).order.minibatches, random.Random(seed)
        self._kinds = [kind for kind in KINDS if kind in kinds or not kinds]
        impossible = impossible_kinds()
        self._skipped = {kind: impossible[kind] for kind in self._kinds if kind in impossible}
        if not (possible := [kind for kind in self._kinds if kind not in impossible]):
            raise ConfigError(f"this machine permits none of these faults: {'; '.join(set(self._skipped.values()))}")
        self._network = not NETWORK & impossible.keys()
        rounds = math.ceil(faults / len(possible))
        self._left = [kind for _ in range(rounds) for kind in draw.sample(possible, len(possible))][:faults]
        self._draw, self._faults, self._seconds = draw, faults, minutes * 60
        steps, size = config.passes * minibatches, config.pipeline.chunk_size
        self._chunk_size = CHUNK if size == "auto" else size
        self._last = commit_name(Position(*divmod(int(steps * DISTURBED), minibatches)))
        self._words = [
            *words,
            *("pipeline.max_failures=1000", f"pipeline.stop_timeout_s={PATIENCE_S:g}"),
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
            with (
                Progress(transient=True) as bar,
                private_ray() as ray_folder,
                marked(self._folder),
                Network() if self._network else nullcontext() as network,
                Surroundings(self._folder, ray_folder, network) as around,
            ):
                task = bar.add_task("undisturbed", total=self._faults)
                self.report = self._undisturbed(around)
                while self._left and time.monotonic() - start < self._seconds:
                    number = len(self.report.ends) + 1
                    bar.update(task, description=f"run {number}")
                    for injected in self._run(number, around, self.report):
                        bar.advance(task)
                        bar.console.print(_line(injected), highlight=False, markup=False)
            return self.report._replace(seconds=time.monotonic() - start)
        finally:
            if not self.report or not self.report.failures():
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                Console().print(f"see {self._folder}", highlight=False, markup=False)

    def _undisturbed(self, around: Surroundings) -> Report:
        """Trains without faults, which also tells how long a stall must be on this machine to be one."""
        start = time.monotonic()
        undisturbed = self._training("undisturbed", around)
        if undisturbed.end():
            raise ConfigError(f"without any fault it fails: {undisturbed.told()}")
        stall_timeout_s = max(STALL_TIMEOUT_S, STALL_SHARE * (time.monotonic() - start))
        self._words.append(f"pipeline.stall_timeout_s={stall_timeout_s:.1f}")
        return Report(self._kinds, self._skipped, [], {}, _end(undisturbed, around), 0.0)

    def _run(self, number: int, around: Surroundings, report: Report) -> Iterator[Injected]:
        """Trains with faults."""
        training = self._training(f"run_{number}", around)
        try:
            for injected in self._disturb(number, training, around):
                report.faults.append(injected)
                yield injected
            code = training.end()
            end = f"it ended with exit code {code}: {training.told()}" if code else _end(training, around)
        except NotSurvived as error:
            training.driver.kill()
            training.driver.wait()
            end = str(error)
        report.ends[number] = end

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
                fault.wait_for_recovery(before)
            if training.ended and training.driver.returncode:
                raise NotSurvived(f"the driver ended with exit code {training.driver.returncode}: {training.told()}")
            if recoveries := [recovery for recovery in training.recoveries()[before:] if "replayed" in recovery]:
                redone = max(fault.step, *(recovery["step"] for recovery in recoveries)) - recoveries[-1]["from"]
                seconds = _steps(fault.at, recoveries[-1])
        except (NotSurvived, psutil.Error, OSError) as error:
            told = str(error) or repr(error)
        fault.around.repair()
        return Injected(kind, number, not told, told, math.ceil(redone / self._chunk_size), seconds)


def print_report(report: Report) -> None:
    """Prints the table, in Markdown, and what went wrong."""
    rows = [{name: _in_words(value) for name, value in row.items()} for row in report.rows()]
    print(results_table(rows))
    print(f"{len(report.faults)} faults in {len(report.ends)} runs, {report.seconds / 60:.1f} minutes")


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
