import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ffdist.config.sections import Data
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.data.inputs import read_inputs
from ffdist.data.order import split as split_indices
from ffdist.errors import ConfigError


def make_png(color, size=(4, 3), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels, *, as_struct=True, **extra_columns) -> None:
    column = pa.array(images, pa.binary())
    if as_struct:
        column = pa.StructArray.from_arrays([column, pa.nulls(len(images), pa.string())], ["bytes", "path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": column, "label": pa.array(labels, pa.int64()), **extra_columns}), path)


@pytest.fixture
def color_folder(tmp_path) -> Path:
    write_parquet(tmp_path / "train-0.parquet", [make_png((10, 20, 30)), make_png((1, 2, 3))], [0, 2])
    write_parquet(tmp_path / "train-1.parquet", [make_png((7, 8, 9))], [1])
    write_parquet(tmp_path / "test" / "a.parquet", [make_png((0, 0, 255))], [2])
    return tmp_path


def load(path, validation_samples="auto", **settings) -> Dataset:
    data = Data(**({"name": "parquet", "path": path} | settings))
    return load_dataset(data, seed=0, validation_samples=validation_samples)


def test_parquet_files_and_folders_are_read_channels_first(color_folder):
    dataset = load(color_folder)
    assert dataset.shape == (3, 3, 4)
    assert dataset.classes == 3
    assert dataset.samples["train"].dtype == torch.uint8
    assert dataset.samples["train"][0].view(3, 12)[:, 5].tolist() == [10, 20, 30]
    assert dataset.labels["train"].tolist() == [0, 2, 1]
    assert dataset.samples["test"][0].view(3, 12)[:, 0].tolist() == [0, 0, 255]


def test_class_names_are_read_from_hugging_face_metadata(tmp_path):
    """The metadata has the format of `datasets` 5.2.0. Classes without samples count as well."""

    def write_split(split, names):
        write_parquet(tmp_path / f"{split}.parquet", [make_png(9, mode="L"), make_png(8, mode="L")], [0, 1])
        table = pq.read_table(tmp_path / f"{split}.parquet")
        features = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / f"{split}.parquet")
        return table

    write_split("train", ["ant", "bee", "cat"])
    write_split("test", ["cat", "ant"])
    assert (load(tmp_path).classes, load(tmp_path).names) == (3, ("ant", "bee", "cat"))
    assert load(tmp_path).labels["test"].tolist() == [2, 0]
    write_split("test", ["cat", "owl"])
    with pytest.raises(ConfigError, match=r"row 1: a label must be one of the classes .* \(label: 'owl'"):
        load(tmp_path)
    table = write_split("test", ["ant", "bee", "cat"])
    assert load(tmp_path, classes=4).names == ("ant", "bee", "cat", "3")
    assert load(tmp_path, classes=2).names == ("ant", "bee")
    for names, classes in ((["ant", "bee", "ant"], None), (["ant", "2"], 3)):
        write_split("train", names)
        with pytest.raises(ConfigError, match=r"classes must have different names \(duplicate: (ant|2)\)"):
            load(tmp_path, classes=classes)
    for metadata in (b"{}", b'{"info": {"features": []}}', b"["):
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "train.parquet")
        assert (load(tmp_path).classes, load(tmp_path).names) == (2, ())


def test_raw_bytes_and_grayscale_images_are_read(tmp_path):
    for split in ("train", "test"):
        write_parquet(
            tmp_path / f"{split}.parquet", [make_png(9, mode="L"), make_png(8, mode="L")], [0, 1], as_struct=False
        )
    dataset = load(tmp_path)
    assert dataset.shape == (1, 3, 4)
    assert dataset.samples["test"][1].unique().tolist() == [8]


