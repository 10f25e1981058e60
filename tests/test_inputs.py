import io
import json
import os
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ffdist import ConfigError
from ffdist.config.sections import Data
from ffdist.data.inputs import read_inputs

GRAY, COLOR = (1, 4, 6), (3, 4, 6)
DATA = Data(name="digits")


def make_image(mode="L", size=(6, 4), color=7) -> Image.Image:
    return Image.new(mode, size, color)


def save_and_read(tmp_path, image, shape=GRAY, data=DATA):
    image.save(tmp_path / "one.png")
    return read_inputs([tmp_path / "one.png"], data, shape, 3).samples


def test_image_of_the_right_shape_is_unchanged(tmp_path):
    assert torch.equal(save_and_read(tmp_path, make_image()), torch.full((1, *GRAY), 7, dtype=torch.uint8))


def test_images_are_converted_if_unambiguous(tmp_path):
    expected = torch.full((1, *GRAY), 7, dtype=torch.uint8)
    assert torch.equal(save_and_read(tmp_path, make_image("RGB", color=(7, 7, 7))), expected)
    assert torch.equal(save_and_read(tmp_path, make_image("RGBA", color=(7, 7, 7, 255))), expected)
    assert torch.equal(save_and_read(tmp_path, make_image(size=(12, 8))), expected)
    assert torch.equal(save_and_read(tmp_path, make_image(), COLOR), expected.expand(1, *COLOR))
    config = Data(name="image_folder", path=tmp_path, image_size=[4, 6])
    assert torch.equal(save_and_read(tmp_path, make_image(size=(9, 9)), data=config), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (make_image("RGB", color=(7, 8, 7)), "trained on grayscale images, and this one is in color"),
        (make_image("LA", color=(7, 100)), "must not be transparent"),
        (make_image("I;16"), "8 bits per channel"),
        (make_image(size=(6, 6)), "4 x 6, and this one, 6 x 6, has a different aspect ratio"),
    ],
)
def test_ambiguous_images_are_rejected(image, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        save_and_read(tmp_path, image)


def test_labels_are_read_from_folders_and_parquet_files(tmp_path):
    encoded = io.BytesIO()
    make_image().save(encoded, "png")
    for number in (1, 2, 10):  # labels are the numbers in the names; some classes may be missing
        (tmp_path / "classes" / str(number) / "more").mkdir(parents=True)
        make_image().save(tmp_path / "classes" / str(number) / "more" / "x.png")
    inputs = read_inputs([tmp_path / "classes"], DATA, GRAY, 11)
    assert inputs.labels.tolist() == [1, 10, 2]
    assert inputs.locations[1] == str(tmp_path / "classes" / "10" / "more" / "x.png")
    unlabeled = read_inputs([tmp_path / "classes"], DATA, GRAY, 10)  # there is no class 10
    assert (unlabeled.labels, unlabeled.label_problem) == (
        None,
        f"{tmp_path / 'classes' / '1' / 'more' / 'x.png'} has no label",
    )
    (tmp_path / "classes" / "2").rename(tmp_path / "elsewhere")
    (tmp_path / "classes" / "2").symlink_to(tmp_path / "elsewhere")  # training follows links as well
    assert read_inputs([tmp_path / "classes"], DATA, GRAY, 11).labels.tolist() == [1, 10, 2]
    pq.write_table(pa.table({"image": [encoded.getvalue()] * 2, "label": [1, 2]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"image": [encoded.getvalue()]}), tmp_path / "one.parquet")
    inputs = read_inputs([tmp_path / "two.parquet"], DATA, GRAY, 3)
    assert (inputs.labels.tolist(), inputs.locations[1]) == ([1, 2], f"{tmp_path / 'two.parquet'}, row 1")
    combined = read_inputs([tmp_path / "two.parquet", tmp_path / "one.parquet"], DATA, GRAY, 3)
    assert (combined.labels, len(combined.samples)) == (None, 3)
    assert read_inputs([tmp_path / "two.parquet"], DATA, GRAY, 2).label_problem.endswith("row 1 has label 2")


def test_parquet_columns_are_found_among_other_columns(tmp_path):
    """The label column of the configuration may be missing."""
    encoded = io.BytesIO()
    make_image().save(encoded, "png")
    columns = {"image": [encoded.getvalue()] * 2, "id": [7, 8], "label": [0, 1]}
    features = {"info": {"features": {"label": {"names": ["cat", "ant"]}}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "named.parquet")
    assert read_inputs([tmp_path / "named.parquet"], DATA, GRAY, 2, ["ant", "cat"]).labels.tolist() == [1, 0]
    config = Data(name="parquet", path=tmp_path, label_column="fine")
    for selected, labels in ((["image"], None), (["image", "id"], None), (["image", "id", "label"], [0, 1])):
        pq.write_table(table.select(selected), tmp_path / "left.parquet")
        result = read_inputs([tmp_path / "left.parquet"], config, GRAY, 2).labels
        assert (None if result is None else result.tolist()) == labels


def test_locations_with_invalid_utf8_names_are_printable(tmp_path):
    make_image().save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / os.fsdecode(b"\xe9t\xe9.png"))
    (location,) = read_inputs([tmp_path], DATA, GRAY, 3).locations
    assert location.encode().decode().endswith(".png")


def test_reading_an_image_runs_no_other_program(tmp_path):
    """Pillow runs Ghostscript on EPS files if it is installed."""
    (tmp_path / "one.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\nshowpage\n")
    with pytest.raises(ConfigError, match="unknown format; its bytes begin with b'%!PS"):
        read_inputs([tmp_path / "one.png"], DATA, GRAY, 3)
    (tmp_path / "one.png").rename(tmp_path / "one.eps")
    with pytest.raises(ConfigError, match="there must be an image"):
        read_inputs([tmp_path], DATA, GRAY, 3)


def test_empty_folders_and_missing_or_invalid_files_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="there must be an image"):
        read_inputs([tmp_path], DATA, GRAY, 3)
    with pytest.raises(ConfigError, match="not found"):
        read_inputs([tmp_path / "x.png"], DATA, GRAY, 3)
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"bad.png: the image cannot be decoded"):
        read_inputs([tmp_path / "bad.png"], DATA, GRAY, 3)


