"""Datasets of Hugging Face's library, saved in a folder. The Hub itself cannot be reached in tests."""

import io
import sys

import pytest
import torch
from PIL import Image

from ffdist import ConfigError, load_config
from ffdist.config.sections import Data
from ffdist.data.datasets import load_dataset


def load(path, **settings):
    return load_dataset(Data(name="huggingface", path=path, **settings), seed=0, validation_samples="auto")


def make_png(shade):
    buffer = io.BytesIO()
    Image.new("L", (4, 3), shade).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="needs pip install 'ffdist[huggingface]'")


def test_images_and_class_names_of_a_saved_dataset_are_read(datasets, tmp_path):
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "ant"])})
    splits = {
        split: datasets.Dataset.from_dict(
            {"img": [make_png(n) for n in range(count)], "kind": [n % 2 for n in range(count)]}, features=features
        )
        for split, count in (("test", 2), ("train", 5), ("validation", 3))
    }
    splits["train"] = splits["train"].select([4, 3, 2, 1, 0])  # rows that are selected by an index
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    dataset = load(tmp_path / "saved")
    assert (dataset.shape, dataset.names) == ((1, 3, 4), ("cat", "ant"))
    assert dataset.samples["train"][:, 0].tolist() == [4, 3, 2, 1, 0]
    assert dataset.labels["train"].tolist() == [0, 1, 0, 1, 0]
    assert [len(labels) for labels in dataset.labels.values()] == [5, 3, 2]
    assert "images in column img, labels in column kind" in dataset.describe()


def test_numbers_of_a_saved_dataset_are_a_table(datasets, tmp_path):
    rows = datasets.Dataset.from_dict({"a": [0.5, 1.5, 2.5], "b": [3, 4, 5], "species": ["x", "y", "x"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    dataset = load(tmp_path / "saved")
    assert torch.equal(dataset.samples["test"], torch.tensor([[0.5, 3], [1.5, 4], [2.5, 5]]))
    assert (dataset.names, dataset.labels["train"].tolist()) == (("x", "y"), [0, 1, 0])
    rows = datasets.Dataset.from_dict({"a": [0.5, None], "label": [0, 1]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"missing, train, row 1: the column a must hold a finite .*missing"):
        load(tmp_path / "missing")


def test_errors_of_datasets_that_cannot_be_used_name_the_fix(datasets, tmp_path, monkeypatch):
    rows = datasets.Dataset.from_dict({"a": [0.5, 1.5], "label": [0, 1]})
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"must have the splits train and test \(splits: none\); save a DatasetDict"):
        load(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"\(splits: train, validation\)"):
        load(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"cannot be loaded as a dataset .*folder that save_to_disk wrote"):
        load(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"nobody/nothing cannot be loaded as a dataset .*name of a dataset on the Hub"
    ):
        load_dataset(
            Data(name="huggingface", options={"path": "nobody/nothing"}),
            seed=0,
            validation_samples="auto",
            may_import=True,
        )


def test_error_of_a_missing_library_has_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'ffdist\[huggingface\]'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{name: huggingface}", r"needs data\.path, a folder that save_to_disk wrote; or data\.options\.path"),
        ("{name: huggingface, path: x, options: {path: a/b}}", r"takes no data\.path"),
        ("{name: huggingface, options: {path: a/b, token: hush}}", r"path, name, revision .*given: token\)"),
        ("{name: digits, options: {size: 1}}", r"data\.name: digits, given: size\); leave them out"),
        ("{name: csv}", r"data\.name=csv needs data\.path, a folder with train\*\.csv"),
        ("{name: arrays, path: x}", r"data\.name=arrays takes no data\.path"),
        ("{name: 'a.b:c', path: x}", r"takes no data\.path"),
    ],
)
def test_settings_that_do_not_fit_the_name_are_rejected(data, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", [f"data={data}"])
