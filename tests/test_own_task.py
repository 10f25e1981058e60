"""Custom datasets from end to end: Parquet files and image folders, with short configurations."""

import io
import json
import random
import re
from pathlib import Path

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from letters import letters
from PIL import Image, ImageDraw, ImageFont

from ffdist import load_config, train

FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
CONFIG = """
data: {name: parquet, path: letters, label: append, image_size: [20, 20]}
model: {layers: [300, 300]}
negatives: {kind: hard_label}
training: {epochs: 12}
"""


def make_letter(rng: random.Random, label: int) -> bytes:
    """Returns an encoded image of a light letter on a dark background, of random size and color."""
    size = rng.randint(23, 61), rng.randint(23, 57)
    image = Image.new("RGB", size, tuple(rng.randint(40, 110) for _ in range(3)))
    font = ImageFont.truetype(str(FONT), int(0.9 * min(size)))
    ink = tuple(rng.randint(160, 255) for _ in range(3))
    center = size[0] / 2 + rng.uniform(-2, 2), size[1] / 2 + rng.uniform(-2, 2)
    ImageDraw.Draw(image).text(center, chr(ord("A") + label), ink, font, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, rng.choice(["PNG", "JPEG"]))
    return buffer.getvalue()


def test_colored_letters_are_learned_with_default_settings(tmp_path, ffdist):
    """Without subtraction of the mean, the predictions are guesses, because the images are bright."""
    (tmp_path / "letters").mkdir()
    rng, labels = random.Random(0), [index % 26 for index in range(5200)]
    rng.shuffle(labels)
    images = [{"bytes": make_letter(rng, label), "path": f"{index}"} for index, label in enumerate(labels)]
    for split, rows in (("train", slice(0, 4680)), ("test", slice(4680, None))):
        pq.write_table(pa.table({"image": images[rows], "label": labels[rows]}), tmp_path / f"letters/{split}.parquet")
    (tmp_path / "letters.yaml").write_text(CONFIG)
    ffdist("train", "letters.yaml", "--runner", "serial")
    (folder,) = tmp_path.glob("runs/letters-*")
    output = ffdist("evaluate", str(folder), "--data", "letters/test.parquet")
    (tmp_path / "images").mkdir()
    for index in range(4680, 5200):
        (tmp_path / "images" / f"{index}.png").write_bytes(images[index]["bytes"])
    ffdist("predict", str(folder), "images", "--output", "found.parquet")
    predictions = pq.read_table(tmp_path / "found.parquet")["label"].to_pylist()
    error = sum(predicted != label for predicted, label in zip(predictions, labels[4680:], strict=True)) / 520
    assert f"test error {error:.2%} by goodness" in output
    assert error < 0.4  # 0.97 without subtraction of the mean


CORNERS = ("ne", "nw", "se", "sw")
SMALL_CONFIG = {
    "model": {"layers": [16, 12]},
    "negatives": {"kind": "all_wrong"},
    "training": {"epochs": 1, "batch_size": 10, "precision": "float32"},
}


def make_corner(label: int, shade: int) -> bytes:
    """Returns an encoded image of 8 x 8 with one bright corner."""
    image = Image.new("L", (8, 8), shade)
    image.paste(250, (4 * (label % 2), 4 * (label // 2), 4 * (label % 2) + 4, 4 * (label // 2) + 4))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_hidden_and_foreign_files_are_ignored_in_training_evaluation_and_prediction(tmp_path, ffdist):
    """Each folder contains hidden copies of images, system files, and a file of another format."""
    for split, count in (("train", 10), ("test", 3)):
        for label, name in enumerate(CORNERS):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "tree" / split / name / f"{number}.png").write_bytes(make_corner(label, number))
        folders = [tmp_path / "tree" / split, *(tmp_path / "tree" / split).iterdir()]
        for folder in folders:
            for entry in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "_temporary/0"):
                (folder / entry).mkdir(parents=True)
                (folder / entry / "copy.png").write_bytes(make_corner(0, 99))
                (folder / entry / "copy.parquet").write_bytes(b"PAR1")
            for entry in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "_SUCCESS", ".0.png"):
                (folder / entry).write_bytes(b"no image")
            (folder / "note.txt").write_text("no image")
    data = {"name": "image_folder", "path": "tree", "label": "append"}
    (tmp_path / "tree.yaml").write_text(json.dumps({"data": data, "tracking": {"artifacts": []}, **SMALL_CONFIG}))
    output = ffdist("train", "tree.yaml", "--runner", "serial", "--summary", "summary.json")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["data"]["samples"] == {"train": 40, "validation": 0, "test": 12}
    assert summary["class_names"] == list(CORNERS)
    assert (
        "data: image_folder; files: 40 train, 12 test; samples: 40 train, 0 validation, 12 test; 8 x 8 pixels" in output
    )
    assert "8 files of another format (.txt: 8)" in output
    assert summary["data"]["skipped"]["files of another format"] == {".txt": 8}
    (run_folder,) = tmp_path.glob("runs/tree-*")
    assert "of 12 samples" in ffdist("evaluate", run_folder, "--data", "tree/test")
    output = ffdist("predict", run_folder, "tree/test", "--output", "found.parquet")
    assert pq.read_table("found.parquet").num_rows == 12
    assert "5 files of another format (.txt: 5)" in output


