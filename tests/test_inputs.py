import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ffdist import ConfigError
from ffdist.data.inputs import read_inputs
from ffdist.sections import Data

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
        (an_image("RGB", color=(7, 8, 7)), "trained on grey images, and this one is in colour"),
        (an_image("LA", color=(7, 100)), "must not be transparent"),
        (an_image("I;16"), "8 bits a channel"),
        (an_image(size=(6, 6)), "4 x 6, and this one, 6 x 6, has other proportions"),
    ],
)
def test_what_is_not_is_refused(image, rule, tmp_path):
    with pytest.raises(ConfigError, match=rule):
        read(tmp_path, image)


def test_folders_and_parquet_tell_labels_where_there_are_some(tmp_path):
    encoded = io.BytesIO()
    an_image().save(encoded, "png")
    for kind in "abc":
        (tmp_path / "classes" / kind).mkdir(parents=True)
        an_image().save(tmp_path / "classes" / kind / "x.png")
    found = read_inputs([tmp_path / "classes"], DATA, GREY, 3)
    assert found.labels.tolist() == [0, 1, 2]
    assert [place[-7:] for place in found.places] == ["a/x.png", "b/x.png", "c/x.png"]
    assert read_inputs([tmp_path / "classes"], DATA, GREY, 4).labels is None
    pq.write_table(pa.table({"image": [encoded.getvalue()] * 2, "label": [1, 2]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"image": [encoded.getvalue()]}), tmp_path / "one.parquet")
    found = read_inputs([tmp_path / "two.parquet"], DATA, GREY, 3)
    assert (found.labels.tolist(), found.places[1]) == ([1, 2], f"{tmp_path / 'two.parquet'}, row 1")
    both = read_inputs([tmp_path / "two.parquet", tmp_path / "one.parquet"], DATA, GREY, 3)
    assert (both.labels, len(both.images)) == (None, 3)


def test_nothing_and_what_is_not_there_are_told(tmp_path):
    with pytest.raises(ConfigError, match="there must be an image"):
        read_inputs([tmp_path], DATA, GREY, 3)
    with pytest.raises(ConfigError, match="there is none"):
        read_inputs([tmp_path / "x.png"], DATA, GREY, 3)
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"bad.png: the image cannot be decoded"):
        read_inputs([tmp_path / "bad.png"], DATA, GREY, 3)
