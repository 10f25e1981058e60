"""A campaign injects faults into several runs, and compares their results with those of an undisturbed run."""

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

from ffdist.chaos.faults import KINDS, NETWORK_KINDS, TRANSIENT_KINDS, Fault, impossible_kinds
from ffdist.chaos.network import Network
from ffdist.chaos.training import TIMEOUT_S, LocalCluster, NotSurvived, Training, mark_processes
from ffdist.checkpoint.checkpoints import checkpoint_name
from ffdist.config.schema import Config
from ffdist.errors import ConfigError
from ffdist.pipeline.blueprint import DEFAULT_CHUNK
from ffdist.pipeline.schedule import Position
from ffdist.runs.results import results_table
from ffdist.runtime.access import private_ray
from ffdist.tracking.server import open_client
from ffdist.tracking.sync import sync
from ffdist.training.metrics import is_learned
from ffdist.training.prepare import prepare
from ffdist.training.recoveries import Recovery

MAX_FAULTS_PER_RUN = 10
NUM_CHECKPOINTS_PER_RUN = 40
FAULT_FRACTION = 0.85
"""Fraction of a run in which faults are injected; later, the run could end before it has recovered."""
MIN_STALL_TIMEOUT_S, STALL_FRACTION = 6.0, 0.2
"""The stall timeout is this fraction of the duration of the undisturbed run, but at least the minimum."""
PHASES = ("noticing", "placing", "starting", "restoring", "replaying")
"""Phases of a recovery."""


class FaultResult(NamedTuple):
    """The result of one injected fault."""

    kind: str
    run: int
    survived: bool
    problem: str
    """Description of the problem; empty if the fault was survived."""
    redone: int
    """Number of chunks that were computed again."""
    seconds: dict[str, float]
    """Duration of each phase of the recovery; empty if there was none."""


class RunResult(NamedTuple):
    """The result of a completed run."""

    weights_sha256: str
    metrics: dict[str, list[tuple[int, float]]]
    """Steps and values of the metrics that do not depend on time."""
    duplicates: list[str]
    """Names of metrics that have more than one value for a step."""


class Report(NamedTuple):
    """The results of a campaign."""

    kinds: list[str]
    skipped: dict[str, str]
    """Kinds that cannot be injected on this machine, each with the reason."""
    faults: list[FaultResult]
    runs: dict[int, RunResult | str]
    """Result of each run, or the reason why there is none."""
    reference: RunResult
    """Result of the undisturbed run."""
    seconds: float

    def rows(self) -> list[dict[str, Any]]:
        """Returns a table row for each kind of fault; times are medians in seconds."""
        return [self._row(kind, [fault for fault in self.faults if fault.kind == kind]) for kind in self.kinds]

    def _row(self, kind: str, faults: list[FaultResult]) -> dict[str, Any]:
        completed = [result for fault in faults if isinstance(result := self.runs[fault.run], RunResult)]
        phases = {phase: _median(fault.seconds.get(phase) for fault in faults) for phase in PHASES}
        counts = {
            "skipped": self.skipped.get(kind, ""),
            "injected": len(faults),
            "survived": sum(fault.survived for fault in faults),
            "chunks redone": _median(fault.redone for fault in faults),
        }
        num_equal = sum(result.weights_sha256 == self.reference.weights_sha256 for result in completed)
        num_whole = sum(not self._metrics_problem(result) for result in completed)
        total_s = _median(sum(fault.seconds.values()) for fault in faults if fault.seconds)
        checks = {"weights equal": num_equal, "metrics whole": num_whole}
        return {"fault": kind, **counts, **phases, "seconds": total_s, **checks}

    def failures(self) -> list[str]:
        """Returns a description of each fault that was not survived, and of each run whose result differs."""
        failures = [f"{fault.kind} (run {fault.run}): {fault.problem}" for fault in self.faults if not fault.survived]
        reported = {fault.run for fault in self.faults if not fault.survived}
        for run, result in self.runs.items():
            if run in reported and isinstance(result, str):
                continue  # a consequence of the fault
            kinds = ", ".join(dict.fromkeys(fault.kind for fault in self.faults if fault.run == run))
            if isinstance(result, str):
                problem = result
            elif result.weights_sha256 != self.reference.weights_sha256:
                problem = "its final weights differ from the undisturbed run's"
            else:
                problem = self._metrics_problem(result)
            if problem:
                failures.append(f"run {run}, with {kinds or 'no fault'}: {problem}")
        return failures if failures or self.faults else ["no fault was injected; give more --minutes"]

    def _metrics_problem(self, result: RunResult) -> str:
        """Returns the errors in a run's metrics; empty if there are none."""
        if result.duplicates:
            return f"metrics with more than one value for a step: {', '.join(result.duplicates)}"
        expected, actual = self.reference.metrics, result.metrics
        differing = [name for name in sorted(expected.keys() | actual.keys()) if expected.get(name) != actual.get(name)]
        return f"metrics that differ from the undisturbed run's: {', '.join(differing)}" if differing else ""


