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

GREY, COLOUR = (1, 4, 6), (3, 4, 6)
DATA = Data(name="digits")


def an_image(mode="L", size=(6, 4), color=7) -> Image.Image:
    return Image.new(mode, size, color)


def read(tmp_path, image, shape=GREY, data=DATA):
    image.save(tmp_path / "one.png")
    return read_inputs([tmp_path / "one.png"], data, shape, 3).images


def test_an_image_of_the_right_shape_is_taken_as_it_is(tmp_path):
    assert torch.equal(read(tmp_path, an_image()), torch.full((1, *GREY), 7, dtype=torch.uint8))


def test_what_is_unambiguous_is_converted(tmp_path):
    seven = torch.full((1, *GREY), 7, dtype=torch.uint8)
    assert torch.equal(read(tmp_path, an_image("RGB", color=(7, 7, 7))), seven)
    assert torch.equal(read(tmp_path, an_image("RGBA", color=(7, 7, 7, 255))), seven)
    assert torch.equal(read(tmp_path, an_image(size=(12, 8))), seven)
    assert torch.equal(read(tmp_path, an_image(), COLOUR), seven.expand(1, *COLOUR))
    resized = Data(name="image_folder", path=tmp_path, image_size=[4, 6])
    assert torch.equal(read(tmp_path, an_image(size=(9, 9)), data=resized), seven)


@pytest.mark.parametrize(
    ("image", "rule"),
    [
        (an_image("RGB", color=(7, 8, 7)), "trained on grayscale images, and this one is in color"),
        (an_image("LA", color=(7, 100)), "must not be transparent"),
        (an_image("I;16"), "8 bits per channel"),
        (an_image(size=(6, 6)), "4 x 6, and this one, 6 x 6, has a different aspect ratio"),
    ],
)
def test_what_is_not_is_refused(image, rule, tmp_path):
    with pytest.raises(ConfigError, match=rule):
        read(tmp_path, image)


def test_folders_and_parquet_tell_labels_where_there_are_some(tmp_path):
    encoded = io.BytesIO()
    an_image().save(encoded, "png")
    for number in (1, 2, 10):  # by number, not by their order, and whether or not all are there
        (tmp_path / "classes" / str(number) / "more").mkdir(parents=True)
        an_image().save(tmp_path / "classes" / str(number) / "more" / "x.png")
    found = read_inputs([tmp_path / "classes"], DATA, GREY, 11)
    assert found.labels.tolist() == [1, 10, 2]
    assert found.locations[1] == str(tmp_path / "classes" / "10" / "more" / "x.png")
    few = read_inputs([tmp_path / "classes"], DATA, GREY, 10)  # 10 is none of the classes
    assert (few.labels, few.label_problem) == (None, f"{tmp_path / 'classes' / '1' / 'more' / 'x.png'} has no label")
    (tmp_path / "classes" / "2").rename(tmp_path / "elsewhere")
    (tmp_path / "classes" / "2").symlink_to(tmp_path / "elsewhere")  # as training follows it
    assert read_inputs([tmp_path / "classes"], DATA, GREY, 11).labels.tolist() == [1, 10, 2]
    pq.write_table(pa.table({"image": [encoded.getvalue()] * 2, "label": [1, 2]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"image": [encoded.getvalue()]}), tmp_path / "one.parquet")
    found = read_inputs([tmp_path / "two.parquet"], DATA, GREY, 3)
    assert (found.labels.tolist(), found.locations[1]) == ([1, 2], f"{tmp_path / 'two.parquet'}, row 1")
    both = read_inputs([tmp_path / "two.parquet", tmp_path / "one.parquet"], DATA, GREY, 3)
    assert (both.labels, len(both.images)) == (None, 3)
    assert read_inputs([tmp_path / "two.parquet"], DATA, GREY, 2).label_problem.endswith("row 1 has label 2")


def test_columns_of_parquet_are_found_among_others(tmp_path):
    """Also where training was told of columns that are not there."""
    encoded = io.BytesIO()
    an_image().save(encoded, "png")
    columns = {"image": [encoded.getvalue()] * 2, "id": [7, 8], "label": [0, 1]}
    features = {"info": {"features": {"label": {"names": ["cat", "ant"]}}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "named.parquet")
    assert read_inputs([tmp_path / "named.parquet"], DATA, GREY, 2, ["ant", "cat"]).labels.tolist() == [1, 0]
    own = Data(name="parquet", path=tmp_path, label_column="fine")
    for left, labels in ((["image"], None), (["image", "id"], None), (["image", "id", "label"], [0, 1])):
        pq.write_table(table.select(left), tmp_path / "left.parquet")
        found = read_inputs([tmp_path / "left.parquet"], own, GREY, 2).labels
        assert (None if found is None else found.tolist()) == labels


def test_names_of_any_bytes_can_be_printed(tmp_path):
    an_image().save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / os.fsdecode(b"\xe9t\xe9.png"))
    (place,) = read_inputs([tmp_path], DATA, GREY, 3).locations
    assert place.encode().decode().endswith(".png")


