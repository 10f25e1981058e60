"""Configurations run one after the other: what is there counts, what was stopped goes on, a missed target is told."""

import os
import shlex
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from ffdist.training.reproduce import _find_previous, _previous_runs

SMALL = """
data: {name: digits, label: LABEL}
model: {layers: [60, 50]}
negatives: {kind: KIND}
training: {epochs: EPOCHS}
tracking: {artifacts: []}
reference: {paper_error: 0.012, target_error: TARGET}
"""


def write(folder, name, *, label="append", kind="wrong_label", epochs=12, target=0.9):
    text = SMALL.replace("LABEL", label).replace("KIND", kind).replace("EPOCHS", str(epochs))
    (folder / f"{name}.yaml").write_text(text.replace("TARGET", str(target)))


def table_of(said):
    head, *rows = (line.split("\t") for line in said.splitlines() if "\t" in line)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_figures_stand_beside_paper_and_target_and_are_not_made_twice(tmp_path, ffdist, monkeypatch):
    reproduce = ("reproduce", "--runner", "serial", "labelled.yaml")
    write(tmp_path, "labelled")
    write(tmp_path, "unlabelled", label="none", kind="hybrid")
    said = ffdist(*reproduce, "unlabelled.yaml")
    assert "2 of 2: unlabelled.yaml, seed 0" in said
    labelled, unlabelled = rows = table_of(said)
    assert (labelled["run"], labelled["paper"], labelled["target"]) == ("labelled", "1.20%", "90.00%, reached")
    assert labelled["by goodness"].endswith("%")
    assert unlabelled["by readout"].endswith("% fitted")  # by a readout of its own
    made = sorted(tmp_path.glob("runs/*/"))
    said = ffdist(*reproduce, "unlabelled.yaml")
    assert table_of(said) == rows
    assert said.count("finished: runs/") == 2
    assert sorted(tmp_path.glob("runs/*/")) == made
    assert said.endswith(ffdist("results"))
    with monkeypatch.context() as patch:
        patch.setattr("ffdist.runs.results.is_interactive", lambda screen: True)
        table = ffdist("results")
        assert table.startswith("| run | ")
        assert ffdist(*reproduce, "unlabelled.yaml").endswith(table)
    write(tmp_path, "labelled", target=0.0001)  # the run is judged by what is asked for today
    said = ffdist(*reproduce, "labelled.yaml", "--seeds", "2", code=1)
    assert said.count("finished: runs/") == 1
    (row,) = table_of(said)
    assert row["target"] == "0.01%, missed"
    assert "2 seeds" in row["by goodness"]
    assert "a target was missed by labelled" in said
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    for run in client.search_runs(["1"]):
        client.delete_run(run.info.run_id)
    assert "MLflow has no finished run" in ffdist(*reproduce, code=1)


def test_what_starts_from_other_weights_reproduces_nothing(tmp_path, ffdist):
    write(tmp_path, "labelled", epochs=1)
    train = ("train", "labelled.yaml", "--runner", "serial")
    ffdist(*train)
    (first,) = tmp_path.glob("runs/labelled-*")
    ffdist(*train, "--init-from", str(first))
    assert [folder for _, folder in _previous_runs(tmp_path / "runs")] == [first]
    assert len(list(tmp_path.glob("runs/labelled-*"))) == 2
    assert ffdist("results").count("\nlabelled\t") == 2


def test_what_was_stopped_goes_on(tmp_path, ffdist):
    write(tmp_path, "long", epochs=60)
    runs, how = tmp_path / "my runs", ("--runner", "serial", "--runs", "my runs")
    command = [sys.executable, "-m", "ffdist.cli", "train", "long.yaml", *how, "checkpoint.every_minibatches=10"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(runs.glob("long-*/checkpoints/*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    config, folder = next(_previous_runs(runs))
    assert shlex.split(told)[-2:] == ["--resume", f"my runs/{folder.name}"]  # as a shell takes it
    with FileLock(folder / ".lock"):  # as another command that resumes it
        assert _find_previous(config, [(config, folder)], runs) is None
    (tmp_path / "kept").write_text("of the user")
    for make in (lambda path: path.symlink_to(tmp_path / "kept"), os.mkfifo):  # whoever wrote the folder chose it
        (folder / ".lock").unlink(missing_ok=True)
        make(folder / ".lock")
        assert _find_previous(config, [(config, folder)], runs) is None
        assert (tmp_path / "kept").read_text() == "of the user"
    (folder / ".lock").unlink()
    said = ffdist("reproduce", "long.yaml", *how)
    assert "resuming from" in said
    assert [row["epochs"] for row in table_of(said)] == ["60"]
    assert len(list(runs.glob("long-*"))) == 1


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["labelled.yaml", "lost.yaml"], "given: lost.yaml; shipped: "),
        (["labelled.yaml", "broken.yaml"], "needs data.path"),
        (["labelled.yaml", "large.yaml"], "training samples: 1437"),
    ],
)
def test_all_are_checked_before_the_first_begins(tmp_path, ffdist, words, rule):
    write(tmp_path, "labelled")
    (tmp_path / "broken.yaml").write_text("data: {name: parquet}\nmodel: {layers: [9]}\n")
    (tmp_path / "large.yaml").write_text("data: {name: digits}\nmodel: {layers: [9]}\ntraining: {batch_size: 9999}\n")
    assert rule in ffdist("reproduce", *words, code=2)
    assert not (tmp_path / "runs").exists()