class Campaign:
    """Trains a configuration undisturbed, and then with faults, several per run, until all of them are injected.

    Args:
        arguments: Configuration and settings, as `ffdist train` takes them.
        config: The configuration that `arguments` describe.
        faults: Number of faults; every kind is injected about equally often.
        kinds: Kinds of faults; empty for all that can be injected on this machine.
        seed: Seed of the order, the targets and the times of the faults.
        minutes: Time limit for injecting faults.

    Raises:
        ConfigError: The configuration cannot be trained, or a kind is unknown or cannot be injected on this machine.
    """

    def __init__(
        self, arguments: Sequence[str], config: Config, *, faults: int, kinds: Sequence[str], seed: int, minutes: float
    ) -> None:
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ConfigError(f"--kind must be one of {', '.join(KINDS)} (given: {', '.join(unknown)})")
        num_minibatches, rng = prepare(config).order.num_minibatches, random.Random(seed)
        self._kinds = [kind for kind in KINDS if kind in kinds or not kinds]
        impossible = impossible_kinds()
        self._skipped = {kind: impossible[kind] for kind in self._kinds if kind in impossible}
        if not (possible := [kind for kind in self._kinds if kind not in impossible]):
            raise ConfigError(f"this machine supports none of these faults: {'; '.join(set(self._skipped.values()))}")
        self._has_network = not NETWORK_KINDS & impossible.keys()
        rounds = math.ceil(faults / len(possible))
        self._remaining = [kind for _ in range(rounds) for kind in rng.sample(possible, len(possible))][:faults]
        self._rng, self._num_faults, self._time_limit_s = rng, faults, minutes * 60
        steps, size = config.num_epochs * num_minibatches, config.pipeline.chunk_size
        self._chunk_size = DEFAULT_CHUNK if size == "auto" else size
        self._last_fault_checkpoint = checkpoint_name(Position(*divmod(int(steps * FAULT_FRACTION), num_minibatches)))
        self._arguments = [
            *arguments,
            *("pipeline.max_failures=1000", f"pipeline.stop_timeout_s={TIMEOUT_S:g}"),
            f"pipeline.chunk_size={self._chunk_size}",
            *(f"checkpoint.every_minibatches={max(1, steps // NUM_CHECKPOINTS_PER_RUN)}", "checkpoint.keep_last=3"),
        ]
        self._folder = Path(tempfile.mkdtemp(prefix="ffdist-chaos-"))
        self.report: Report | None = None

    def run(self) -> Report:
        """Runs the campaign; keeps its folder, with the logs of all runs, if there are failures.

        Raises:
            ConfigError: The undisturbed run fails.
        """
        start = time.monotonic()
        try:
            with (
                Progress(transient=True) as bar,
                private_ray() as ray_folder,
                mark_processes(self._folder),
                Network() if self._has_network else nullcontext() as network,
            ):
                cluster = LocalCluster(self._folder, ray_folder, network)
                task = bar.add_task("undisturbed", total=self._num_faults)
                self.report = self._run_undisturbed(cluster)
                while self._remaining and time.monotonic() - start < self._time_limit_s:
                    number = len(self.report.runs) + 1
                    bar.update(task, description=f"run {number}")
                    for result in self._run_with_faults(number, cluster, self.report):
                        bar.advance(task)
                        bar.console.print(_line(result), highlight=False, markup=False)
            return self.report._replace(seconds=time.monotonic() - start)
        finally:
            if not self.report or not self.report.failures():
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                Console().print(f"the logs are in {self._folder}", highlight=False, markup=False)

    def _run_undisturbed(self, cluster: LocalCluster) -> Report:
        """Trains without faults, and derives the stall timeout from the duration."""
        start = time.monotonic()
        undisturbed = self._start_training("undisturbed", cluster)
        if undisturbed.wait_for_exit():
            raise ConfigError(f"the run fails even without faults: {undisturbed.last_output()}")
        stall_timeout_s = max(MIN_STALL_TIMEOUT_S, STALL_FRACTION * (time.monotonic() - start))
        self._arguments.append(f"pipeline.stall_timeout_s={stall_timeout_s:.1f}")
        return Report(self._kinds, self._skipped, [], {}, _read_result(undisturbed, cluster), 0.0)

    def _run_with_faults(self, number: int, cluster: LocalCluster, report: Report) -> Iterator[FaultResult]:
        """Trains with faults; adds the results to the report, and yields the result of each fault."""
        training = self._start_training(f"run_{number}", cluster)
        try:
            for fault in self._inject_faults(number, training, cluster):
                report.faults.append(fault)
                yield fault
            code = training.wait_for_exit()
            result = f"exit code {code}: {training.last_output()}" if code else _read_result(training, cluster)
        except NotSurvived as error:
            training.driver.kill()
            training.driver.wait()
            result = str(error)
        report.runs[number] = result

    def _start_training(self, name: str, cluster: LocalCluster) -> Training:
        return Training([*self._arguments, f"tracking.uri={cluster.uri}"], self._folder / name, cluster.address)

    def _inject_faults(self, number: int, training: Training, cluster: LocalCluster) -> Iterator[FaultResult]:
        """Injects faults, each after the first checkpoint that follows the recovery from the previous fault."""
        for _ in range(min(MAX_FAULTS_PER_RUN, len(self._remaining))):
            training.wait_for_checkpoint()
            time.sleep(self._rng.random() / 2)
            if training.has_exited or training.checkpoints()[-1] > self._last_fault_checkpoint:
                return
            yield self._inject(self._remaining.pop(0), number, Fault(training, cluster, self._rng))

    def _inject(self, kind: str, number: int, fault: Fault) -> FaultResult:
        training, problem, seconds, num_redone = fault.training, "", dict[str, float](), 0
        before = len(training.recoveries())
        try:
            KINDS[kind](fault)
            if kind in TRANSIENT_KINDS:
                training.wait_for_checkpoint()
            else:
                fault.wait_for_recovery(before)
            if training.has_exited and training.driver.returncode:
                raise NotSurvived(f"the driver's exit code is {training.driver.returncode}: {training.last_output()}")
            if recoveries := [recovery for recovery in training.recoveries()[before:] if "replayed" in recovery]:
                num_redone = max(fault.step, *(recovery["step"] for recovery in recoveries)) - recoveries[-1]["from"]
                seconds = _phase_durations(fault.injected_at, recoveries[-1])
        except (NotSurvived, psutil.Error, OSError) as error:
            problem = str(error) or repr(error)
        fault.cluster.repair()
        return FaultResult(kind, number, not problem, problem, math.ceil(num_redone / self._chunk_size), seconds)


