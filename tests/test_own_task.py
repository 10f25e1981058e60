"""A task of one's own, from nothing: coloured letters of odd sizes in Parquet files, and a short configuration."""

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
from PIL import Image, ImageDraw, ImageFont

from ffdist import train

FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
CONFIG = """
data: {name: parquet, path: letters, label: append, image_size: [20, 20]}
model: {layers: [300, 300]}
negatives: {kind: hard_label}
training: {epochs: 12}
"""


def letter(draw: random.Random, label: int) -> bytes:
    """One letter, light on dark, in no two sizes and colours."""
    size = draw.randint(23, 61), draw.randint(23, 57)
    image = Image.new("RGB", size, tuple(draw.randint(40, 110) for _ in range(3)))
    font = ImageFont.truetype(str(FONT), int(0.9 * min(size)))
    ink = tuple(draw.randint(160, 255) for _ in range(3))
    middle = size[0] / 2 + draw.uniform(-2, 2), size[1] / 2 + draw.uniform(-2, 2)
    ImageDraw.Draw(image).text(middle, chr(ord("A") + label), ink, font, anchor="mm")
    data = io.BytesIO()
    image.save(data, draw.choice(["PNG", "JPEG"]))
    return data.getvalue()


def test_coloured_letters_are_learned_by_defaults(tmp_path, ffdist):
    """Bright images of one mean drown what they show, unless it is taken off: then all is guessed."""
    (tmp_path / "letters").mkdir()
    draw, labels = random.Random(0), [index % 26 for index in range(5200)]
    draw.shuffle(labels)
    images = [{"bytes": letter(draw, label), "path": f"{index}"} for index, label in enumerate(labels)]
    for split, rows in (("train", slice(0, 4680)), ("test", slice(4680, None))):
        pq.write_table(pa.table({"image": images[rows], "label": labels[rows]}), tmp_path / f"letters/{split}.parquet")
    (tmp_path / "letters.yaml").write_text(CONFIG)
    ffdist("train", "letters.yaml", "--runner", "serial")
    (folder,) = tmp_path.glob("runs/letters-*")
    said = ffdist("evaluate", str(folder), "--data", "letters/test.parquet")
    (tmp_path / "images").mkdir()
    for index in range(4680, 5200):
        (tmp_path / "images" / f"{index}.png").write_bytes(images[index]["bytes"])
    ffdist("predict", str(folder), "--input", "images", "--to", "found.parquet")
    found = pq.read_table(tmp_path / "found.parquet")["label"].to_pylist()
    wrong = sum(one != other for one, other in zip(found, labels[4680:], strict=True)) / 520
    assert f"test error {wrong:.2%} by goodness" in said
    assert wrong < 0.4  # in place of 0.97


CORNERS = ("ne", "nw", "se", "sw")
SMALL = {
    "model": {"layers": [16, 12]},
    "negatives": {"kind": "all_wrong"},
    "training": {"epochs": 1, "batch_size": 10, "precision": "float32"},
}


