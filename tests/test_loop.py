"""When a run has to stop, it says why and where, and what was saved stays as good as it was."""

import copy
import functools
import threading
import time
from pathlib import Path

import pytest
import torch

import ffdist.training.trainer
from ffdist import load_config, train
from ffdist.errors import ActorLost, RunFailed
from ffdist.pipeline.runner import Runner, serial_runner
from ffdist.runs.folder import checkpoints_of

SHORT = [
    *("model.layers=[40,30]", "training.epochs=40", "checkpoint.every_minibatches=5", "checkpoint.keep_last=100"),
    "tracking.artifacts=[]",
]


def folder_of(runs: Path) -> Path:
    (config,) = runs.glob("*/config.yaml")
    return config.parent


@pytest.mark.parametrize("kind", ["wrong_label", "hard_label"])
def test_numbers_that_are_not_finite_stop_a_run_and_nothing_later_is_saved(tmp_path, kind):
    changes = ["training.weight_decay=1000", "pipeline.chunk_size=3"]  # weights nine times as large at every update
    config = load_config("digits", [*SHORT, *changes, f"negatives.kind={kind}"])
    told = r"(is not finite at minibatch \d+ of epoch \d+|is not finite after \d+ minibatches).*in a new run"
    with pytest.raises(RunFailed, match=told) as stopped:
        train(config, runner="serial", runs=tmp_path)
    checkpoints = checkpoints_of(config, folder_of(tmp_path))
    assert checkpoints.names(), "there was something good before"
    assert f"its last good checkpoint is {checkpoints.path(checkpoints.names()[-1])}" in str(stopped.value)
    for name in checkpoints.names():
        _, state = checkpoints.read(name)
        del state["position"]  # of the weights' size, which is not measured at every minibatch
        assert all(tensor.isfinite().all() for part in state.values() for tensor in part.values())


def test_a_folder_of_checkpoints_that_goes_away_stops_a_run_in_order(tmp_path):
    """A file where the folder was: whoever trains may be root, whom permissions do not stop."""
    config = load_config("digits", SHORT)

    def take_away() -> None:
        while len(found := [path.parents[1] for path in tmp_path.glob("*/checkpoints/*/manifest.json")]) < 2:
            time.sleep(0.005)  # the second may still be in progress, so the first is complete
        found[0].rename(tmp_path / "taken")
        found[0].write_text("")

    thread = threading.Thread(target=take_away)
    thread.start()
    with pytest.raises(RunFailed, match=r"cannot be .*the run stopped, and its last good checkpoint is"):
        train(config, runner="serial", runs=tmp_path)
    thread.join()
    folder = folder_of(tmp_path)
    (folder / "checkpoints").unlink()
    (tmp_path / "taken").rename(folder / "checkpoints")
    resumed = train(config, runner="serial", runs=tmp_path, resume=folder)
    truth = train(config, runner="serial", runs=tmp_path)
    assert resumed.summary["weights_sha256"] == truth.summary["weights_sha256"]


def test_checkpoints_change_nothing_and_are_taken_as_asked(tmp_path):
    digests = set()
    for index, every in enumerate(("null", "7", "1")):
        changes = ["training.epochs=2", f"checkpoint.every_minibatches={every}", "pipeline.chunk_size=4"]
        run = train(load_config("digits", [*SHORT, *changes]), runner="serial", runs=tmp_path)
        digests.add(run.summary["weights_sha256"])
        steps = len(list(run.folder.glob("checkpoints/*/manifest.json")))
        assert steps == [1, 8, 14][index]  # of 56 minibatches in chunks of 4; the end is always kept
    assert len(digests) == 1


def test_a_loss_that_is_not_finite_is_never_drawn_from():
    from ffdist.ff.negatives import draw_wrong_labels

    logits = torch.full((4, 3), torch.nan)
    assert draw_wrong_labels(logits, torch.zeros(4, dtype=torch.int64), torch.Generator()).shape == (4,)


def wearing_out(data, samples, draw, calls=iter(range(2))):  # noqa: B008, counted over all calls
    """A kind of one's own that works at first."""
    next(calls)
    return data.samples[samples].flip(-1)


def test_negatives_that_fail_later_stop_a_run_in_order(tmp_path):
    changes = ["data.label=none", f"negatives.kind={__name__}:wearing_out", "pipeline.balance=estimated"]
    with pytest.raises(RunFailed, match=r"StopIteration.*the run stopped, and its last good checkpoint is"):
        train(load_config("digits", [*SHORT, *changes]), runner="serial", runs=tmp_path)


