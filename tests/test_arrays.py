"""Datasets that are given in Python: arrays, torch datasets, .npz files and functions."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset, Subset, TensorDataset, random_split

from ffdist import ConfigError, Run, load_config, train
from ffdist.config.sections import Data
from ffdist.data.datasets import load_dataset
from ffdist.data.order import split as split_indices
from ffdist.training.offline_negatives import fill_store, show_store
from ffdist.training.prepare import prepare

CONFIG = {
    "model": {"layers": [16, 12]},
    "training": {"epochs": 2, "batch_size": 10, "precision": "float32"},
    "tracking": {"artifacts": []},
}


def make_images(count=40, shape=(6, 5)):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def make_labels(count=40, classes=2):
    return np.arange(count) % classes


def load(data, seed=0, validation_samples="auto", **settings):
    config = Data(**{"name": "arrays"} | settings)
    return load_dataset(config, seed=seed, validation_samples=validation_samples, data=data)


class Pictures(Dataset):
    """Pillow images, as torchvision's datasets return them."""

    classes = ("day", "night")

    def __init__(self, count, mode="L", size=(5, 6), labels=None):
        self.items = [(Image.new(mode, size, number), number % 2) for number in range(count)]
        if labels:
            self.items = [(image, labels[label]) for image, label in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_a_fifth_is_held_out_as_by_train_test_split():
    images, labels = make_images(50), np.repeat([0, 1], [40, 10])
    dataset = load((images, labels), seed=3)
    train_rows, test_rows = (
        np.sort(rows) for rows in train_test_split(np.arange(50), test_size=0.2, stratify=labels, random_state=3)
    )
    assert dataset.samples["train"].tolist() == images[train_rows].reshape(40, -1).tolist()
    assert dataset.samples["test"].tolist() == images[test_rows].reshape(10, -1).tolist()
    assert torch.bincount(dataset.labels["test"]).tolist() == [8, 2]
    assert load((images, labels), seed=4).sha256("test") != dataset.sha256("test")
    assert "a fifth of the samples, stratified by class and chosen by the seed, is the test set" in dataset.describe()


def test_layouts_of_images_give_the_same_samples():
    gray, color, labels = make_images(), make_images(40, (3, 6, 5)), make_labels()
    expected = load((gray, labels))
    for same in (gray[:, None], gray[..., None], torch.from_numpy(gray), np.asfortranarray(gray)):
        assert load((same, torch.from_numpy(labels))).sha256("train") == expected.sha256("train")
    assert expected.shape == (1, 6, 5)
    assert load((color, labels)).shape == (3, 6, 5)
    assert load((color.transpose(0, 2, 3, 1), labels)).sha256("test") == load((color, labels)).sha256("test")


def test_tables_of_any_number_type_become_float32():
    values, labels = np.random.default_rng(0).normal(size=(40, 4)), make_labels()
    dataset = load((values, labels))
    assert (dataset.shape, dataset.samples["train"].dtype, dataset.encoder.label) == ((4,), torch.float32, "append")
    assert load((values.astype(np.float32), labels)).sha256("train") == dataset.sha256("train")
    assert load((torch.from_numpy(values), labels.tolist())).sha256("train") == dataset.sha256("train")
    for dtype in (np.int64, np.int8, np.uint16, bool):
        assert load(((values * 9).astype(dtype), labels)).samples["test"].dtype == torch.float32
    frame = pd.DataFrame(values, columns=["a", "b", "c", "d"])
    named = load((frame, pd.Series(labels)))
    assert (named.sha256("train"), named.facts["features"]) == (dataset.sha256("train"), ["a", "b", "c", "d"])


def test_string_and_boolean_labels_become_classes_in_alphabetical_order():
    images = make_images()
    for labels in (np.array(["sea", "air"] * 20), ["sea", "air"] * 20, pd.Series(["sea", "air"] * 20)):
        dataset = load({"train": (images, labels), "test": (images, labels)})
        assert (dataset.names, dataset.labels["train"][:3].tolist()) == (("air", "sea"), [1, 0, 1])
    assert load((images, make_labels() == 1)).names == ("False", "True")
    with pytest.raises(
        ConfigError, match=r"test labels, row 2: a label must be one of the classes .*'owl', classes: a"
    ):
        load({"train": (images, ["a", "b"] * 20), "test": (images[:3], ["a", "b", "owl"])})


def test_labels_may_be_a_column():
    """Keras and MedMNIST store labels as [N, 1]."""
    assert load((make_images(), make_labels()[:, None])).labels["test"].shape == (8,)


def test_a_dict_gives_the_splits():
    parts = {split: (make_images(count), make_labels(count)) for split, count in (("test", 6), ("train", 20))}
    dataset = load(parts, validation_samples=5)
    assert {split: len(labels) for split, labels in dataset.labels.items()} == {"train": 15, "validation": 5, "test": 6}
    own = load(parts | {"validation": (make_images(4), make_labels(4))})
    assert list(own.labels) == ["train", "validation", "test"]
    assert own.samples["validation"].tolist() == make_images(4).reshape(4, -1).tolist()


def test_a_class_whose_samples_are_all_held_out_for_validation_still_counts():
    (row,) = split_indices(0, 20, 1)[1].tolist()
    labels = make_labels(20)
    labels[row] = 2
    part = make_images(20), labels
    assert load({"train": part, "test": part}, validation_samples=1).untrained == (2,)


def test_the_data_of_the_user_is_never_modified():
    """Validation samples are moved out of the training set in place, because a copy would double its memory."""
    images, values = make_images(), np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    for inputs in (images, values):
        before = inputs.copy()
        dataset = load({"train": (inputs, make_labels()), "test": (inputs, make_labels())}, validation_samples=10)
        assert np.array_equal(inputs, before)
        assert not np.shares_memory(dataset.samples["test"].numpy(), inputs)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_images(), r"pair \(inputs, labels\) or a torch Dataset of such pairs \(given: ndarray\)"),
        ((make_images(),), "pair"),
        ({"train": (make_images(), make_labels())}, r"keys train, test and, optionally, validation \(keys: train\)"),
        ({"train": 1, "test": 2, "extra": 3}, r"\(keys: train, test, extra\)"),
        ((make_images(), make_labels(39)), r"a label for each input \(inputs: 40, labels: 39\)"),
        ((make_images(0), make_labels(0)), r"a label for each input \(inputs: 0, labels: 0\)"),
        ((make_images(shape=(30,)), make_labels()), r"uint8 of shape \[N, D\] may be images or a table .*\[40, 30\]"),
        ((make_images(shape=(3, 9, 1)), make_labels()), r"1 or 3 channels.*\[40, 3, 9, 1\].*padded"),
        ((make_images(shape=(4, 4, 4)), make_labels()), r"1 or 3 channels.*\[40, 4, 4, 4\]"),
        ((make_images() / 255, make_labels()), r"train: float64 \[40, 6, 5\]\); convert pixels from 0 to 1 by \(255"),
        ((np.zeros(40), make_labels()), r"train: float64 \[40\]"),
        ((np.array([["a"]] * 40), make_labels()), "or a table, numbers"),
        (([[1, 2], [3]], [0, 1]), "lists of equal lengths"),
        ((make_images(), make_labels() / 2), r"labels must all be integers, or all be strings \(given: float\)"),
        ((make_images(), np.array(["a", 1] * 20, object)), r"all be strings \(given: int and str\)"),
        ((make_images(), ["a", np.nan] * 20), r"all be strings \(given: float and str\)"),
        (
            {"train": ([Image.new("L", (2, 3))] * 4, [0, 1] * 2), "test": (np.zeros((4, 6)), [0, 1] * 2)},
            r"all must hold rows of tables \(test: a table\)",
        ),
        (([Image.new("L", (3, 3))] * 9, make_labels(8)), r"a label for each input \(inputs: 9, labels: 8\)"),
        (Pictures(4, labels=(torch.eye(2)[0], torch.eye(2)[1])), r"train\[0\]: a label must be one .*shape: \[2\]"),
        (Pictures(30, labels=("a", 1)), r"train\[1\]: a label must be one of the classes .*'1', classes: a"),
        (Subset(Pictures(4), [0, 9]), r"train\[1\] cannot be read \(IndexError: list index out of range\)"),
        ((make_images(), np.eye(2)[make_labels()]), r"of shape \[N\] \(given: \[40, 2\]\); convert one-hot"),
        ((make_images(), make_labels() - 1), r"train labels, row 0: a label must be an integer from 0 .*-1"),
        ((make_images(), make_labels() * 300), "train labels, row 1: .*below 256"),
        ((make_images(), [0] * 39 + [1]), r"a fifth of the samples cannot be held out .*class.*; give a dict"),
        ((make_images(), make_labels() * 0), "at least two classes"),
        ((np.full((40, 2), np.nan), make_labels()), r"row \d: the column 0 must hold a finite 32-bit number"),
        ((pd.DataFrame({"a": range(40), "b": [1e39] * 40}), make_labels()), "the column b must hold a finite 32-bit"),
        (
            {"train": (make_images(), make_labels()), "test": (make_images(shape=(6, 6)), make_labels())},
            r"samples of one shape \(train: \[1, 6, 5\], test: \[1, 6, 6\]\)",
        ),
        (
            {"train": (make_images(), make_labels()), "test": (make_images(), make_labels(classes=3))},
            "test labels, row 2: .*from 0 to below 2, the number of classes",
        ),
        (
            {
                split: (pd.DataFrame({name: range(9) for name in split[:2]}), make_labels(9))
                for split in ("train", "test")
            },
            r"same columns in the same order \(test differs from train\)",
        ),
        (TensorDataset(torch.zeros(3, 2)), r"train\[0\]: .* must be pairs of an input and a label"),
    ],
)
def test_errors_of_invalid_data_state_rule_value_and_fix(data, message):
    with pytest.raises(ConfigError, match=message):
        load(data)


