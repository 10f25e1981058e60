"""How many losses a run takes; that it takes each kind of them is shown by its faults in test_chaos."""

import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ffdist import load_config, train
from ffdist.errors import ActorLost, RunFailed
from ffdist.training.recoveries import Recoveries

SHORT = [
    *("model.layers=[60,50,40]", "training.epochs=150", "tracking.log_every_minibatches=20", "pipeline.stages=2"),
    *("negatives.kind=hard_label", "negatives.prediction_delay=30", "checkpoint.every_minibatches=40"),
    *("training.validation_samples=200", "training.validate_every_epochs=20", "tracking.artifacts=[]"),
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
    return max((path.parent.name for path in runs.glob("*/checkpoints/*/manifest.json")), default="")


def killed(runs: Path, actors: list[str]) -> None:
    """Kills an actor of each class at some checkpoint after the one before, once there are new processes."""

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
    with pytest.raises(ActorLost, match=r"the slow one did nothing for 0\.5 s \(of patience\)"):
        Collector(names, 0.5, "of patience")([slow.work.remote(0)])
    patient = Collector(names, 2.0, "of patience", [slow.__ray_ready__.remote()])
    assert patient([slow.work.remote(0)]) == [0]
    with pytest.raises(ActorLost, match=r"the slow one did nothing for 2 s"):
        patient([slow.work.remote(60)])
    ray.kill(slow)


def test_old_failures_are_forgotten(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    recoveries = Recoveries(1, 10.0)
    for moment in (0, 11, 22):
        now[0] = moment
        recoveries.add(ActorLost("one"), 0)
    now[0] = 23
    with pytest.raises(RunFailed, match="one; 1 s later two; no more than 1"):
        recoveries.add(ActorLost("two"), 0)


OUT_OF_MEMORY = (  # as Ray 2.60 writes it, shortened
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 5fd1) was "
    "15.9GB used / 16.0GB limit (0.99)\nObject store memory usage: [- objects spillable: 0\n]\nSelected to kill: "
    "(Actor({id}): job ID=01000000, task name=Stage.fail, pid=1211, actual memory used=2.10GB, worker ID=5c1b)\n"
    + "To adjust the kill threshold, set the environment variable RAY_memory_usage_threshold. "
    * 20
)


def test_what_another_start_would_meet_again_ends_a_run_with_its_cause(ray_start_4_cpus):
    import ray
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError

    from ffdist.runtime.runner import Collector

    class Stage:
        def __init__(self, broken=False):
            if broken:
                raise ImportError("no module named user_kinds")

        def fail(self, kind, text):
            raise kind(text)

    def failure_of(actor, name, call) -> str:
        with pytest.raises(RunFailed) as failed:
            Collector({actor._actor_id.hex(): name}, 60.0, "of patience")([call(actor)])
        assert not isinstance(failed.value, ActorLost)
        return str(failed.value)

    make = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Stage).remote
    broken, whole = make(broken=True), make()
    text = failure_of(broken, "stage 1", lambda actor: actor.__ray_ready__.remote())
    assert text.startswith("stage 1 could not be started: ImportError: no module named user_kinds\n")
    for kind, said, cause in (
        (ObjectStoreFullError, "the store is full", "object store is full .*the store is full"),
        (OutOfDiskError, "no space", "the disk .* is full .*no space"),
        (
            OutOfMemoryError,
            OUT_OF_MEMORY.format(id=whole._actor_id.hex()),
            r"stage 2 was killed .* out of memory .*10\.0\.0\.7.* 15\.9GB used / 16\.0GB limit; stage 2 held 2\.10GB",
        ),
    ):
        text = failure_of(whole, "stage 2", lambda actor, kind=kind, said=said: actor.fail.remote(kind, said))
        assert re.search(cause, text), text
        assert len(text) < 800
    ray.kill(whole)


def test_a_stall_is_blamed_on_the_actor_that_the_others_wait_for(ray_start_4_cpus):
    import ray

    from ffdist.runtime.runner import Collector

    class Actor:
        def work(self, seconds, *message):
            time.sleep(seconds)

    maker, stage = (ray.remote(num_cpus=0)(Actor).remote() for _ in range(2))
    ray.get([maker.work.remote(0), stage.work.remote(0)])
    shards = [maker.work.remote(0), maker.work.remote(60)]
    report = stage.work.remote(0, *shards)
    collect = Collector({maker._actor_id.hex(): "negative actor 1", stage._actor_id.hex(): "stage 1"}, 1.0, "patience")
    with pytest.raises(ActorLost, match="negative actor 1 did nothing"):
        collect([report], True, shards)
    for actor in (maker, stage):
        ray.kill(actor)
