"""Runs without MLflow: `tracking.uri: none`."""

import json
import subprocess
import sys

import pytest

from ffdist import ConfigError, Run, load_config, train
from ffdist.runs.readout import fit_readout
from ffdist.training.checkpointing import Checkpointer

COMPLETE = Checkpointer.complete
OVERRIDES = ["training.epochs=2", "model.layers=[20,10]", "tracking.log_every_minibatches=7"]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    config = load_config("digits", [*OVERRIDES, "tracking.uri=none", "tracking.outbox_bytes=300"])
    return train(config, runner="serial", runs=tmp_path_factory.mktemp("runs"))


def test_untracked_run_never_imports_mlflow(tmp_path):
    program = (
        "import sys; from ffdist import load_config, train\n"
        f"config = load_config('digits', {[*OVERRIDES, 'tracking.uri=none']!r})\n"
        "train(config, runner='serial', runs=sys.argv[1]); assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=200, check=True)
    assert not (tmp_path / "mlflow.db").exists()


def test_untracked_run_has_the_same_result_metrics_and_plots(untracked, tmp_path):
    tracked = train(load_config("digits", OVERRIDES), runner="serial", runs=tmp_path)
    assert untracked.summary["weights_sha256"] == tracked.summary["weights_sha256"]
    assert untracked.summary["mlflow_run_id"] == ""
    assert untracked.summary["mlflow_tracking_uri"] == "none"
    assert untracked.metrics["layer_1/loss"] == tracked.metrics["layer_1/loss"]  # no point is dropped
    names = [{path.name for path in run.folder.glob("*.png")} for run in (untracked, tracked)]
    assert names[0] == names[1] != set()


def test_untracked_run_is_used_like_others(untracked, ffdist_in, tmp_path):
    assert "test error" in ffdist_in(tmp_path, "evaluate", untracked.folder)
    assert 0 <= fit_readout(untracked, runs=untracked.folder.parent) <= 1
    assert Run.find(untracked.folder).summary["test_fitted_readout_error"] is not None
    assert "not tracked by MLflow" in ffdist_in(tmp_path, "sync", untracked.folder)
    assert "nothing is pending" in ffdist_in(tmp_path, "sync", "--runs", untracked.folder.parent)


def test_untracked_run_resumes_bitwise_and_only_untracked(untracked, tmp_path):
    runs = tmp_path / "runs"
    config = load_config("digits", [*OVERRIDES, "tracking.uri=none", "checkpoint.every_minibatches=10"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "complete", stop_at_a_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            train(config, runner="serial", runs=runs)
    (folder,) = runs.iterdir()
    with pytest.raises(ConfigError, match=r"started without MLflow.*set tracking\.uri to none"):
        train(load_config("digits", OVERRIDES), runner="serial", runs=runs, resume=folder)
    resumed = train(config, runner="serial", runs=runs, resume=folder)
    assert resumed.summary["weights_sha256"] == untracked.summary["weights_sha256"]
    assert resumed.metrics["layer_1/loss"] == untracked.metrics["layer_1/loss"]


def stop_at_a_checkpoint(checkpointer, **options):
    COMPLETE(checkpointer, **options)
    if checkpointer.last:
        raise KeyboardInterrupt


def test_commands_that_need_mlflow_say_so(ffdist_in, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    for command in (["results"], ["reproduce", "xor"]):
        output = ffdist_in(tmp_path, *command, code=2)
        assert "MLflow" in output
        assert "switched off" in output


def test_closing_text_names_no_tracking(ffdist_in, tmp_path):
    overrides = ["training.epochs=1", "tracking.uri=none", "tracking.artifacts=[]"]
    output = ffdist_in(tmp_path, "train", "xor", *overrides, "--runner", "serial", "--summary", "summary.json")
    assert "test error" in output
    assert "tracked" not in output
    assert "view with" not in output
    assert json.loads((tmp_path / "summary.json").read_text())["mlflow_run_id"] == ""
