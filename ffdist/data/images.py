"""Decoding of images, and their memory."""

import io
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
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


class ImageBuffer:
    """Buffer of decoded images of one size.

    Args:
        num_images: Capacity.
        size: Height and width, or None for the size of the first image.
        channels: Number of channels of the training set, or None if this is the training set. The training set has 3
            channels if any image is in color, otherwise 1.
        resize: Whether to resize images of another size.
    """

    def __init__(self, num_images: int, size: tuple[int, int] | None, channels: int | None, *, resize: bool) -> None:
        self.size, self.num_grayscale = size, 0
        self._num_images, self._channels, self._resize, self._count = num_images, channels, resize, 0
        self._pixels = torch.empty(0, channels or 1, 0, 0, dtype=torch.uint8)

    @property
    def images(self) -> Tensor:
        """Images so far, uint8 `[N, channels, height, width]`."""
        return self._pixels[: self._count]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self._pixels.shape[1]

    def add(self, image: Image.Image, location: str) -> None:
        """Appends an image.

        Raises:
            ConfigError: The image has another size than the previous ones, or is in color and the training images are
                grayscale.
        """
        grayscale = image.mode in GRAYSCALE_MODES or (self._channels == 1 and is_grayscale(image))
        self.num_grayscale += grayscale
        if not grayscale and self._channels == 1:
            raise ConfigError(
                f"{location}: the training images are grayscale, and this one is in color (mode: {image.mode}); "
                f"convert all of them to grayscale or all to color"
            )
        self.size = self.size or (image.height, image.width)
        if (image.height, image.width) != self.size and not self._resize:
            raise ConfigError(
                f"{location}: all images must have the same size (previous: {self.size[0]} x {self.size[1]}, this: "
                f"{image.height} x {image.width}); set data.image_size to [height, width] to resize them"
            )
        if not self._count:
            self._pixels = self._allocate(self._channels or (1 if grayscale else 3))
        elif not grayscale and self.channels == 1:
            previous, self._pixels = self._pixels, self._allocate(3)
            self._pixels[: self._count] = previous[: self._count]
        image = image.convert("L" if self.channels == 1 else "RGB")
        if image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        self._pixels[self._count] = to_tensor(image)
        self._count += 1

    def _allocate(self, channels: int) -> Tensor:
        assert self.size, "set by the first image"
        shape = (self._num_images, channels, *self.size)
        check_fits(torch.Size(shape).numel(), "; set a smaller data.image_size")
        return torch.empty(shape, dtype=torch.uint8)


def check_fits(num_bytes: int, fix: str = "") -> None:
    """Checks the size of a split before its memory is allocated."""
    memory_bytes = psutil.virtual_memory().total
    if num_bytes > memory_bytes:
        raise ConfigError(
            f"the samples of a split must fit into host memory (samples: {num_bytes / 1e9:,.1f} GB, memory: "
            f"{memory_bytes / 1e9:,.1f} GB){fix}"
        )


def _reason(image: Any, error: Exception) -> str:
    """Returns why decoding failed. For an unknown format, Pillow's message only has the `repr` of a file object."""
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split())[:200]
    start = image[:12] if isinstance(image, bytes) else image.open("rb").read(12)
    return f"unknown format; its bytes begin with {start!r}"
