"""Configurations run one after the other: what is there counts, what was stopped goes on, a missed target is told."""

import subprocess
import sys
import time

import pytest

SMALL = """
data: {name: digits, label: LABEL}
model: {layers: [60, 50]}
negatives: {kind: KIND}
training: {epochs: EPOCHS}
tracking: {paper_error: 0.012, target_error: TARGET}
"""


def write(folder, name, *, label="append", kind="wrong_label", epochs=12, target=0.9):
    text = SMALL.replace("LABEL", label).replace("KIND", kind).replace("EPOCHS", str(epochs))
    (folder / f"{name}.yaml").write_text(text.replace("TARGET", str(target)))


def command(*words):
    return [sys.executable, "-m", "ffdist.cli", *words]


def reproduce(folder, *words, code=0):
    said = subprocess.run(
        command("reproduce", "--runner", "serial", *words), cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert said.returncode == code, said.stderr
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in said.stdout.splitlines() if line.startswith("|")
    )
    return [dict(zip(head, row, strict=True)) for row in rows], said


def test_figures_stand_beside_paper_and_target_and_are_not_made_twice(tmp_path):
    write(tmp_path, "labelled")
    write(tmp_path, "unlabelled", label="none", kind="hybrid")
    rows, said = reproduce(tmp_path, "labelled.yaml", "unlabelled.yaml")
    assert "2 of 2: unlabelled.yaml, seed 0" in said.stdout
    labelled, unlabelled = rows
    assert (labelled["run"], labelled["paper"], labelled["target"]) == ("labelled", "1.20%", "90.00%, reached")
    assert labelled["by goodness"].endswith("%")
    assert unlabelled["by readout"].endswith("% fitted")  # by a readout of its own
    made = sorted(tmp_path.glob("runs/*/"))
    again, said = reproduce(tmp_path, "labelled.yaml", "unlabelled.yaml")
    assert again == rows
    assert said.stdout.count("finished: runs/") == 2
    assert sorted(tmp_path.glob("runs/*/")) == made
    write(tmp_path, "labelled", epochs=1, target=0.0001)  # which makes another run of it
    (row,), said = reproduce(tmp_path, "labelled.yaml", "--seeds", "2", code=1)
    assert row["target"] == "0.01%, missed"
    assert "2 seeds" in row["by goodness"]
    assert "a target was missed by labelled" in said.stderr


def test_what_was_stopped_goes_on(tmp_path):
    write(tmp_path, "long", epochs=60)
    process = subprocess.Popen(
        command("train", "long.yaml", "--runner", "serial", "checkpoint.every_minibatches=10"), cwd=tmp_path
    )
    while not list(tmp_path.glob("runs/long-*/commits/*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 130
    (row,), said = reproduce(tmp_path, "long.yaml")
    assert "going on from" in said.stdout
    assert row["epochs"] == "60"
    assert len(list(tmp_path.glob("runs/long-*"))) == 1


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["labelled.yaml", "lost.yaml"], "given: lost.yaml; shipped: "),
        (["labelled.yaml", "broken.yaml"], "needs data.path"),
    ],
)
def test_all_are_checked_before_the_first_begins(tmp_path, words, rule):
    write(tmp_path, "labelled")
    (tmp_path / "broken.yaml").write_text("data: {name: parquet}\nmodel: {layers: [9]}\n")
    said = subprocess.run(command("reproduce", *words), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert said.returncode == 2
    assert rule in said.stderr
    assert not (tmp_path / "runs").exists()
