"""A run that must stop reports the reason and its last good checkpoint, and keeps its checkpoints intact."""

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


def run_folder(runs: Path) -> Path:
    (config_file,) = runs.glob("*/config.yaml")
    return config_file.parent


@pytest.mark.parametrize("kind", ["wrong_label", "hard_label"])
def test_non_finite_values_stop_the_run_and_are_not_saved(tmp_path, kind):
    # Each update makes the weights nine times as large.
    changes = ["training.weight_decay=1000", "pipeline.chunk_size=3"]
    config = load_config("digits", [*SHORT, *changes, f"negatives.kind={kind}"])
    message = r"(is not finite at minibatch \d+ of epoch \d+|is not finite after \d+ minibatches).*in a new run"
    with pytest.raises(RunFailed, match=message) as error_info:
        train(config, runner="serial", runs=tmp_path)
    checkpoints = checkpoints_of(config, run_folder(tmp_path))
    assert checkpoints.names(), "there was something good before"
    assert f"its last good checkpoint is {checkpoints.path(checkpoints.names()[-1])}" in str(error_info.value)
    for name in checkpoints.names():
        _, state = checkpoints.read(name)
        del state["position"]  # weight_rms is NaN in minibatches that do not measure it
        assert all(tensor.isfinite().all() for tensors in state.values() for tensor in tensors.values())


def test_run_stops_cleanly_and_can_be_resumed_if_its_checkpoint_folder_disappears(tmp_path):
    """A file replaces the folder, because permissions would not stop root."""
    config = load_config("digits", [*SHORT, "training.epochs=15"])

    def remove_folder() -> None:
        while len(folders := [path.parents[1] for path in tmp_path.glob("*/checkpoints/*/manifest.json")]) < 2:
            time.sleep(0.005)  # the first is complete, even if the second is still being written
        folders[0].rename(tmp_path / "taken")
        folders[0].write_text("")

    thread = threading.Thread(target=remove_folder)
    thread.start()
    with pytest.raises(RunFailed, match=r"cannot be .*the run stopped, and its last good checkpoint is"):
        train(config, runner="serial", runs=tmp_path)
    thread.join()
    folder = run_folder(tmp_path)
    (folder / "checkpoints").unlink()
    (tmp_path / "taken").rename(folder / "checkpoints")
    resumed = train(config, runner="serial", runs=tmp_path, resume=folder)
    reference = train(config, runner="serial", runs=tmp_path)
    assert resumed.summary["weights_sha256"] == reference.summary["weights_sha256"]


def test_checkpoints_follow_the_interval_and_do_not_change_the_result(tmp_path):
    digests = set()
    for index, interval in enumerate(("null", "7", "1")):
        changes = ["training.epochs=2", f"checkpoint.every_minibatches={interval}", "pipeline.chunk_size=4"]
        run = train(load_config("digits", [*SHORT, *changes]), runner="serial", runs=tmp_path)
        digests.add(run.summary["weights_sha256"])
        num_checkpoints = len(list(run.folder.glob("checkpoints/*/manifest.json")))
        assert num_checkpoints == [1, 8, 14][index]  # 56 minibatches in chunks of 4; the end is always saved
    assert len(digests) == 1


def test_wrong_labels_can_be_drawn_from_non_finite_logits():
    from ffdist.ff.negatives import draw_wrong_labels

    logits = torch.full((4, 3), torch.nan)
    assert draw_wrong_labels(logits, torch.zeros(4, dtype=torch.int64), torch.Generator()).shape == (4,)


def failing_negatives(data, indices, generator, calls=iter(range(2))):  # noqa: B008, shared by all calls
    """User-defined negatives that fail at the third call."""
    next(calls)
    return data.samples[indices].flip(-1)


def test_run_stops_cleanly_if_negatives_fail_during_training(tmp_path):
    changes = ["data.label=none", f"negatives.kind={__name__}:failing_negatives", "pipeline.balance=estimated"]
    with pytest.raises(RunFailed, match=r"StopIteration.*the run stopped, and its last good checkpoint is"):
        train(load_config("digits", [*SHORT, *changes]), runner="serial", runs=tmp_path)


