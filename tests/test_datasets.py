import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ffdist.config import ConfigError
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.sections import Data


def png(color, size=(4, 3), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels, *, as_struct=True, **more) -> None:
    column = pa.array(images, pa.binary())
    if as_struct:
        column = pa.StructArray.from_arrays([column, pa.nulls(len(images), pa.string())], ["bytes", "path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": column, "label": pa.array(labels, pa.int64()), **more}), path)


@pytest.fixture
def colours(tmp_path) -> Path:
    write_parquet(tmp_path / "train-0.parquet", [png((10, 20, 30)), png((1, 2, 3))], [0, 2])
    write_parquet(tmp_path / "train-1.parquet", [png((7, 8, 9))], [1])
    write_parquet(tmp_path / "test" / "a.parquet", [png((0, 0, 255))], [2])
    return tmp_path


def load(path, validation_samples=0, **settings) -> Dataset:
    data = Data(**({"name": "parquet", "path": path} | settings))
    return load_dataset(data, seed=0, validation_samples=validation_samples)


def test_parquet_files_and_folders_become_channel_after_channel(colours):
    dataset = load(colours)
    assert dataset.shape == (3, 3, 4)
    assert dataset.classes == 3
    assert dataset.images["train"].dtype == torch.uint8
    assert dataset.images["train"][0].view(3, 12)[:, 5].tolist() == [10, 20, 30]
    assert dataset.labels["train"].tolist() == [0, 2, 1]
    assert dataset.images["test"][0].view(3, 12)[:, 0].tolist() == [0, 0, 255]


def test_names_that_hugging_face_gives_classes_are_theirs(tmp_path):
    """As `datasets` 5.2.0 writes them; a class that no sample shows is one, too."""

    def name(split, names):
        write_parquet(tmp_path / f"{split}.parquet", [png(9, mode="L"), png(8, mode="L")], [0, 1])
        table = pq.read_table(tmp_path / f"{split}.parquet")
        kept = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kept}})})
        pq.write_table(table, tmp_path / f"{split}.parquet")
        return table

    name("train", ["ant", "bee", "cat"])
    name("test", ["cat", "ant"])
    assert (load(tmp_path).classes, load(tmp_path).names) == (3, ("ant", "bee", "cat"))
    assert load(tmp_path).labels["test"].tolist() == [2, 0]
    name("test", ["cat", "owl"])
    with pytest.raises(ConfigError, match=r"row 1: a label must be an integer .* \(label: 'owl'\)"):
        load(tmp_path)
    table = name("test", ["ant", "bee", "cat"])
    assert load(tmp_path, classes=4).names == ("ant", "bee", "cat", "3")
    assert load(tmp_path, classes=2).names == ("ant", "bee")
    for odd in (b"{}", b'{"info": {"features": []}}', b"["):
        pq.write_table(table.replace_schema_metadata({"huggingface": odd}), tmp_path / "train.parquet")
        assert (load(tmp_path).classes, load(tmp_path).names) == (2, ())


def test_raw_bytes_and_grey_images_are_read(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [png(9, mode="L"), png(8, mode="L")], [0, 1], as_struct=False)
    dataset = load(tmp_path)
    assert dataset.shape == (1, 3, 4)
    assert dataset.images["test"][1].unique().tolist() == [8]


def test_images_are_resized_where_that_was_asked_for(colours):
    write_parquet(colours / "train-2.parquet", [png((5, 5, 5), size=(9, 9))], [1])
    assert load(colours, image_size=(2, 5)).shape == (3, 2, 5)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        ([b"no image"], [0], r"train-9\.parquet, row 0: the image cannot be decoded"),
        ([png(0)[:40]], [0], r"train-9\.parquet, row 0: the image cannot be decoded"),
        ([None], [0], r"row 0: an image is its encoded bytes, and here are none"),
        ([png((1, 1, 1)), png((1, 1, 1), size=(9, 9))], [0, 1], r"row 1: every image .*9 x 9.*data\.image_size"),
        ([png((1, 1, 1))], [-1], r"row 0: a label must be an integer from 0 .*label: -1"),
        ([png((1, 1, 1)), png((1, 1, 1))], [0, None], r"row 1: a label must be .*label: None"),
        ([png((1, 1, 1))], [300], "below 256.*label: 300"),
    ],
)
def test_a_bad_sample_is_named_by_file_and_row(colours, images, labels, words):
    write_parquet(colours / "train-9.parquet", images, labels)
    with pytest.raises(ConfigError, match=words):
        load(colours)


def test_a_test_label_that_training_lacks_is_out_of_range(colours):
    write_parquet(colours / "test" / "b.parquet", [png((0, 0, 255))], [3])
    with pytest.raises(ConfigError, match=r"b\.parquet, row 0: .* below 3, the number of classes \(label: 3\)"):
        load(colours)
    assert load(colours, classes=5).classes == 5


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PAR1"])
def test_a_damaged_file_is_named(colours, damage):
    file = colours / "train-1.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=r"train-1\.parquet cannot be read as Parquet"):
        load(colours)


def test_images_of_16_bits_are_refused_rather_than_saturated(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [png(16000, mode="I;16")] * 2, [0, 1])
    with pytest.raises(ConfigError, match=r"row 0: images have 8 bits a channel \(mode: I;16\); scale"):
        load(tmp_path)


