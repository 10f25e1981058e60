"""Reproduction of results: finished runs are reused, interrupted runs resumed, and missed targets reported."""

import os
import shlex
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from ffdist import Callback, load_config, train
from ffdist.training.reproduce import _find_previous, _previous_runs

CONFIG_TEMPLATE = """
data: {name: digits, label: LABEL}
model: {layers: [60, 50]}
negatives: {kind: KIND}
training: {epochs: EPOCHS}
tracking: {artifacts: []}
reference: {paper_error: 0.012, target_error: TARGET}
"""


def write_config(folder, name, *, label="append", kind="wrong_label", epochs=12, target=0.9):
    text = CONFIG_TEMPLATE.replace("LABEL", label).replace("KIND", kind).replace("EPOCHS", str(epochs))
    (folder / f"{name}.yaml").write_text(text.replace("TARGET", str(target)))


def parse_table(output):
    header, *rows = (line.split("\t") for line in output.splitlines() if "\t" in line)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_errors_are_compared_with_paper_and_target_and_finished_runs_are_reused(tmp_path, ffdist, monkeypatch):
    reproduce = ("reproduce", "--runner", "serial", "labelled.yaml")
    write_config(tmp_path, "labelled")
    write_config(tmp_path, "unlabelled", label="none", kind="hybrid")
    output = ffdist(*reproduce, "unlabelled.yaml")
    assert "2 of 2: unlabelled.yaml, seed 0" in output
    labelled, unlabelled = rows = parse_table(output)
    assert (labelled["run"], labelled["paper"], labelled["target"]) == ("labelled", "1.20%", "90.00%, reached")
    assert labelled["by goodness"].endswith("%")
    assert unlabelled["by readout"].endswith("% fitted")  # by a readout that is fitted afterwards
    run_folders = sorted(tmp_path.glob("runs/*/"))
    output = ffdist(*reproduce, "unlabelled.yaml")
    assert parse_table(output) == rows
    assert output.count("finished: runs/") == 2
    assert sorted(tmp_path.glob("runs/*/")) == run_folders
    assert output.endswith(ffdist("results"))
    with monkeypatch.context() as patch:
        patch.setattr("ffdist.runs.results.is_interactive", lambda screen: True)
        table = ffdist("results")
        assert table.startswith("| run | ")
        assert ffdist(*reproduce, "unlabelled.yaml").endswith(table)
    write_config(tmp_path, "labelled", target=0.0001)  # finished runs are compared with the new target
    output = ffdist(*reproduce, "labelled.yaml", "--seeds", "2", code=1)
    assert output.count("finished: runs/") == 1
    (row,) = parse_table(output)
    assert row["target"] == "0.01%, missed"
    assert "2 seeds" in row["by goodness"]
    assert "a target was missed by labelled" in output
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")  # finished runs stay where they are
    assert parse_table(ffdist(*reproduce, "labelled.yaml", code=1))[0]["by goodness"] == labelled["by goodness"]
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    for run in client.search_runs(["1"]):
        client.delete_run(run.info.run_id)
    assert "MLflow has no finished run" in ffdist(*reproduce, code=1)


def test_warm_started_runs_are_not_reused(tmp_path, ffdist):
    write_config(tmp_path, "labelled", epochs=1)
    train = ("train", "labelled.yaml", "--runner", "serial")
    ffdist(*train)
    (first,) = tmp_path.glob("runs/labelled-*")
    ffdist(*train, "--init-from", str(first))
    assert [folder for _, folder in _previous_runs(tmp_path / "runs")] == [first]
    assert len(list(tmp_path.glob("runs/labelled-*"))) == 2
    assert ffdist("results").count("\nlabelled\t") == 2


def test_interrupted_run_is_resumed(tmp_path, ffdist):
    write_config(tmp_path, "long", epochs=60)
    runs, options = tmp_path / "my runs", ("--runner", "serial", "--runs", "my runs")
    command = [sys.executable, "-m", "ffdist.cli", "train", "long.yaml", *options, "checkpoint.every_minibatches=10"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(runs.glob("long-*/checkpoints/*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    config, folder = next(_previous_runs(runs))
    assert shlex.split(error)[-3:] == ["ffdist", "resume", f"my runs/{folder.name}"]  # quoted for the shell
    with FileLock(folder / ".lock"):  # like another command that resumes the run
        assert _find_previous(config, [(config, folder)], runs) is None
    (tmp_path / "kept").write_text("of the user")
    # The folder may come from another person, who chose the type of this file.
    for create in (lambda path: path.symlink_to(tmp_path / "kept"), os.mkfifo):
        (folder / ".lock").unlink(missing_ok=True)
        create(folder / ".lock")
        assert _find_previous(config, [(config, folder)], runs) is None
        assert (tmp_path / "kept").read_text() == "of the user"
    (folder / ".lock").unlink()
    output = ffdist("reproduce", "long.yaml", *options)
    assert "resuming from" in output
    assert [row["epochs"] for row in parse_table(output)] == ["60"]
    assert len(list(runs.glob("long-*"))) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["labelled.yaml", "lost.yaml"], "given: lost.yaml; shipped: "),
        (["labelled.yaml", "broken.yaml"], "needs data.path"),
        (["labelled.yaml", "large.yaml"], "training samples: 1437"),
    ],
)
def test_all_configurations_are_checked_before_training(tmp_path, ffdist, names, message):
    write_config(tmp_path, "labelled")
    (tmp_path / "broken.yaml").write_text("data: {name: parquet}\nmodel: {layers: [9]}\n")
    (tmp_path / "large.yaml").write_text(
        "data: {name: digits}\nmodel: {layers: [9]}\ntraining: {batch_size: 9999, validation_samples: 0}\n"
    )
    assert message in ffdist("reproduce", *names, code=2)
    assert not (tmp_path / "runs").exists()


class EndAtOnce(Callback):
    def on_chunk(self, run, metrics):
        run.stop("enough")


def test_run_that_a_callback_ended_is_not_reused_for_a_configuration_without_it(tmp_path):
    settings = ["model.layers=[9]", "training.epochs=3", "training.validation_samples=200", "tracking.artifacts=[]"]
    config = load_config("digits", [*settings, "training.validate_every_epochs=1", "training.precision=float32"])
    stopped = train(config, runner="serial", runs=tmp_path, callbacks=[EndAtOnce()])
    assert stopped.summary["stopped"] == "enough, at epoch 1"
    assert _find_previous(config, list(_previous_runs(tmp_path)), tmp_path) is None
    complete = train(config, runner="serial", runs=tmp_path)
    assert _find_previous(config, list(_previous_runs(tmp_path)), tmp_path).folder == complete.folder
