"""One image: whether a file holds one, and its pixels."""

import io
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageChops, UnidentifiedImageError
from torch import Tensor

from ffdist.config import ConfigError

UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows and leaves to others to decode; Ghostscript would run what an EPS holds."""
GREY = ("1", "L")
"""Pillow's modes of images that have no colour."""
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's tag that says how a photograph is stored, and what brings it upright."""


class Sample(NamedTuple):
    """An image that is still to be decoded."""

    image: Any
    """Encoded bytes, or the path of a file."""
    label: Any
    place: str
    """Where it stands, for errors."""


@cache
def _formats() -> list[str]:
    """Returns the formats of images that can be read."""
    Image.init()
    return [kind for kind in Image.OPEN if kind not in UNREADABLE]


def is_image(file: Path) -> bool:
    """Says whether a file's name is that of an image that can be read."""
    kind = Image.registered_extensions().get(file.suffix.lower())
    return kind in _formats()


def decode(sample: Sample) -> Image.Image:
    """Returns the image of a sample, upright, of 8 bits a channel and without transparency, whatever its mode.

    Raises:
        ConfigError: It cannot be decoded, has more bits, or is transparent somewhere.
    """
    try:
        content = io.BytesIO(sample.image) if isinstance(sample.image, bytes) else sample.image
        image: Image.Image = Image.open(content, formats=_formats())
        image.load()
    except Exception as error:  # each format has its own
        raise ConfigError(
            f"{sample.place}: the image cannot be decoded ({_reason(sample.image, error)}); remove the sample or write "
            f"it anew"
        ) from error
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        raise ConfigError(
            f"{sample.place}: images have 8 bits a channel (mode: {image.mode}); scale this one to 0 to 255"
        )
    with suppress(Exception):  # of EXIF data that nobody can read
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        image = image if turn is None else image.transpose(turn)
    if not image.has_transparency_data:
        return image
    opaque = image.convert("RGBA")
    if min(opaque.getchannel("A").tobytes()) < 255:
        raise ConfigError(
            f"{sample.place}: an image must not be transparent (mode: {image.mode}); put it on a background"
        )
    return image if image.mode in GREY else opaque.convert("RGB")


def is_grey(image: Image.Image) -> bool:
    """Says whether an image of any mode is grey in every pixel."""
    if image.mode in GREY:
        return True
    red, green, blue = image.convert("RGB").split()
    return not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))


def pixels(image: Image.Image) -> Tensor:
    """Returns the pixels of an image, uint8 `[channels, height, width]`."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1)


def _reason(image: bytes | Path, error: Exception) -> str:
    """Says why an image cannot be decoded; of an unknown format, Pillow's words name no more than an object."""
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split())[:200]
    start = image[:12] if isinstance(image, bytes) else image.open("rb").read(12)
    return f"unknown format; its bytes begin with {start!r}"