def test_image_size_resizes_images(color_folder):
    write_parquet(color_folder / "train-2.parquet", [make_png((5, 5, 5), size=(9, 9))], [1])
    assert load(color_folder, image_size=(2, 5)).shape == (3, 2, 5)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([b"no image"], [0], r"train-9\.parquet, row 0: the image cannot be decoded .* begin with b'no image'"),
        ([make_png(0)[:40]], [0], r"train-9\.parquet, row 0: the image cannot be decoded"),
        ([None], [0], r"row 0: an image must be encoded bytes \(path: None, bytes: null\); remove the row"),
        (
            [make_png((1, 1, 1)), make_png((1, 1, 1), size=(9, 9))],
            [0, 1],
            r"row 1: all images must .*9 x 9.*data\.image_size",
        ),
        ([make_png((1, 1, 1))], [-1], r"row 0: a label must be an integer from 0 .*label: -1.* -1 stands for no label"),
        ([make_png((1, 1, 1)), make_png((1, 1, 1))], [0, None], r"row 1: a label must be .*label: None"),
        ([make_png((1, 1, 1))], [300], "below 256.*label: 300"),
    ],
)
def test_error_of_an_invalid_sample_names_file_and_row(color_folder, images, labels, message):
    write_parquet(color_folder / "train-9.parquet", images, labels)
    with pytest.raises(ConfigError, match=message):
        load(color_folder)


def test_unknown_test_label_is_rejected_unless_classes_is_set(color_folder):
    write_parquet(color_folder / "test" / "b.parquet", [make_png((0, 0, 255))], [3])
    with pytest.raises(ConfigError, match=r"b\.parquet, row 0: .* below 3, the number of classes \(label: 3\)"):
        load(color_folder)
    assert load(color_folder, classes=5).classes == 5


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"PAR1"])
def test_error_names_the_damaged_file(color_folder, damage):
    file = color_folder / "train-1.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=r"train-1\.parquet cannot be read as Parquet"):
        load(color_folder)


def test_16_bit_images_are_rejected(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [make_png(16000, mode="I;16")] * 2, [0, 1])
    with pytest.raises(ConfigError, match=r"row 0: images must have 8 bits per channel \(mode: I(;16)?\); scale"):
        load(tmp_path)


def test_transparent_images_are_rejected(tmp_path):
    for split, alpha in (("train", 255), ("test", 0)):
        write_parquet(tmp_path / f"{split}.parquet", [make_png((1, 2, 3, alpha), mode="RGBA")] * 2, [0, 1])
    with pytest.raises(ConfigError, match=r"test\.parquet, row 0: an image must not be transparent \(mode: RGBA\)"):
        load(tmp_path)


def test_grayscale_image_with_unused_transparency_stays_grayscale(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (4, 3), 9).save(buffer, "PNG", transparency=255)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [buffer.getvalue(), make_png(9, mode="L")], [0, 1])
    assert load(tmp_path).shape == (1, 3, 4)


def test_dataset_with_a_single_class_is_rejected(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [make_png(9, mode="L")] * 2, [0, 0])
    with pytest.raises(ConfigError, match="at least two classes"):
        load(tmp_path)


def test_errors_name_missing_and_empty_splits(color_folder, tmp_path_factory):
    with pytest.raises(ConfigError, match=r"must hold train\*\.parquet"):
        load(tmp_path_factory.mktemp("empty"))
    (color_folder / "test" / "a.parquet").unlink()
    write_parquet(color_folder / "test" / "a.parquet", [], [])
    with pytest.raises(ConfigError, match="the test split is empty"):
        load(color_folder)


def write_table(folder, pandas_index=None, **columns) -> None:
    """Writes both splits with the same columns, and with a column of images."""
    table = pa.table(
        {"img": [make_png(shade, mode="L") for shade in range(len(next(iter(columns.values()))))], **columns}
    )
    if pandas_index:
        table = table.replace_schema_metadata({"pandas": json.dumps({"index_columns": [pandas_index]})})
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}.parquet")