def test_what_is_transparent_is_refused_in_training_as_it_is_later(tmp_path):
    for split, alpha in (("train", 255), ("test", 0)):
        write_parquet(tmp_path / f"{split}.parquet", [png((1, 2, 3, alpha), mode="RGBA")] * 2, [0, 1])
    with pytest.raises(ConfigError, match=r"test\.parquet, row 0: an image must not be transparent \(mode: RGBA\)"):
        load(tmp_path)


def test_grey_with_a_transparent_grey_that_is_nowhere_stays_grey(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (4, 3), 9).save(buffer, "PNG", transparency=255)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [buffer.getvalue(), png(9, mode="L")], [0, 1])
    assert load(tmp_path).shape == (1, 3, 4)


def test_a_single_class_teaches_nothing(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [png(9, mode="L")] * 2, [0, 0])
    with pytest.raises(ConfigError, match="at least two classes"):
        load(tmp_path)


def test_missing_and_empty_splits_are_named(colours, tmp_path_factory):
    with pytest.raises(ConfigError, match=r"must hold train\*\.parquet"):
        load(tmp_path_factory.mktemp("empty"))
    (colours / "test" / "a.parquet").unlink()
    write_parquet(colours / "test" / "a.parquet", [], [])
    with pytest.raises(ConfigError, match="the test split is empty"):
        load(colours)


def test_columns_are_chosen_when_there_are_several(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [png(1, mode="L")] * 2, [0, 1], fine=[3, 4])
    with pytest.raises(ConfigError, match=r"data\.label_column must name it \(candidates: \['label', 'fine'\]"):
        load(tmp_path)
    assert load(tmp_path, label_column="fine").labels["train"].tolist() == [3, 4]
    with pytest.raises(ConfigError, match=r"data\.label_column=coarse is none"):
        load(tmp_path, label_column="coarse")


@pytest.fixture
def folders(tmp_path) -> Path:
    for split in ("train", "test"):
        for color, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(png((color, 0, 0)))
    return tmp_path


def test_image_folders_number_their_classes_by_name(folders):
    dataset = load(folders, name="image_folder")
    assert dataset.labels["train"].tolist() == [0, 1]
    assert dataset.images["test"].view(2, 3, 12)[1, :, 0].tolist() == [1, 0, 0]


def test_image_folders_must_agree_on_their_classes(folders):
    (folders / "test" / "dog" / "a.png").rename(folders / "a.png")
    (folders / "test" / "dog").rename(folders / "test" / "emu")
    (folders / "a.png").rename(folders / "test" / "emu" / "a.png")
    with pytest.raises(ConfigError, match=r"same class folders \(only in one: \['dog', 'emu'\]\)"):
        load(folders, name="image_folder")


def test_a_corrupt_file_in_an_image_folder_is_named(folders):
    (folders / "train" / "cat" / "b.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"cat/b\.png: the image cannot be decoded"):
        load(folders, name="image_folder")


def test_digits_come_whole_and_always_in_the_same_splits():
    dataset = load_dataset(Data(name="digits"), seed=0, validation_samples=200)
    assert {split: len(images) for split, images in dataset.images.items()} == {
        "train": 1237,
        "validation": 200,
        "test": 360,
    }
    other = load_dataset(Data(name="digits"), seed=1, validation_samples=200)
    assert torch.equal(dataset.images["test"], other.images["test"])
    assert not torch.equal(dataset.images["validation"], other.images["validation"])
    assert torch.bincount(dataset.labels["test"]).min() >= 34


def test_validation_must_leave_something_to_train_on():
    with pytest.raises(ConfigError, match=r"validation_samples: 1437, training samples: 1437"):
        load_dataset(Data(name="digits"), seed=0, validation_samples=1437)


def test_too_many_classes_to_overwrite_pixels_says_append(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [png(1, size=(2, 2), mode="L")] * 2, [0, 7])
    with pytest.raises(ConfigError, match=r"8 label values.*has only 4; set data.label to append"):
        load(tmp_path)
    assert load(tmp_path, label="append").classes == 8


def test_missing_dataset_says_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ConfigError, match=r"could not be downloaded.*set data\.root or FFDIST_DATA.*network"):
        load_dataset(Data(name="mnist", root=tmp_path), seed=0, validation_samples=0)


def test_mnist_is_found_in_torchvisions_layout(mnist_root):
    dataset = load_dataset(Data(name="mnist", root=mnist_root), seed=0, validation_samples=10_000)
    assert {split: len(images) for split, images in dataset.images.items()} == {
        "train": 50_000,
        "validation": 10_000,
        "test": 10_000,
    }
    assert dataset.shape == (1, 28, 28)
    assert dataset.labels["test"][:3].tolist() == [7, 2, 1]


@pytest.mark.skipif("FFDIST_CIFAR10" not in os.environ, reason="FFDIST_CIFAR10 names no folder of Parquet files")
def test_cifar10_reads_as_a_users_parquet_files():
    dataset = load(Path(os.environ["FFDIST_CIFAR10"]))
    assert dataset.shape == (3, 32, 32)
    assert len(dataset.images["train"]) == 50_000
    mean = dataset.images["train"].view(-1, 3, 1024).double().mean((0, 2)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-4)


def test_xor_has_its_four_cases():
    dataset = load_dataset(Data(name="xor", label="none"), seed=0, validation_samples=0)
    cases = dict(zip(map(tuple, dataset.images["test"].tolist()), dataset.labels["test"].tolist(), strict=True))
    assert cases == {(0, 0): 0, (0, 255): 1, (255, 0): 1, (255, 255): 0}
    assert torch.bincount(dataset.labels["train"]).tolist() == [500, 500]