def test_torch_datasets_are_read_like_arrays():
    images, labels = torch.from_numpy(make_images()), torch.from_numpy(make_labels())
    expected = load((images, labels))
    assert load(TensorDataset(images, labels)).sha256("train") == expected.sha256("train")
    halves = random_split(TensorDataset(images, labels), [30, 10])
    dataset = load({"train": halves[0], "test": halves[1]})
    assert [len(each) for each in dataset.labels.values()] == [30, 0, 10]


def test_datasets_of_pillow_images_are_read_like_image_files():
    dataset = load(Pictures(20))
    assert (dataset.shape, dataset.names) == ((1, 6, 5), ("day", "night"))
    assert sorted(dataset.samples["train"][:, 0].tolist() + dataset.samples["test"][:, 0].tolist()) == list(range(20))
    assert len(dataset.labels["test"]) == 4
    named = load({"train": Pictures(4, "RGB", labels=("b", "a")), "test": Pictures(3, "RGB", labels=("b", "a"))})
    assert (named.shape, named.names, named.labels["test"].tolist()) == ((3, 6, 5), ("a", "b"), [1, 0, 1])
    with pytest.raises(ConfigError, match=r"test\[0\]: all images must have the same size .*9 x 9"):
        load({"train": Pictures(4), "test": Pictures(4, size=(9, 9))})
    with pytest.raises(ConfigError, match=r"train\[0\]: images must have 8 bits per channel \(mode: F\)"):
        load(Pictures(20, "F"))