@pytest.mark.parametrize(
    ("columns", "settings", "labels"),
    [
        ({"label": [0, 1], "fine": [3, 4]}, {}, [0, 1]),
        ({"label": [0, 1], "fine": [3, 4]}, {"label_column": "fine"}, [3, 4]),
        ({"Labels": [1, 0], "width": [3, 4]}, {}, [1, 0]),
        ({"kind": [1, 0], "__index_level_0__": [5, 6]}, {}, [1, 0]),
        ({"kind": [1, 0], "number": [5, 6], "pandas_index": "number"}, {}, [1, 0]),
        ({"kind": [1, 0], "number": [5, 6], "pandas_index": "number"}, {"label_column": "number"}, [5, 6]),
    ],
)
def test_label_column_is_configured_or_inferred_without_the_pandas_index(tmp_path, columns, settings, labels):
    write_table(tmp_path, **columns)
    assert load(tmp_path, **settings).labels["train"].tolist() == labels


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"label": [0.0, 1.0], "patient": [3, 4]}, {}, "the column label is of type double"),
        ({"label": [[0], [1]], "patient": [3, 4]}, {}, "the column label is of type list"),
        ({"one": [0, 1], "two": [3, 4]}, {}, r"data\.label_column must name .*candidates: \['one', 'two'\]"),
        ({"__index_level_0__": [3, 4]}, {}, r"candidates: \[\]"),
        ({"label": [0, 1], "labels": [0, 1]}, {}, r"candidates: \['label', 'labels'\]"),
        ({"label": [0, 1]}, {"label_column": "coarse"}, r"must be one of the columns \(given: coarse"),
        ({"label": [0, 1]}, {"image_column": "label"}, "label is of type int64"),
    ],
)
def test_invalid_or_ambiguous_column_is_rejected(tmp_path, columns, settings, message):
    write_table(tmp_path, **columns)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **settings)