@pytest.mark.parametrize("scheduled", [False, True])
def test_at_most_two_snapshots_are_unwritten(scheduled, tmp_path, monkeypatch):
    """Each is a whole state in the object store; every one in the window was admitted while none was being written."""
    states = {"unwritten": 0, "most": 0}

    def call(part, method, *args, returns=1):
        if method != "write":
            return getattr(part, method)(*args)
        states["unwritten"] += 1
        states["most"] = max(states["most"], states["unwritten"])
        return functools.partial(part.write, *copy.deepcopy(args))

    def collect(returned, wait=True, upstream=()):
        if not callable(returned[0]):
            return returned
        if wait:
            states["unwritten"] -= 1
        return [write() for write in returned] if wait else None

    def slow_writer(blueprint, *data):
        parts = blueprint.assemble(lambda part, *args: part(*args), *data)
        return Runner(blueprint._replace(max_in_flight=7), parts, call=call, collect=collect)

    monkeypatch.setattr("ffdist.training.launch.serial_runner", slow_writer)
    changes = ["training.epochs=6", "training.batch_size=400", "pipeline.chunk_size=1", "checkpoint.keep_last=100"]
    changes.append("checkpoint.every_minibatches=" + ("null" if scheduled else "1"))
    changes += ["training.validation_samples=50", "training.validate_every_epochs=1"] if scheduled else []
    run = train(load_config("digits", ["model.layers=[8,7]", *changes]), runner="serial", runs=tmp_path)
    assert states["most"] <= 2
    assert not scheduled or len(list(run.folder.glob("checkpoints/*/manifest.json"))) == 6


def test_a_checkpoint_may_take_as_long_as_its_size_needs(tmp_path, monkeypatch):
    """Its writer counts as stuck after `pipeline.stall_timeout_s` beyond that."""
    waits = []

    def call(part, method, *args, returns=1):
        written = getattr(part, method)(*args)
        return functools.partial(tuple, [time.monotonic() + 0.3, written]) if method == "write" else written

    def collect(returned, wait=True, upstream=()):
        if not callable(returned[0]):
            return returned
        waits.append(wait)
        ready_at, written = returned[0]()
        return [written] if time.monotonic() > ready_at else None

    def slow_writer(blueprint, *data):
        return Runner(blueprint, blueprint.assemble(lambda part, *args: part(*args), *data), call=call, collect=collect)

    monkeypatch.setattr("ffdist.training.launch.serial_runner", slow_writer)
    monkeypatch.setattr("ffdist.training.checkpointing.MIN_WRITE_BYTES_PER_S", 1)
    changes = ["training.epochs=2", "checkpoint.every_minibatches=5", "pipeline.stall_timeout_s=0.1"]
    changes.append("tracking.artifacts=[]")
    run = train(load_config("digits", ["model.layers=[8,7]", *changes]), runner="serial", runs=tmp_path)
    assert run.checkpoint.name == "0002-000000"
    assert True not in waits


def test_the_state_that_a_run_resumed_from_is_freed(tmp_path, monkeypatch):
    config = load_config("digits", ["model.layers=[9,8]", "training.epochs=1", "tracking.artifacts=[]"])
    first = train(config, runner="serial", runs=tmp_path)
    (first.folder / "summary.json").unlink()
    starts, find = [], ffdist.training.trainer._find_start
    monkeypatch.setattr("ffdist.training.trainer._find_start", lambda *args: starts.append(find(*args)) or starts[0])
    again = train(config, runner="serial", runs=tmp_path, resume=first.folder)
    assert again.summary["weights_sha256"] == first.summary["weights_sha256"]
    assert starts[0].manifest
    assert starts[0].state == {}


def test_an_actor_lost_at_the_start_of_a_resumed_run_does_not_hide_its_checkpoint(tmp_path, monkeypatch, capsys):
    short = ["model.layers=[9,8]", "training.epochs=1", "training.precision=float32", "tracking.artifacts=[]"]
    config = load_config("digits", short)
    first = train(config, runner="serial", runs=tmp_path)
    (first.folder / "summary.json").unlink()
    starts = iter([ActorLost("stage 1 is gone")])

    def lose_once(*args):
        for lost in starts:
            raise lost
        return serial_runner(*args)

    monkeypatch.setattr("ffdist.training.launch.serial_runner", lose_once)
    again = train(config, runner="serial", runs=tmp_path, resume=first.folder)
    assert f"stage 1 is gone; its last good checkpoint is {first.checkpoint.path}" in capsys.readouterr().out
    assert again.summary["recoveries"][-1]["step"] == first.checkpoint.manifest.step > 0
    assert again.summary["weights_sha256"] == first.summary["weights_sha256"]