def test_lists_of_pillow_images_are_decoded_like_files():
    """A palette becomes colors, and the orientation of a photograph is applied."""
    upright = Image.fromarray(make_images(1, (6, 5))[0])
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # turn it by 270 degrees
    turned.info["exif"] = exif.tobytes()
    dataset = load({"train": ([upright, turned], ["b", "a"]), "test": ([upright], ["a"])})
    assert (dataset.shape, dataset.names, dataset.labels["train"].tolist()) == ((1, 6, 5), ("a", "b"), [1, 0])
    assert torch.equal(*dataset.samples["train"])
    palette = Image.new("P", (5, 6), 1)
    palette.putpalette([0, 0, 0, 200, 100, 0])
    colors = load({"train": ([palette] * 2, [0, 1]), "test": ([palette], [0])}).samples["train"]
    assert colors[0].view(3, 30)[:, 0].tolist() == [200, 100, 0]
    mixed = load({"train": ([palette] * 2, [0, 1]), "test": (make_images(3, (6, 5, 3)), [0, 1, 0])})
    assert torch.equal(mixed.samples["train"], colors)
    assert mixed.samples["test"].tolist() == make_images(3, (6, 5, 3)).transpose(0, 3, 1, 2).reshape(3, -1).tolist()


def test_arrays_of_images_are_resized_to_the_configured_size(tmp_path):
    for shape in ((6, 4), (6, 4, 3)):
        images = make_images(40, shape)
        dataset = load((images, make_labels()), image_size=(3, 2))
        assert dataset.shape == (3 if len(shape) == 3 else 1, 3, 2)
        pictures = load(([Image.fromarray(image) for image in images], make_labels()), image_size=(3, 2))
        assert pictures.sha256("train") == dataset.sha256("train")
    assert load((images, make_labels()), image_size=(6, 4)).sha256("test") == load((images, make_labels())).sha256(
        "test"
    )
    part = {"x": images, "y": make_labels()}
    np.savez(tmp_path / "a.npz", **{f"{key}_{split}": part[key] for key in part for split in ("train", "test")})
    config = Data(name="npz", path=tmp_path / "a.npz", image_size=(3, 2))
    assert load_dataset(config, seed=0, validation_samples=0).shape == (3, 3, 2)