def test_invalid_utf8_and_duplicate_columns_are_rejected(tmp_path):
    offsets = pa.py_buffer(b"".join(end.to_bytes(4, "little") for end in range(3)))
    write_table(tmp_path, label=pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xf6\xe4")]))
    with pytest.raises(ConfigError, match=r"train\.parquet cannot be read as Parquet: .*decode.*; write it again"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"test\.parquet cannot be read as Parquet: .*decode"):
        read_inputs([tmp_path / "test.parquet"], Data(name="digits"), (1, 3, 4), 2)
    for names, duplicate in ((["img", "label", "label"], "label"), (["img", "label", "img"], "img")):
        last_column = pa.array([0, 1]) if duplicate == "label" else pa.array([make_png(1)] * 2)
        table = pa.table([pa.array([make_png(1)] * 2), pa.array([0, 1]), last_column], names=names)
        pq.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(
            ConfigError, match=rf"train\.parquet: .* columns must have unique names \({duplicate}: 2 col"
        ):
            load(tmp_path)


@pytest.mark.parametrize("make_column", [pa.array, lambda strings: pa.array(strings).dictionary_encode()])
def test_string_labels_become_classes_in_alphabetical_order(tmp_path, make_column):
    write_table(tmp_path, label=make_column(["se", "ne", "se"]), width=[1, 2, 3])
    dataset = load(tmp_path)
    assert (dataset.names, dataset.labels["train"].tolist()) == (("ne", "se"), [1, 0, 1])
    write_parquet(tmp_path / "test.parquet", [make_png(1, mode="L")], [0])
    with pytest.raises(ConfigError, match="must have the same image and label columns"):
        load(tmp_path)


def test_boolean_labels_become_two_classes(tmp_path):
    write_table(tmp_path, label=[True, False])
    assert (load(tmp_path).names, load(tmp_path).labels["train"].tolist()) == (("False", "True"), [1, 0])


def test_unknown_and_null_string_labels_are_rejected(tmp_path):
    write_table(tmp_path, label=["ne", "se"])
    pq.write_table(pa.table({"img": [make_png(1, mode="L")], "label": ["owl"]}), tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"row 0: a label must be one of the classes .*label: 'owl', classes: ne, se"):
        load(tmp_path)
    write_table(tmp_path, label=["ne", "se", None])
    with pytest.raises(ConfigError, match=r"train\.parquet, row 2: a label must be one of the classes .*label: None"):
        load(tmp_path)


def test_files_of_a_split_must_have_the_same_columns(color_folder):
    write_parquet(color_folder / "train-2.parquet", [make_png((7, 8, 9))], [1], width=[3])
    with pytest.raises(ConfigError, match=r"must have the same columns \(only in one: \['width'\]"):
        load(color_folder)


def test_class_names_must_be_in_all_files_of_a_split_or_in_none(color_folder):
    table = pq.read_table(color_folder / "train-1.parquet")
    features = {"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), color_folder / "train-1.parquet"
    )
    with pytest.raises(ConfigError, match=r"both name the classes or neither \(only .*train-1\.parquet does"):
        load(color_folder)


def test_color_mode_does_not_depend_on_the_order_of_images(tmp_path):
    images = [make_png(9, mode="L"), make_png((1, 2, 3))]
    results = []
    for order in ([0, 1], [1, 0]):
        for split in ("train", "test"):
            write_parquet(tmp_path / f"{split}.parquet", [images[index] for index in order], order)
        dataset = load(tmp_path)
        assert (dataset.shape, "1 of 2 train images are grayscale" in dataset.describe()) == ((3, 3, 4), True)
        results.append(dataset.samples["train"][order])
    assert torch.equal(*results)
    write_parquet(tmp_path / "train.parquet", images[:1] * 2, [0, 1])
    with pytest.raises(ConfigError, match=r"test\.parquet, row 0: the training images are grayscale, and this"):
        load(tmp_path)
    buffer = io.BytesIO()
    Image.new("L", (4, 3), 9).convert("P").save(buffer, "GIF")
    # Evaluation accepts these images as well.
    write_parquet(tmp_path / "test.parquet", [buffer.getvalue(), make_png((9, 9, 9))], [0, 1])
    assert load(tmp_path).samples["test"].tolist() == [[9] * 12] * 2


def test_exact_file_name_is_preferred_and_other_files_are_reported(tmp_path):
    for name in ("train", "train_old", "test"):
        write_parquet(tmp_path / f"{name}.parquet", [make_png(1, mode="L"), make_png(2, mode="L")], [0, 1])
    dataset = load(tmp_path)
    assert len(dataset.labels["train"]) == 2
    assert "skipped: 1 entries of no split (train_old.parquet: 1)" in dataset.describe()
    (tmp_path / "train.parquet").rename(tmp_path / "train_new.parquet")
    with pytest.raises(ConfigError, match=r"one candidate .*: train_new\.parquet, train_old\.parquet"):
        load(tmp_path)
    (tmp_path / "train_new.parquet").rename(tmp_path / "Train.parquet")
    (tmp_path / "train_old.parquet").unlink()
    with pytest.raises(ConfigError, match=r"must hold train\*\.parquet .*it holds: Train\.parquet, test\.parquet"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "val-0", "validation_images"])
def test_own_validation_split_is_used(color_folder, name):
    write_parquet(color_folder / f"{name}.parquet", [make_png((4, 4, 4)), make_png((5, 5, 5))], [1, 0])
    dataset = load(color_folder)
    assert {split: labels.tolist() for split, labels in dataset.labels.items()} == {
        "train": [0, 2, 1],
        "validation": [1, 0],
        "test": [2],
    }
    assert "files: 2 train, 1 validation, 1 test" in dataset.describe()
    with pytest.raises(ConfigError, match=r"own validation split \(2 samples\).*validation_samples: 1\); leave it out"):
        load(color_folder, validation_samples=1)


def test_other_names_that_begin_with_val_are_no_validation_split(color_folder):
    """A training set must not be evaluated on a file that only looks like a validation split."""
    for name in ("values", "validated"):
        write_parquet(color_folder / f"{name}.parquet", [make_png((4, 4, 4))], [1])
    dataset = load(color_folder)
    assert len(dataset.labels["validation"]) == 0
    assert "2 entries of no split (validated.parquet: 1, values.parquet: 1)" in dataset.describe()
    for name in ("val_a", "val_b"):
        write_parquet(color_folder / f"{name}.parquet", [make_png((4, 4, 4))], [1])
    with pytest.raises(ConfigError, match=r"one candidate for the validation split .*val_a\.parquet, val_b\.parquet"):
        load(color_folder)


