"""Real parts of a real pipeline are killed or stopped, and the run ends as if nothing had happened."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ffdist import load_config, train
from ffdist.config import RunFailed
from ffdist.failures import Failures, PartLost

SHORT = [
    *("model.layers=[60,50,40]", "training.epochs=150", "tracking.every_minibatches=20", "pipeline.stages=2"),
    *("negatives.kind=hard_label", "negatives.prediction_delay=30", "checkpoint.every_minibatches=40"),
    *("training.validation_samples=200", "training.evaluate_every=20", "pipeline.stall_timeout_s=4"),
]
FAULTS = {
    "stage": ("StageActor", signal.SIGKILL),
    "the readout": ("ReadoutActor", signal.SIGKILL),
    "negative actor": ("NegativeActor", signal.SIGKILL),
    "the writer of commits": ("WriterActor", signal.SIGKILL),
    "did nothing for 4 s": ("StageActor", signal.SIGSTOP),
}


def processes(actor: str) -> list[int]:
    """Ray names the process of an actor by its class."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(f"ray::{actor}".encode()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)


def newest(runs: Path) -> str:
    return max((path.parent.name for path in runs.glob("*/commits/*/manifest.json")), default="")


def injected(runs: Path, faults: list[tuple[str, signal.Signals]]) -> threading.Thread:
    """Injects each fault at some commit after the one before, once there are new processes."""

    def inject() -> None:
        seen: set[int] = set()
        for actor, how in faults:
            before = newest(runs)
            while not (set(processes(actor)) - seen and newest(runs) > before):
                time.sleep(0.01)
            for kind, _ in FAULTS.values():
                seen |= set(processes(kind))
            os.kill(processes(actor)[-1], how)

    thread = threading.Thread(target=inject, daemon=True)
    thread.start()
    return thread


def test_lost_parts_change_nothing(ray_start_4_cpus, tmp_path_factory):
    runs, others = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("others")
    config = load_config("digits", SHORT)
    truth = train(config, runner="serial", runs=others)
    thread = injected(runs, list(FAULTS.values()))
    run = train(config, runs=runs)
    thread.join(1)
    assert run.summary["weights_sha256"] == truth.summary["weights_sha256"]
    recoveries = run.summary["recoveries"]
    assert len(recoveries) == len(FAULTS)
    for words, recovery in zip(FAULTS, recoveries, strict=True):
        assert words in recovery["lost"]
        times = [recovery[event] for event in ("placed", "started", "restored", "replayed")]
        assert times == sorted(times)


def test_too_many_failures_end_a_run_with_the_first_and_its_history(ray_start_4_cpus, tmp_path):
    config = load_config("digits", [*SHORT, "pipeline.max_failures=1", "training.epochs=10000"])
    injected(tmp_path, [FAULTS["stage"], FAULTS["the readout"]])
    with pytest.raises(
        RunFailed, match=r"stage \d is gone .* s later the readout is gone .*no more than 1 failures in 3600 s"
    ):
        train(config, runs=tmp_path)


def test_old_failures_are_forgotten(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    failures = Failures(1, 10.0)
    for moment in (0, 11, 22):
        now[0] = moment
        failures.take(PartLost("one"), 0)
    now[0] = 23
    with pytest.raises(RunFailed, match="one; 1 s later two; no more than 1"):
        failures.take(PartLost("two"), 0)