@pytest.mark.parametrize("key", ["image_column", "label_column"])
def test_columns_are_settings_of_tables_in_files_only(key):
    for name in ("arrays", "test_arrays:some_images"):
        with pytest.raises(ValidationError, match=rf"data\.{key} is for tables in files \(parquet, csv, huggingface\)"):
            Data(**{"name": name, key: "a"})


def test_settings_of_the_data_are_checked_when_samples_are_given_in_python(tmp_path):
    data = some_images(40, 0)
    for section, message in (
        ({"name": "digits", "jiter": 1}, r"unknown key data\.jiter; did you mean data\.jitter"),
        ({"jiter": 1}, r"unknown key data\.jiter"),
        ({"path": str(tmp_path)}, r"data\.name=arrays takes no data\.path"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(CONFIG | {"data": section}, data=data, runner="serial", runs=tmp_path)
    config = {"name": "parquet", "path": str(tmp_path), "label_column": "kind", "classes": 5, "image_size": [3, 3]}
    run = train(CONFIG | {"data": config}, data=data, runner="serial", runs=tmp_path)
    assert (run.config.data.path, run.config.data.label_column, run.summary["classes"]) == (None, None, 5)
    assert run.network.architecture.encoder.shape == (1, 3, 3)


def test_torchvision_datasets_are_read(mnist_root):
    from torchvision.datasets import MNIST

    parts = {split: MNIST(str(mnist_root), train=split == "train") for split in ("train", "test")}
    dataset = load({"train": torch.utils.data.Subset(parts["train"], range(500)), "test": parts["test"]})
    expected = load_dataset(Data(name="mnist", root=mnist_root), seed=0, validation_samples=0)
    assert torch.equal(dataset.samples["test"], expected.samples["test"])
    assert torch.equal(dataset.samples["train"], expected.samples["train"][:500])
    assert torch.equal(dataset.labels["train"], expected.labels["train"][:500])


@pytest.mark.parametrize("keys", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
def test_npz_files_of_keras_and_medmnist_are_read(keys, tmp_path):
    parts = {"train": (make_images(20), make_labels(20)[:, None]), "test": (make_images(6), make_labels(6)[:, None])}
    arrays = {key.format(split): array for split, part in parts.items() for key, array in zip(keys, part, strict=True)}
    np.savez(tmp_path / "small.npz", **arrays)
    config = Data(name="npz", path=tmp_path / "small.npz")
    dataset = load_dataset(config, seed=0, validation_samples="auto")
    assert [dataset.sha256(split) for split in ("train", "test")] == [load(parts).sha256(split) for split in parts]
    val = {key.format("val"): array for key, array in zip(keys, parts["test"], strict=True)}
    np.savez(tmp_path / "small.npz", **arrays, **val)
    assert len(load_dataset(config, seed=0, validation_samples="auto").labels["validation"]) == 6


def test_invalid_npz_files_are_rejected_and_never_unpickled(tmp_path):
    path = tmp_path / "bad.npz"
    config = Data(name="npz", path=path)

    class Bomb:
        def __reduce__(self):
            return (path.with_suffix(".ran").touch, ())

    for content in (b"", b"PK\x03\x04", pickle.dumps(Bomb())):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.npz cannot be read as an \.npz file"):
            load_dataset(config, seed=0, validation_samples="auto")
    arrays = {"x_train": make_images(), "y_train": np.array([Bomb()] * 40), "x_test": make_images()}
    np.savez(path, **arrays, y_test=make_labels())
    with pytest.raises(ConfigError, match=r"bad\.npz cannot be read.*without Python objects"):
        load_dataset(config, seed=0, validation_samples="auto")
    assert not path.with_suffix(".ran").exists()
    np.savez(path, images=make_images(), labels=make_labels())
    with pytest.raises(ConfigError, match=r"must have the arrays x_train.*\(arrays: images, labels\)"):
        load_dataset(config, seed=0, validation_samples="auto")
    with pytest.raises(ConfigError, match=r"data\.path must be an \.npz file"):
        load_dataset(Data(name="npz", path=tmp_path), seed=0, validation_samples="auto")


def some_images(count, seed):
    return make_images(count) + np.uint8(seed), make_labels(count)


def test_a_function_gets_its_options_and_the_seed():
    config = load_config(
        "digits",
        ["data={name: 'test_arrays:some_images', options: {count: 100}}", "seed=3", "training.batch_size=10"],
    )
    dataset = prepare(config).dataset
    expected = load(some_images(100, 3), seed=3)
    assert [dataset.sha256(split) for split in ("train", "test")] == [expected.sha256(s) for s in ("train", "test")]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere:load", {}, r"data\.name=nowhere:load cannot be imported as a function .*nowhere"),
        ("test_arrays:nothing", {}, "cannot be imported"),
        ("test_arrays:some_images", {}, r"do not fit .*\(count, seed\) \(missing a required argument: 'count'\)"),
        ("test_arrays:some_images", {"count": 9, "size": 1}, "unexpected keyword argument 'size'"),
        ("test_arrays:some_images", {"count": -1}, r"raised ValueError: "),
        ("test_arrays:make_labels", {}, "must be a pair"),
    ],
)
def test_errors_of_a_function_name_it(name, options, message):
    config = Data(name=name, options=options)
    with pytest.raises(ConfigError, match=message):
        load_dataset(config, seed=0, validation_samples="auto", may_import=True)


def test_the_folder_of_a_run_causes_no_imports(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    run = train(CONFIG, data=some_images(40, 0), runner="serial", runs=tmp_path)
    tree = yaml.safe_load((run.folder / "config.yaml").read_text())
    for data in (
        {"name": "evil:load"},
        {"name": "huggingface", "options": {"path": "some/name"}},
        {"name": "covertype", "root": str(tmp_path)},
    ):
        (run.folder / "config.yaml").write_text(yaml.safe_dump(tree | {"data": data}))
        with pytest.raises(
            ConfigError, match="must not cause imports, downloads from the Hub or the loading of pickles"
        ):
            Run.find(run.folder).dataset  # noqa: B018


def test_a_store_of_negatives_causes_no_imports(tmp_path, monkeypatch, capsys):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    fill_store(load_config("digits", ["training.epochs=1", "model.layers=[9]", "negatives.store=store"]))
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    manifest["config"]["data"] = {"name": "evil:load"}
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    show_store("store", tmp_path / "negatives.png")  # the shards are checked without the samples
    errors = capsys.readouterr().err
    assert "the training samples are not compared (data.name: evil:load)" in errors
    assert "all checksums match" in errors
    assert not (tmp_path / "negatives.png").exists()


def test_a_configuration_needs_no_data_section_and_keeps_how_labels_are_shown(tmp_path):
    data = some_images(40, 0)
    run = train(CONFIG, data=data, runner="serial", runs=tmp_path)
    assert (run.config.data.name, run.network.architecture.encoder.label) == ("arrays", "overwrite")
    assert run.evaluate(data[0], data[1]).readout_error is not None
    assert json.loads((run.folder / "summary.json").read_text())["data"]["samples"]["test"] == 8
    (tmp_path / "short.yaml").write_text(
        "model: {layers: [9]}\ntraining: {epochs: 1, batch_size: 4}\ntracking: {artifacts: []}"
    )
    for config in (
        str(tmp_path / "short.yaml"),
        CONFIG | {"data": {"name": "mnist", "label": "append", "label_scale": 3}},
        load_config("digits", ["training.epochs=1", "tracking.artifacts=[]", "training.batch_size=8"]),
    ):
        other = train(config, data=data, runner="serial", runs=tmp_path)
        assert other.config.data.name == "arrays"
        assert other.network.architecture.encoder.label == ("overwrite" if isinstance(config, str) else "append")
    assert other.folder.name.startswith("run-")


def test_the_dataset_of_a_run_with_arrays_has_to_be_given_again(tmp_path):
    data = some_images(40, 0)
    run = train(CONFIG, data=data, runner="serial", runs=tmp_path)
    assert len(run.dataset.labels["test"]) == 8
    with pytest.raises(ConfigError, match=r"resume\(RUN, data=\.\.\.\).*run\.evaluate\(samples, labels\)"):
        Run.find(run.folder).dataset  # noqa: B018
    with pytest.raises(ConfigError, match="stands for samples that are given in Python"):
        train(run.config, runner="serial", runs=tmp_path)


def test_a_run_with_arrays_is_resumed_with_the_same_data_only(tmp_path):
    (data, other), config = (
        (some_images(40, seed) for seed in (0, 1)),
        CONFIG | {"checkpoint": {"every_minibatches": 1}},
    )
    expected = train(config, data=data, runner="serial", runs=tmp_path / "whole").summary["weights_sha256"]
    run = train(config, data=data, runner="serial", runs=tmp_path / "half")
    (run.folder / "summary.json").unlink()  # as if it had been stopped
    for newest in sorted((run.folder / "checkpoints").iterdir())[1:]:
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
    with pytest.raises(ConfigError, match=r"was trained on other samples than arrays contains now .*original data"):
        train(config, data=other, runner="serial", resume=run.folder)
    resumed = train(run.folder / "config.yaml", data=data, runner="serial", runs=tmp_path / "half", resume=run.folder)
    assert resumed.summary["weights_sha256"] == expected


@pytest.mark.slow  # tables and images have such tests, too
def test_serial_and_pipelined_runs_on_arrays_are_equal(ray_start_4_cpus, tmp_path):
    data = some_images(60, 0)
    digests = {
        train(CONFIG, data=data, runner=runner, address=None, runs=tmp_path).summary["weights_sha256"]
        for runner in ("serial", "ray")
    }
    assert len(digests) == 1