@pytest.fixture
def image_folders(tmp_path) -> Path:
    for split in ("train", "test"):
        for color, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(make_png((color, 0, 0)))
    return tmp_path


def test_image_folder_classes_are_numbered_by_name(image_folders):
    dataset = load(image_folders, name="image_folder")
    assert dataset.labels["train"].tolist() == [0, 1]
    assert dataset.samples["test"].view(2, 3, 12)[1, :, 0].tolist() == [1, 0, 0]


def test_own_validation_folder_is_used(image_folders):
    (image_folders / "val" / "dog").mkdir(parents=True)
    (image_folders / "val" / "dog" / "a.png").write_bytes(make_png((9, 0, 0)))
    dataset = load(image_folders, name="image_folder")
    assert (dataset.labels["validation"].tolist(), dataset.samples["validation"][0, 0].item()) == ([1], 9)
    (image_folders / "val" / "emu").mkdir()
    with pytest.raises(
        ConfigError, match=r"every class of the validation set must have a folder .*\(without one: emu\)"
    ):
        load(image_folders, name="image_folder")


def test_test_set_may_lack_training_classes_but_not_add_any(image_folders):
    (image_folders / "train_masks" / "cat").mkdir(parents=True)
    (image_folders / "test" / "dog" / "a.png").unlink()
    assert "classes without test samples: 1 of 2 (dog)" in load(image_folders, name="image_folder").describe()
    (image_folders / "test" / "dog").rmdir()
    dataset = load(image_folders, name="image_folder")
    assert (dataset.names, len(dataset.labels["test"])) == (("cat", "dog"), 1)
    assert "entries of no split (train_masks: 1)" in dataset.describe()
    (image_folders / "test" / "emu").mkdir()
    with pytest.raises(ConfigError, match=r"every class of the test set must have a folder .*\(without one: emu\)"):
        load(image_folders, name="image_folder")


def test_files_of_other_formats_are_counted_and_must_not_outnumber_images(image_folders):
    for name in ("b.HEIC", "no-extension", "._a.png", ".DS_Store"):
        (image_folders / "train" / "cat" / name).write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"cat: at least half .*images: 1, 2 files of another format \(\.heic: 1, no"):
        load(image_folders, name="image_folder")
    (image_folders / "train" / "cat" / "no-extension").unlink()
    description = load(image_folders, name="image_folder").describe()
    assert (
        "skipped: 2 hidden or system entries (.DS_Store: 1, ._*: 1), 1 files of another format (.heic: 1)"
        in description
    )


def test_camera_file_names_are_not_skipped_as_system_files(image_folders):
    """Cameras write names such as `_DSC0001` for Adobe RGB. Files of Spark such as `_SUCCESS` are skipped."""
    (image_folders / "train" / "cat" / "a.png").rename(image_folders / "train" / "cat" / "_DSC0001.PNG")
    for split in ("train", "test"):
        (image_folders / split / "cat" / "_a.png").mkdir()
        (image_folders / split / "cat" / "_SUCCESS").touch()
    dataset = load(image_folders, name="image_folder")
    assert dataset.labels["train"].tolist() == [0, 1]
    assert "skipped: 4 hidden or system entries (_SUCCESS: 2, _a.png: 2)" in dataset.describe()
    for name in ("cat", "dog"):
        (image_folders / "test" / name / "a.png").rename(image_folders / "test" / name / ".a.png")
    with pytest.raises(ConfigError, match=r"the test split is empty; .* skipped: .*\.a\.png: 2"):
        load(image_folders, name="image_folder")


def test_link_to_a_parent_folder_adds_no_images_of_other_classes(image_folders):
    """The folder of the class may itself be a link."""
    (image_folders / "train" / "cat").rename(image_folders / "kept")
    (image_folders / "train" / "cat").symlink_to("../kept")
    for name, target in (("up", image_folders / "train"), ("root", image_folders)):
        (image_folders / "kept" / name).symlink_to(target)
    assert load(image_folders, name="image_folder").labels["train"].tolist() == [0, 1]