@pytest.mark.parametrize("scheduled", [False, True])
def test_at_most_two_snapshots_are_unwritten(scheduled, tmp_path, monkeypatch):
    """Each is a full state in the object store. Without a limit, every command in the window could be a snapshot."""
    counts = {"unwritten": 0, "most": 0}

    def call(actor, method, *args, returns=1):
        if method != "write":
            return getattr(actor, method)(*args)
        counts["unwritten"] += 1
        counts["most"] = max(counts["most"], counts["unwritten"])
        return functools.partial(actor.write, *copy.deepcopy(args))

    def collect(returned, wait=True, upstream=()):
        if not callable(returned[0]):
            return returned
        if wait:
            counts["unwritten"] -= 1
        return [write() for write in returned] if wait else None

    def make_runner(blueprint, *data):
        actors = blueprint.assemble(lambda cls, *args: cls(*args), *data)
        return Runner(blueprint._replace(max_in_flight=7), actors, call=call, collect=collect)

    monkeypatch.setattr("ffdist.training.launch.serial_runner", make_runner)
    changes = ["training.epochs=6", "training.batch_size=400", "pipeline.chunk_size=1", "checkpoint.keep_last=100"]
    changes.append("checkpoint.every_minibatches=" + ("null" if scheduled else "1"))
    changes += ["training.validation_samples=50", "training.validate_every_epochs=1"] if scheduled else []
    run = train(load_config("digits", ["model.layers=[8,7]", *changes]), runner="serial", runs=tmp_path)
    assert counts["most"] <= 2
    assert not scheduled or len(list(run.folder.glob("checkpoints/*/manifest.json"))) == 6


def test_write_timeout_grows_with_the_size_of_the_checkpoint(tmp_path, monkeypatch):
    """The writer is considered stuck `pipeline.stall_timeout_s` after the time that the size allows."""
    wait_flags = []

    def call(actor, method, *args, returns=1):
        result = getattr(actor, method)(*args)
        return functools.partial(tuple, [time.monotonic() + 0.3, result]) if method == "write" else result

    def collect(returned, wait=True, upstream=()):
        if not callable(returned[0]):
            return returned
        wait_flags.append(wait)
        ready_at, result = returned[0]()
        return [result] if time.monotonic() > ready_at else None

    def make_runner(blueprint, *data):
        return Runner(blueprint, blueprint.assemble(lambda cls, *args: cls(*args), *data), call=call, collect=collect)

    monkeypatch.setattr("ffdist.training.launch.serial_runner", make_runner)
    monkeypatch.setattr("ffdist.training.checkpointing.MIN_WRITE_BYTES_PER_S", 1)
    changes = ["training.epochs=2", "checkpoint.every_minibatches=5", "pipeline.stall_timeout_s=0.1"]
    changes.append("tracking.artifacts=[]")
    run = train(load_config("digits", ["model.layers=[8,7]", *changes]), runner="serial", runs=tmp_path)
    assert run.checkpoint.name == "0002-000000"
    assert True not in wait_flags


def test_resumed_run_frees_the_state_that_it_started_from(tmp_path, monkeypatch):
    config = load_config("digits", ["model.layers=[9,8]", "training.epochs=1", "tracking.artifacts=[]"])
    first = train(config, runner="serial", runs=tmp_path)
    (first.folder / "summary.json").unlink()
    starts, start_from_checkpoint = [], ffdist.training.trainer.start_from_checkpoint
    monkeypatch.setattr(
        "ffdist.training.trainer.start_from_checkpoint",
        lambda *args, **options: starts.append(start_from_checkpoint(*args, **options)) or starts[0],
    )
    resumed = train(config, runner="serial", runs=tmp_path, resume=first.folder)
    assert resumed.summary["weights_sha256"] == first.summary["weights_sha256"]
    assert starts[0].manifest
    assert starts[0].state == {}


def test_actor_lost_at_the_start_of_a_resumed_run_restarts_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    settings = ["model.layers=[9,8]", "training.epochs=1", "training.precision=float32", "tracking.artifacts=[]"]
    config = load_config("digits", settings)
    first = train(config, runner="serial", runs=tmp_path)
    (first.folder / "summary.json").unlink()
    errors = iter([ActorLost("stage 1 is gone")])

    def fail_once(*args):
        for error in errors:
            raise error
        return serial_runner(*args)

    monkeypatch.setattr("ffdist.training.launch.serial_runner", fail_once)
    resumed = train(config, runner="serial", runs=tmp_path, resume=first.folder)
    assert f"stage 1 is gone; its last good checkpoint is {first.checkpoint.path}" in capsys.readouterr().out
    assert resumed.summary["recoveries"][-1]["step"] == first.checkpoint.manifest.step > 0
    assert resumed.summary["weights_sha256"] == first.summary["weights_sha256"]