def test_no_other_program_is_run_over_an_image(tmp_path):
    """As Ghostscript would be, where Pillow finds it."""
    (tmp_path / "one.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\nshowpage\n")
    with pytest.raises(ConfigError, match="unknown format; its bytes begin with b'%!PS"):
        read_inputs([tmp_path / "one.png"], DATA, GREY, 3)
    (tmp_path / "one.png").rename(tmp_path / "one.eps")
    with pytest.raises(ConfigError, match="there must be an image"):
        read_inputs([tmp_path], DATA, GREY, 3)


def test_nothing_and_what_is_not_there_are_told(tmp_path):
    with pytest.raises(ConfigError, match="there must be an image"):
        read_inputs([tmp_path], DATA, GREY, 3)
    with pytest.raises(ConfigError, match="not found"):
        read_inputs([tmp_path / "x.png"], DATA, GREY, 3)
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"bad.png: the image cannot be decoded"):
        read_inputs([tmp_path / "bad.png"], DATA, GREY, 3)


def test_a_photograph_is_turned_upright(tmp_path):
    """As every viewer shows it: orientation 6 is stored lying on its left side."""
    upright = Image.new("L", (6, 4))
    upright.paste(200, (0, 0, 3, 2))
    lying, tag = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    tag[0x0112] = 6
    lying.save(tmp_path / "one.png", exif=tag)
    assert torch.equal(read_inputs([tmp_path / "one.png"], DATA, GREY, 3).images, read(tmp_path, upright))


@pytest.mark.parametrize("tag", [0x128, 0x103])
def test_other_exif_data_are_of_no_concern(tag, tmp_path):
    """Such as a text where there should be a number, which Pillow can read and not write."""
    entries = [struct.pack(">HHI4s", tag, 2, 4, b"bad"), struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)]
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    an_image(size=(4, 6)).save(tmp_path / "one.jpg", exif=exif)
    assert read_inputs([tmp_path / "one.jpg"], DATA, GREY, 3).images.shape == (1, *GREY)


def test_classes_are_told_by_their_names_where_they_have_some(tmp_path):
    for name in ("bee", "cat"):
        (tmp_path / name).mkdir()
        an_image().save(tmp_path / name / "x.png")
    names = ["ant", "bee", "cat"]
    assert read_inputs([tmp_path], DATA, GREY, 3, names).labels.tolist() == [1, 2]
    (tmp_path / "cat").rename(tmp_path / "aaa")
    assert read_inputs([tmp_path], DATA, GREY, 3, names).labels is None


def test_a_folder_may_hold_more_than_images(tmp_path):
    encoded = io.BytesIO()
    an_image().save(encoded, "png")
    for name in ("._x.png", "._x.parquet", "paper.pdf", "note.txt", "features.h5", "clip.mpg"):
        (tmp_path / name).write_text("no image")
    pq.write_table(pa.table({"file_name": ["x.png"], "label": [1]}), tmp_path / "metadata.parquet")
    an_image().save(tmp_path / "x.png")
    (tmp_path / "spark.parquet").mkdir()
    columns = {"image": [encoded.getvalue()], "id": [7], "label": [2]}
    pq.write_table(pa.table(columns), tmp_path / "spark.parquet" / "part-0.parquet")
    places = read_inputs([tmp_path], DATA, GREY, 3).locations
    assert [place.rpartition("/")[2] for place in places] == ["part-0.parquet, row 0", "x.png"]
    assert read_inputs([tmp_path / "spark.parquet"], DATA, GREY, 3).labels.tolist() == [2]


@pytest.mark.parametrize("name", ["x.png", "x.dds", "x.avif", "x.icns"])
def test_whatever_a_format_raises_is_told(name, tmp_path):
    an_image("RGB").save(tmp_path / "whole.dds")
    content = bytearray((tmp_path / "whole.dds").read_bytes())
    content[80:84] = b"\0" * 4  # of no format that Pillow knows
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="the image cannot be decoded"):
        read_inputs([tmp_path / name], DATA, GREY, 3)


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        an_image().save(tmp_path / name / "x.png")
        (tmp_path / name / "up").symlink_to(tmp_path)
    (tmp_path / "ant" / "other").symlink_to(tmp_path / "bee")
    found = read_inputs([tmp_path], DATA, GREY, 2, ["ant", "bee"])
    assert [place.removeprefix(str(tmp_path)) for place in found.locations] == ["/ant/x.png", "/bee/x.png"]
    assert found.labels.tolist() == [0, 1]
    assert len(read_inputs([tmp_path / "ant" / "up"], DATA, GREY, 2).images) == 2  # which is asked for


def test_words_are_labels_where_the_classes_have_their_names(tmp_path):
    encoded = io.BytesIO()
    an_image().save(encoded, "png")
    table = pa.table({"image": [encoded.getvalue()] * 2, "label": ["cat", "ant"], "width": [6, 6]})
    pq.write_table(table, tmp_path / "words.parquet")
    assert read_inputs([tmp_path / "words.parquet"], DATA, GREY, 2, ["ant", "cat"]).labels.tolist() == [1, 0]
    unknown = read_inputs([tmp_path / "words.parquet"], DATA, GREY, 2, ["ant", "bee"])
    assert (unknown.labels, unknown.label_problem) == (None, f"{tmp_path / 'words.parquet'}, row 0 has label 'cat'")