def corner(label: int, shade: int) -> bytes:
    """An image of 8 x 8 with one bright corner."""
    image = Image.new("L", (8, 8), shade)
    image.paste(250, (4 * (label % 2), 4 * (label // 2), 4 * (label % 2) + 4, 4 * (label // 2) + 4))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_litter_is_no_data_in_training_evaluation_and_prediction(tmp_path, ffdist):
    """One tree, in which hidden copies of images, foreign files and files of other formats are everywhere."""
    for split, count in (("train", 10), ("test", 3)):
        for label, name in enumerate(CORNERS):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "tree" / split / name / f"{number}.png").write_bytes(corner(label, number))
        places = [tmp_path / "tree" / split, *(tmp_path / "tree" / split).iterdir()]
        for place in places:
            for litter in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "_temporary/0"):
                (place / litter).mkdir(parents=True)
                (place / litter / "copy.png").write_bytes(corner(0, 99))
                (place / litter / "copy.parquet").write_bytes(b"PAR1")
            for litter in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "_SUCCESS", ".0.png"):
                (place / litter).write_bytes(b"no image")
            (place / "note.txt").write_text("no image")
    data = {"name": "image_folder", "path": "tree", "label": "append"}
    (tmp_path / "tree.yaml").write_text(json.dumps({"data": data, "tracking": {"artifacts": []}, **SMALL}))
    said = ffdist("train", "tree.yaml", "--runner", "serial", "--summary", "summary.json")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["data"]["samples"] == {"train": 40, "validation": 0, "test": 12}
    assert summary["class_names"] == list(CORNERS)
    assert (
        "data: image_folder; files: 40 train, 12 test; samples: 40 train, 0 validation, 12 test; 8 x 8 pixels" in said
    )
    assert "8 files of another format (.txt: 8)" in said
    assert summary["data"]["skipped"]["files of another format"] == {".txt": 8}
    (folder,) = tmp_path.glob("runs/tree-*")
    assert "of 12 samples" in ffdist("evaluate", folder, "--data", "tree/test")
    said = ffdist("predict", folder, "--input", "tree/test", "--to", "found.parquet")
    assert pq.read_table("found.parquet").num_rows == 12
    assert "5 files of another format (.txt: 5)" in said


@pytest.fixture(scope="module")
def few_of_many(tmp_path_factory):
    """A run on three of nine named classes, as filtering a dataset leaves them; one test sample is of a fourth."""
    folder = tmp_path_factory.mktemp("few")
    names = [f"class {number}" for number in range(9)]
    metadata = {"huggingface": json.dumps({"info": {"features": {"kind": {"names": names}}}})}
    for split, labels in (("train", [1, 4, 8] * 20), ("test", [1, 4, 8, 5])):
        images = [corner(label % 4, index) for index, label in enumerate(labels)]
        table = pa.table({"image": images, "kind": labels}).replace_schema_metadata(metadata)
        pq.write_table(table, folder / f"{split}.parquet")
    data = {"name": "parquet", "path": str(folder), "label": "append"}
    return train({"data": data, **SMALL}, runner="serial", runs=folder / "runs")


def test_only_classes_with_training_samples_are_tried(few_of_many, ffdist):
    run, images = few_of_many, few_of_many.dataset.samples["test"]
    assert run.summary["untrained_classes"] == [0, 2, 3, 5, 6, 7]
    found = run.predict(images)
    assert (found.goodness > -torch.inf).sum(2).unique().tolist() == [3]
    assert set(found.label.tolist()) <= {1, 4, 8}
    said = ffdist("evaluate", run.folder)
    assert "of 4 samples; of classes without training samples, which count as wrong: 1" in said
    assert run.evaluate(images, run.dataset.labels["test"]).goodness_error == run.summary["test_goodness_error"] >= 0.25
    assert {"goodness.png", "confusion.png"} <= {path.name for path in run.folder.iterdir()}


def test_labels_are_read_from_the_column_that_training_read_and_never_guessed(few_of_many, ffdist):
    """Or from one called `label`; numbers without names are no positions among names."""
    table = pq.read_table(few_of_many.folder.parents[1] / "test.parquet")
    named = table.append_column("patient", table["kind"])
    words = pa.table({"image": table["image"], "label": [f"class {number}" for number in (1, 4, 8, 5)]})
    for name, written, code, told in (
        ("kind", named, 0, "labels: column kind, class names (files: 1)\n"),
        ("words", words, 0, "labels: column label, class names (files: 1)\n"),
        ("patient", named.drop(["kind"]), 2, "Parquet column kind .*column of patient.parquet is ambiguous .*patient"),
        ("bare", table.replace_schema_metadata(), 2, "the column kind of bare.parquet holds numbers, but the classes"),
    ):
        pq.write_table(written, f"{name}.parquet")
        said = ffdist("evaluate", few_of_many.folder, "--data", f"{name}.parquet", code=code)
        assert told in said if code == 0 else re.search(told, said), said
    assert ffdist("predict", few_of_many.folder, "--input", "patient.parquet").count("patient.parquet, row") == 4