@pytest.fixture(scope="module")
def few_classes_run(tmp_path_factory):
    """Trains on three of nine named classes, as in a filtered dataset; one test sample is of a fourth class."""
    folder = tmp_path_factory.mktemp("few")
    names = [f"class {number}" for number in range(9)]
    metadata = {"huggingface": json.dumps({"info": {"features": {"kind": {"names": names}}}})}
    for split, labels in (("train", [1, 4, 8] * 20), ("test", [1, 4, 8, 5])):
        images = [make_corner(label % 4, index) for index, label in enumerate(labels)]
        table = pa.table({"image": images, "kind": labels}).replace_schema_metadata(metadata)
        pq.write_table(table, folder / f"{split}.parquet")
    data = {"name": "parquet", "path": str(folder), "label": "append"}
    return train({"data": data, **SMALL_CONFIG}, runner="serial", runs=folder / "runs")


def test_only_classes_with_training_samples_are_predicted(few_classes_run, ffdist):
    run, images = few_classes_run, few_classes_run.dataset.samples["test"]
    assert run.summary["untrained_classes"] == [0, 2, 3, 5, 6, 7]
    predictions = run.predict(images)
    assert (predictions.goodness > -torch.inf).sum(2).unique().tolist() == [3]
    assert set(predictions.label.tolist()) <= {1, 4, 8}
    output = ffdist("evaluate", run.folder)
    assert "of 4 samples; of classes without training samples, which count as wrong: 1" in output
    assert run.evaluate(images, run.dataset.labels["test"]).goodness_error == run.summary["test_goodness_error"] >= 0.25
    assert {"goodness.png", "confusion.png"} <= {path.name for path in run.folder.iterdir()}


def test_evaluation_reads_labels_from_the_training_column_and_never_guesses(few_classes_run, ffdist):
    """A column named `label` is used as well. Numbers are rejected if only the classes of the run have names."""
    table = pq.read_table(few_classes_run.folder.parents[1] / "test.parquet")
    patient_table = table.append_column("patient", table["kind"])
    string_table = pa.table({"image": table["image"], "label": [f"class {number}" for number in (1, 4, 8, 5)]})
    for name, content, code, message in (
        ("kind", patient_table, 0, "labels: column kind, class names (files: 1)\n"),
        ("words", string_table, 0, "labels: column label, class names (files: 1)\n"),
        (
            "patient",
            patient_table.drop(["kind"]),
            2,
            "in a column kind .*column of patient.parquet is ambiguous .*patient",
        ),
        ("bare", table.replace_schema_metadata(), 2, "the column kind of bare.parquet holds numbers, but the classes"),
    ):
        pq.write_table(content, f"{name}.parquet")
        output = ffdist("evaluate", few_classes_run.folder, "--data", f"{name}.parquet", code=code)
        assert message in output if code == 0 else re.search(message, output), output
    assert ffdist("predict", few_classes_run.folder, "patient.parquet").count("patient.parquet, row") == 4


def test_letters_are_a_task_with_26_classes():
    drawn = letters(600, 200)
    assert drawn["train"][0].shape == (600, 1, 28, 28)
    assert set(drawn["train"][1]) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert (drawn["train"][0].max((1, 2, 3)) > 100).all()
    again = letters(600, 200)
    assert (again["test"][0] == drawn["test"][0]).all()
    config = load_config(str(Path(__file__).parent / "letters.yaml"))
    assert config.data.name == "letters:letters"