def print_report(report: Report) -> None:
    """Prints the results of a campaign as a Markdown table."""
    rows = [{name: _format(value) for name, value in row.items()} for row in report.rows()]
    print(results_table(rows))
    print(f"{len(report.faults)} faults in {len(report.runs)} runs, {report.seconds / 60:.1f} minutes")


def _phase_durations(injected_at: float, recovery: Recovery) -> dict[str, float]:
    noticed_at = recovery["at"]
    times = [noticed_at + recovery[event] for event in ("placed", "started", "restored", "replayed")]
    times = [injected_at, noticed_at, *times]
    return {phase: end - start for phase, start, end in zip(PHASES, times, times[1:], strict=False)}


def _read_result(training: Training, cluster: LocalCluster) -> RunResult:
    summary = training.summary()
    run_id = summary["mlflow_run_id"]
    for _ in sync([training.folder], cluster.uri, training.runs):  # as a user does if a busy machine was too slow
        pass
    with open_client(cluster.uri) as client:
        histories = {
            name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
            for name in client.get_run(run_id).data.metrics
        }
    metrics = {name: series for name, series in histories.items() if is_learned(name)}
    duplicates = [name for name, series in histories.items() if len({step for step, _ in series}) < len(series)]
    return RunResult(summary["weights_sha256"], metrics, duplicates)


def _line(fault: FaultResult) -> str:
    if not fault.survived:
        return f"run {fault.run}: {fault.kind}: not survived: {fault.problem}"
    recovery = f", recovered in {sum(fault.seconds.values()):.1f} s" if fault.seconds else ""
    return f"run {fault.run}: {fault.kind}{recovery}"


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _format(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