def test_photos_are_rotated_by_their_exif_orientation(tmp_path):
    """An image with orientation 6 is stored rotated by 90 degrees counterclockwise."""
    upright = Image.new("L", (6, 4))
    upright.paste(200, (0, 0, 3, 2))
    rotated, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "one.png", exif=exif)
    assert torch.equal(read_inputs([tmp_path / "one.png"], DATA, GRAY, 3).samples, save_and_read(tmp_path, upright))


@pytest.mark.parametrize("tag", [0x128, 0x103])
def test_invalid_exif_tags_are_ignored(tag, tmp_path):
    """The tag holds text instead of a number, which Pillow can read but not write."""
    entries = [struct.pack(">HHI4s", tag, 2, 4, b"bad"), struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)]
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    make_image(size=(4, 6)).save(tmp_path / "one.jpg", exif=exif)
    assert read_inputs([tmp_path / "one.jpg"], DATA, GRAY, 3).samples.shape == (1, *GRAY)


def test_folder_names_are_matched_with_class_names(tmp_path):
    for name in ("bee", "cat"):
        (tmp_path / name).mkdir()
        make_image().save(tmp_path / name / "x.png")
    names = ["ant", "bee", "cat"]
    assert read_inputs([tmp_path], DATA, GRAY, 3, names).labels.tolist() == [1, 2]
    (tmp_path / "cat").rename(tmp_path / "aaa")
    assert read_inputs([tmp_path], DATA, GRAY, 3, names).labels is None


def test_other_files_in_a_folder_are_ignored(tmp_path):
    encoded = io.BytesIO()
    make_image().save(encoded, "png")
    for name in ("._x.png", "._x.parquet", "paper.pdf", "note.txt", "features.h5", "clip.mpg"):
        (tmp_path / name).write_text("no image")
    pq.write_table(pa.table({"file_name": ["x.png"], "label": [1]}), tmp_path / "metadata.parquet")
    make_image().save(tmp_path / "x.png")
    (tmp_path / "spark.parquet").mkdir()
    columns = {"image": [encoded.getvalue()], "id": [7], "label": [2]}
    pq.write_table(pa.table(columns), tmp_path / "spark.parquet" / "part-0.parquet")
    locations = read_inputs([tmp_path], DATA, GRAY, 3).locations
    assert [location.rpartition("/")[2] for location in locations] == ["part-0.parquet, row 0", "x.png"]
    assert read_inputs([tmp_path / "spark.parquet"], DATA, GRAY, 3).labels.tolist() == [2]


@pytest.mark.parametrize("name", ["x.png", "x.dds", "x.avif", "x.icns"])
def test_any_decoder_error_becomes_a_config_error(name, tmp_path):
    make_image("RGB").save(tmp_path / "whole.dds")
    content = bytearray((tmp_path / "whole.dds").read_bytes())
    content[80:84] = b"\0" * 4  # not a pixel format that Pillow knows
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="the image cannot be decoded"):
        read_inputs([tmp_path / name], DATA, GRAY, 3)


def test_folder_with_a_link_to_itself_is_read_once(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        make_image().save(tmp_path / name / "x.png")
        (tmp_path / name / "up").symlink_to(tmp_path)
    (tmp_path / "ant" / "other").symlink_to(tmp_path / "bee")
    inputs = read_inputs([tmp_path], DATA, GRAY, 2, ["ant", "bee"])
    assert [location.removeprefix(str(tmp_path)) for location in inputs.locations] == ["/ant/x.png", "/bee/x.png"]
    assert inputs.labels.tolist() == [0, 1]
    assert len(read_inputs([tmp_path / "ant" / "up"], DATA, GRAY, 2).samples) == 2  # the link itself was requested


def test_string_labels_are_matched_with_class_names(tmp_path):
    encoded = io.BytesIO()
    make_image().save(encoded, "png")
    table = pa.table({"image": [encoded.getvalue()] * 2, "label": ["cat", "ant"], "width": [6, 6]})
    pq.write_table(table, tmp_path / "words.parquet")
    assert read_inputs([tmp_path / "words.parquet"], DATA, GRAY, 2, ["ant", "cat"]).labels.tolist() == [1, 0]
    unknown = read_inputs([tmp_path / "words.parquet"], DATA, GRAY, 2, ["ant", "bee"])
    assert (unknown.labels, unknown.label_problem) == (None, f"{tmp_path / 'words.parquet'}, row 0 has label 'cat'")
