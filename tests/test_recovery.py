"""How many losses a run takes; that it takes each kind of them is shown by its faults in test_chaos."""

import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ffdist import load_config, train
from ffdist.config import RunFailed
from ffdist.failures import Failures, PartLost

SHORT = [
    *("model.layers=[60,50,40]", "training.epochs=150", "tracking.every_minibatches=20", "pipeline.stages=2"),
    *("negatives.kind=hard_label", "negatives.prediction_delay=30", "checkpoint.every_minibatches=40"),
    *("training.validation_samples=200", "training.evaluate_every=20"),
]
ACTORS = ("StageActor", "ReadoutActor", "NegativeActor", "WriterActor")


def processes(actor: str) -> set[psutil.Process]:
    """Those of this Ray; it names the process of an actor by its class."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"ray::{actor}" in str(process.cmdline()):
                found.add(process)
    return found


def newest(runs: Path) -> str:
    return max((path.parent.name for path in runs.glob("*/commits/*/manifest.json")), default="")


def killed(runs: Path, actors: list[str]) -> None:
    """Kills an actor of each class at some commit after the one before, once there are new processes."""

    def kill() -> None:
        seen: set[psutil.Process] = set()
        for actor in actors:
            before = newest(runs)
            while not (processes(actor) - seen and newest(runs) > before):
                time.sleep(0.01)
            doomed = processes(actor) - seen
            seen |= {process for kind in ACTORS for process in processes(kind)}
            doomed.pop().kill()

    threading.Thread(target=kill, daemon=True).start()


def test_too_many_failures_end_a_run_with_the_first_and_its_history(ray_start_4_cpus, tmp_path):
    config = load_config("digits", [*SHORT, "pipeline.max_failures=1", "training.epochs=10000"])
    killed(tmp_path, ["StageActor", "ReadoutActor"])
    with pytest.raises(
        RunFailed, match=r"stage \d is gone .* s later the readout is gone .*no more than 1 failures in 3600 s"
    ):
        train(config, runs=tmp_path)


def test_patience_with_a_part_begins_when_it_has_started(ray_start_4_cpus):
    import ray

    from ffdist.runtime.runner import Collector

    class Slow:
        def __init__(self):
            time.sleep(3)

        def work(self, seconds):
            time.sleep(seconds)
            return seconds

    slow = ray.remote(num_cpus=0)(Slow).remote()
    names = {slow._actor_id.hex(): "the slow one"}
    with pytest.raises(PartLost, match=r"the slow one did nothing for 0\.5 s \(of patience\)"):
        Collector(names, 0.5, "of patience")([slow.work.remote(0)])
    patient = Collector(names, 2.0, "of patience", [slow.__ray_ready__.remote()])
    assert patient([slow.work.remote(0)]) == [0]
    with pytest.raises(PartLost, match=r"the slow one did nothing for 2 s"):
        patient([slow.work.remote(60)])
    ray.kill(slow)


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
