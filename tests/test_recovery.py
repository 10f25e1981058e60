"""Limits on failures, timeouts, and errors that a restart cannot fix. test_chaos injects each kind of fault."""

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


def actor_processes(class_name: str) -> set[psutil.Process]:
    """Returns this test's processes of actors of a class. Ray puts the class into the name of the process."""
    matches = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"ray::{class_name}" in str(process.cmdline()):
                matches.add(process)
    return matches


def newest_checkpoint(runs: Path) -> str:
    return max((path.parent.name for path in runs.glob("*/checkpoints/*/manifest.json")), default="")


def kill_actors(runs: Path, class_names: list[str]) -> None:
    """Kills one actor of each class in turn, in a thread. Each time, waits for a new process and a newer checkpoint."""

    def kill() -> None:
        old_processes: set[psutil.Process] = set()
        for class_name in class_names:
            previous_checkpoint = newest_checkpoint(runs)
            while not (actor_processes(class_name) - old_processes and newest_checkpoint(runs) > previous_checkpoint):
                time.sleep(0.01)
            new_processes = actor_processes(class_name) - old_processes
            old_processes |= {process for name in ACTORS for process in actor_processes(name)}
            new_processes.pop().kill()

    threading.Thread(target=kill, daemon=True).start()


def test_too_many_failures_stop_the_run_and_are_listed_in_the_error(ray_start_4_cpus, tmp_path):
    config = load_config("digits", [*SHORT, "pipeline.max_failures=1", "training.epochs=10000"])
    kill_actors(tmp_path, ["StageActor", "ReadoutActor"])
    with pytest.raises(
        RunFailed, match=r"stage \d is gone .* s later the readout is gone .*no more than 1 failures in 3600 s"
    ):
        train(config, runs=tmp_path)


def test_stall_timeout_starts_when_the_actor_has_started(ray_start_4_cpus):
    import ray

    from ffdist.runtime.runner import Collector

    class SlowActor:
        def __init__(self):
            time.sleep(3)

        def work(self, seconds):
            time.sleep(seconds)
            return seconds

    actor = ray.remote(num_cpus=0)(SlowActor).remote()
    names = {actor._actor_id.hex(): "the slow one"}
    with pytest.raises(ActorLost, match=r"the slow one did nothing for 0\.5 s \(of stall_timeout_s\)"):
        Collector(names, 0.5, "of stall_timeout_s")([actor.work.remote(0)])
    collect = Collector(names, 2.0, "of stall_timeout_s", [actor.__ray_ready__.remote()])
    assert collect([actor.work.remote(0)]) == [0]
    with pytest.raises(ActorLost, match=r"the slow one did nothing for 2 s"):
        collect([actor.work.remote(60)])
    ray.kill(actor)


def test_failures_outside_the_window_do_not_count(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    recoveries = Recoveries(1, 10.0)
    for failed_at in (0, 11, 22):
        clock[0] = failed_at
        recoveries.add(ActorLost("one"), 0)
    clock[0] = 23
    with pytest.raises(RunFailed, match="one; 1 s later two; no more than 1"):
        recoveries.add(ActorLost("two"), 0)


OUT_OF_MEMORY = (  # the message of Ray 2.60, shortened
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 5fd1) was "
    "15.9GB used / 16.0GB limit (0.99)\nObject store memory usage: [- objects spillable: 0\n]\nSelected to kill: "
    "(Actor({id}): job ID=01000000, task name=Stage.fail, pid=1211, actual memory used=2.10GB, worker ID=5c1b)\n"
    + "To adjust the kill threshold, set the environment variable RAY_memory_usage_threshold. "
    * 20
)


def test_failures_that_a_restart_would_repeat_stop_the_run_with_their_cause(ray_start_4_cpus):
    import ray
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError

    from ffdist.runtime.runner import Collector

    class Stage:
        def __init__(self, broken=False):
            if broken:
                raise ImportError("no module named user_kinds")

        def fail(self, error_class, message):
            raise error_class(message)

    def failure_message(actor, name, call_method) -> str:
        with pytest.raises(RunFailed) as error_info:
            Collector({actor._actor_id.hex(): name}, 60.0, "of stall_timeout_s")([call_method(actor)])
        assert not isinstance(error_info.value, ActorLost)
        return str(error_info.value)

    make_actor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Stage).remote
    broken_actor, healthy_actor = make_actor(broken=True), make_actor()
    message = failure_message(broken_actor, "stage 1", lambda actor: actor.__ray_ready__.remote())
    assert message.startswith("stage 1 could not be started: ImportError: no module named user_kinds\n")
    for error_class, error_text, pattern in (
        (ObjectStoreFullError, "the store is full", "object store is full .*the store is full"),
        (OutOfDiskError, "no space", "the disk .* is full .*no space"),
        (
            OutOfMemoryError,
            OUT_OF_MEMORY.format(id=healthy_actor._actor_id.hex()),
            r"stage 2 was killed .* out of memory .*10\.0\.0\.7.* 15\.9GB used / 16\.0GB limit; stage 2 held 2\.10GB",
        ),
    ):
        message = failure_message(
            healthy_actor,
            "stage 2",
            lambda actor, error_class=error_class, error_text=error_text: actor.fail.remote(error_class, error_text),
        )
        assert re.search(pattern, message), message
        assert len(message) < 800
    ray.kill(healthy_actor)


def test_stall_error_names_the_actor_that_the_others_wait_for(ray_start_4_cpus):
    import ray

    from ffdist.runtime.runner import Collector

    class Actor:
        def work(self, seconds, *inputs):
            time.sleep(seconds)

    negative_actor, stage = (ray.remote(num_cpus=0)(Actor).remote() for _ in range(2))
    ray.get([negative_actor.work.remote(0), stage.work.remote(0)])
    shards = [negative_actor.work.remote(0), negative_actor.work.remote(60)]
    report = stage.work.remote(0, *shards)
    collect = Collector(
        {negative_actor._actor_id.hex(): "negative actor 1", stage._actor_id.hex(): "stage 1"}, 1.0, "stall_timeout_s"
    )
    with pytest.raises(ActorLost, match="negative actor 1 did nothing"):
        collect([report], True, shards)
    for actor in (negative_actor, stage):
        ray.kill(actor)