def test_class_folder_that_is_a_broken_link_is_rejected(image_folders):
    (image_folders / "train" / "emu").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"train/emu may be .* must not be a broken link \(target: nowhere\)"):
        load(image_folders, name="image_folder")


def test_class_names_with_different_invalid_bytes_are_distinct(image_folders):
    for split in ("train", "test"):
        for old, new in (("cat", b"m\xf6we"), ("dog", b"m\xfcwe")):
            (image_folders / split / old).rename(image_folders / split / os.fsdecode(new))
    dataset = load(image_folders, name="image_folder")
    assert dataset.names == (r"m\xf6we", r"m\xfcwe")
    inputs = read_inputs([image_folders / "test"], Data(name="digits"), dataset.shape, 2, dataset.names)
    assert inputs.labels.tolist() == [0, 1]
    (image_folders / "train" / r"m\xf6we").mkdir()
    with pytest.raises(ConfigError, match=r"classes must have different names \(duplicate: m\\xf6we\)"):
        load(image_folders, name="image_folder")


def test_too_many_class_folders_are_rejected_before_images_are_read(image_folders):
    for number in range(300):
        (image_folders / "train" / f"{number}").mkdir()
    (image_folders / "train" / "cat" / "a.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"at most 256 classes \(found: 302\)"):
        load(image_folders, name="image_folder")


def test_classes_without_training_samples_are_reported(image_folders):
    (image_folders / "train" / "emu").mkdir()
    (image_folders / "test" / "emu").mkdir()
    (image_folders / "test" / "emu" / "a.png").write_bytes(make_png((1, 0, 0)))
    dataset = load(image_folders, name="image_folder")
    assert dataset.untrained == (2,)
    assert "classes without training samples: 1 of 3 (emu)" in dataset.describe()
    assert "test samples of classes without training samples, which count as wrong: 1" in dataset.describe()
    (image_folders / "train" / "dog" / "a.png").unlink()
    (image_folders / "train" / "dog" / ".a.png").touch()
    message = r"at least two classes .*with training samples: 1\); skipped: 1 hidden or system entries \(\.a\.png: 1\)"
    with pytest.raises(ConfigError, match=message):
        load(image_folders, name="image_folder")


def test_error_names_the_corrupt_file_in_an_image_folder(image_folders):
    (image_folders / "train" / "cat" / "b.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"cat/b\.png: the image cannot be decoded"):
        load(image_folders, name="image_folder")


def test_digits_have_a_fixed_test_set_and_a_seeded_validation_set():
    dataset = load_dataset(Data(name="digits"), seed=0, validation_samples=200)
    assert {split: len(images) for split, images in dataset.samples.items()} == {
        "train": 1237,
        "validation": 200,
        "test": 360,
    }
    other = load_dataset(Data(name="digits"), seed=1, validation_samples=200)
    assert torch.equal(dataset.samples["test"], other.samples["test"])
    assert not torch.equal(dataset.samples["validation"], other.samples["validation"])
    assert torch.bincount(dataset.labels["test"]).min() >= 34


def test_a_tenth_of_enough_samples_is_held_out_by_default(monkeypatch):
    dataset = load_dataset(Data(name="digits"), seed=0, validation_samples="auto")
    assert len(dataset.labels["validation"]) == 143
    assert "samples: 1,294 train, 143 validation, 360 test" in dataset.describe()
    for repeats, expected in ((249, 0), (250, 100), (30_000, 10_000)):  # of the four cases of XOR
        monkeypatch.setattr("ffdist.data.datasets.XOR_REPEATS", repeats)
        dataset = load_dataset(Data(name="xor", label="none"), seed=0, validation_samples="auto")
        assert len(dataset.labels["validation"]) == expected


def test_validation_set_must_leave_training_samples():
    with pytest.raises(ConfigError, match=r"validation_samples: 1437, training samples: 1437"):
        load_dataset(Data(name="digits"), seed=0, validation_samples=1437)


def test_error_suggests_append_if_labels_do_not_fit_into_the_pixels(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [make_png(1, size=(2, 2), mode="L")] * 2, [0, 7])
    with pytest.raises(ConfigError, match=r"8 label values.*has only 4; set data.label to append"):
        load(tmp_path)
    assert load(tmp_path, label="append").classes == 8


def test_error_of_a_failed_download_names_data_root_and_ffdist_data(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ConfigError, match=r"could not be downloaded.*set data\.root or FFDIST_DATA.*network"):
        load_dataset(Data(name="mnist", root=tmp_path), seed=0, validation_samples=0)


def test_error_of_an_unknown_home_folder_names_the_fixes(monkeypatch):
    monkeypatch.delenv("FFDIST_DATA", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    with pytest.raises(ConfigError, match=r"the home folder is unknown .*set HOME, data\.root or FFDIST_DATA"):
        load_dataset(Data(name="mnist"), seed=0, validation_samples=0)


def test_jitter_must_be_smaller_than_the_images():
    with pytest.raises(ConfigError, match=r"data\.jitter must be smaller than the images \(jitter: 8, images: 8 x 8"):
        load_dataset(Data(name="digits", jitter=8), seed=0, validation_samples=0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not measure peaks")
def test_dataset_is_held_in_memory_once(tmp_path):
    """Stacking, splitting and hashing the images used to make four copies."""
    size, count = (500, 400), 150
    for split, number in (("train", count), ("test", 2)):
        write_parquet(
            tmp_path / f"{split}.parquet", [make_png((n, 2, 3), size) for n in range(number)], [0, 1] * (number // 2)
        )

    def peak_bytes() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024

    load(tmp_path, validation_samples=10).sha256("train")  # imports use memory as well
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current usage
    before = peak_bytes()
    dataset = load(tmp_path, validation_samples=10)
    dataset.sha256("train")
    assert peak_bytes() - before < 1.5 * 3 * size[0] * size[1] * count


def test_training_and_validation_samples_are_the_rows_of_the_split():
    full, divided = (load_dataset(Data(name="digits"), seed=3, validation_samples=count) for count in (0, 700))
    training_rows, validation_rows = split_indices(3, 1437, 700)
    for name, rows in (("train", training_rows), ("validation", validation_rows)):
        assert torch.equal(divided.samples[name], full.samples["train"][rows])
        assert torch.equal(divided.labels[name], full.labels["train"][rows])


def test_mnist_is_read_from_torchvision_layout(mnist_root):
    dataset = load_dataset(Data(name="mnist", root=mnist_root), seed=0, validation_samples=10_000)
    assert {split: len(images) for split, images in dataset.samples.items()} == {
        "train": 50_000,
        "validation": 10_000,
        "test": 10_000,
    }
    assert dataset.shape == (1, 28, 28)
    assert dataset.labels["test"][:3].tolist() == [7, 2, 1]


@pytest.mark.skipif("FFDIST_CIFAR10" not in os.environ, reason="FFDIST_CIFAR10 names no folder of Parquet files")
def test_cifar10_is_read_from_custom_parquet_files():
    dataset = load(Path(os.environ["FFDIST_CIFAR10"]), validation_samples=0)
    assert dataset.shape == (3, 32, 32)
    assert len(dataset.samples["train"]) == 50_000
    mean = dataset.samples["train"].view(-1, 3, 1024).double().mean((0, 2)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-4)


def test_xor_has_four_cases():
    dataset = load_dataset(Data(name="xor", label="none"), seed=0, validation_samples=0)
    cases = dict(zip(map(tuple, dataset.samples["test"].tolist()), dataset.labels["test"].tolist(), strict=True))
    assert cases == {(0, 0): 0, (0, 255): 1, (255, 0): 1, (255, 255): 0}
    assert torch.bincount(dataset.labels["train"]).tolist() == [500, 500]
