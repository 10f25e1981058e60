"""Decoding of single images."""

import io
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageChops, UnidentifiedImageError
from torch import Tensor

from ffdist.errors import ConfigError

UNSUPPORTED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow does not decode itself. For EPS it runs Ghostscript, which executes code in the file."""
GRAYSCALE_MODES = ("1", "L")
"""Pillow's image modes without color."""
ORIENTATION_TAG = 0x0112
"""EXIF tag of the orientation in which an image is stored."""
UPRIGHT_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposes that turn an image upright, by EXIF orientation."""


class Sample(NamedTuple):
    """An encoded image and its label."""

    image: Any
    """Encoded bytes, the path of a file, or a Pillow image."""
    label: Any
    """Class index, another value that the reader rejects, or None if the label is unknown."""
    location: str
    """File, or file and row, for error messages."""


@cache
def _formats() -> list[str]:
    """Returns the names of the supported image formats."""
    Image.init()
    return [name for name in Image.OPEN if name not in UNSUPPORTED_FORMATS]


def is_image(file: Path) -> bool:
    """Returns whether a file has the extension of a supported image format."""
    return Image.registered_extensions().get(file.suffix.lower()) in _formats()


def decode(sample: Sample) -> Image.Image:
    """Returns the image of a sample, upright, with 8 bits per channel and without an alpha channel, in any mode.

    Raises:
        ConfigError: The image cannot be decoded, has more than 8 bits per channel, or has transparent pixels.
    """
    try:
        content: Any = io.BytesIO(sample.image) if isinstance(sample.image, bytes) else sample.image
        is_open = isinstance(content, Image.Image)
        image: Image.Image = content if is_open else Image.open(content, formats=_formats())
        image.load()
    except Exception as error:  # each format raises errors of its own
        raise ConfigError(
            f"{sample.location}: the image cannot be decoded ({_reason(sample.image, error)}); remove the sample or "
            f"save it again"
        ) from error
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        raise ConfigError(
            f"{sample.location}: images must have 8 bits per channel (mode: {image.mode}); scale this one to 0 to 255"
        )
    with suppress(Exception):  # ignores damaged EXIF data
        transpose = UPRIGHT_TRANSPOSES.get(image.getexif().get(ORIENTATION_TAG, 1))
        image = image if transpose is None else image.transpose(transpose)
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    if min(rgba.getchannel("A").tobytes()) < 255:
        raise ConfigError(
            f"{sample.location}: an image must not be transparent (mode: {image.mode}); flatten it onto a background"
        )
    return image if image.mode in GRAYSCALE_MODES else rgba.convert("RGB")


def is_grayscale(image: Image.Image) -> bool:
    """Returns whether every pixel of an image, of any mode, is gray."""
    if image.mode in GRAYSCALE_MODES:
        return True
    red, green, blue = image.convert("RGB").split()
    return not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))


def to_tensor(image: Image.Image) -> Tensor:
    """Returns the pixels of an image as uint8 `[channels, height, width]`."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1)


def _reason(image: Any, error: Exception) -> str:
    """Returns why decoding failed. For an unknown format, Pillow's message only has the `repr` of a file object."""
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split())[:200]
    start = image[:12] if isinstance(image, bytes) else image.open("rb").read(12)
    return f"unknown format; its bytes begin with {start!r}"
