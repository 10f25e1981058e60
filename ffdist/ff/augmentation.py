"""Augmentation of training images, in integer arithmetic, so that the result is the same on every device.

Shapes: `N` images, `B` images of a minibatch, `C` channels, `Y` and `X` sides, `V` drawn numbers of an image.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 256
"""Fixed-point numbers are multiples of 1 / SCALE."""
GRAY = (19595, 38470, 7471)
"""Weights of red, green and blue in gray (ITU-R 601-2), in units of 1 / 2**16, as in Pillow."""
MIN_ASPECT_RATIO = 0.75
"""Smallest aspect ratio of a crop; the largest one is its reciprocal. As in torchvision."""


class Augmentation(ABC):
    """A random change of training images."""

    num_drawn: ClassVar[int]
    """Number of drawn numbers of an image V."""

    @abstractmethod
    def draw(self, batch: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws numbers for the images of a minibatch, int64 `[V, B]`.

        Args:
            batch: Number of images B.
            shape: `(C, Y, X)`.
            generator: Source of the random numbers.
        """

    @abstractmethod
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Returns changed images.

        Args:
            images: uint8 `[N, C, Y, X]`; not modified.
            drawn: Results of `draw` for these images `[V, N]`.
        """


@dataclass(frozen=True)
class Crop(Augmentation):
    """A random part of the image, bilinearly enlarged to its size (RandomResizedCrop of torchvision)."""

    min_area: float
    """Smallest fraction of the image's area; the largest one is 1."""

    num_drawn = 4

    def draw(self, batch: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws the top, the left, the height and the width of each part."""
        _, *sizes = shape
        area, ratio, *place = torch.rand(4, batch, generator=generator, dtype=torch.float64)
        area = self.min_area + (1 - self.min_area) * area
        is_tall = ratio < 0.5
        ratio = (MIN_ASPECT_RATIO + (1 - MIN_ASPECT_RATIO) * (2 * ratio % 1)).sqrt()  # of a side and that of the square
        ratios = torch.where(is_tall, 1 / ratio, ratio), torch.where(is_tall, ratio, 1 / ratio)
        lengths = [
            (area.sqrt() * ratio * size).round().clamp(1, size) for size, ratio in zip(sizes, ratios, strict=True)
        ]
        starts = [
            (each * (size - length + 1)).floor() for each, size, length in zip(place, sizes, lengths, strict=True)
        ]
        return torch.stack((*starts, *lengths)).to(torch.int64)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Returns the enlarged parts."""
        values = images.to(torch.int32)
        for axis, start, length in zip((2, 3), drawn[:2], drawn[2:], strict=True):
            values = _enlarge(values, axis, start, length)
        return ((values + SCALE * SCALE // 2) // (SCALE * SCALE)).to(torch.uint8)


def _enlarge(values: Tensor, axis: int, start: Tensor, length: Tensor) -> Tensor:
    """Returns a part of each image along an axis, enlarged to its whole size, times SCALE.

    Args:
        values: `[N, C, Y, X]`, int32.
        axis: 2 or 3.
        start: First position of each part `[N]`.
        length: Number of positions of each part `[N]`.
    """
    size = values.shape[axis]
    numbers = torch.arange(size, device=values.device) * 2 + 1
    position = numbers * length.unsqueeze(1) * (SCALE // 2) // size - SCALE // 2  # of centers, times SCALE
    position = torch.minimum(position.clamp(min=0), (length.unsqueeze(1) - 1) * SCALE)
    below, fraction = position // SCALE, position % SCALE
    above = torch.minimum(below + 1, length.unsqueeze(1) - 1)
    shape = [len(values), 1, 1, 1]
    shape[axis] = size
    low, high = (
        values.gather(axis, (start.unsqueeze(1) + each).view(shape).expand_as(values)) for each in (below, above)
    )
    weight = fraction.view(shape).to(torch.int32)
    return low * (SCALE - weight) + high * weight


@dataclass(frozen=True)
class Shift(Augmentation):
    """A random shift; pixels from beyond the border are 0."""

    max_shift: int
    """Largest shift in each direction, in pixels."""

    num_drawn = 2

    def draw(self, batch: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws the shift of each image up and left, from 0 to 2 * max_shift; `max_shift` is no shift."""
        return torch.randint(2 * self.max_shift + 1, (2, batch), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Returns shifted images."""
        padded = F.pad(images, (self.max_shift,) * 4)
        windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
        return windows[torch.arange(len(padded), device=padded.device), :, drawn[0], drawn[1]]


@dataclass(frozen=True)
class Flip(Augmentation):
    """Left and right are exchanged with probability 1/2."""

    num_drawn = 1

    def draw(self, batch: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws 1 for the images that are flipped."""
        return torch.randint(2, (1, batch), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Returns the images, some of them flipped."""
        return torch.where(drawn[0].bool()[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True)
class Color(Augmentation):
    """Random brightness, contrast and saturation, in this order; saturation only of three channels."""

    strength: float
    """Largest difference of a factor from 1."""

    num_drawn = 3

    def draw(self, batch: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws the factors, in units of 1 / SCALE."""
        largest = round(self.strength * SCALE)
        return torch.randint(SCALE - largest, SCALE + largest + 1, (3, batch), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Returns images with other colors."""
        brightness, contrast, saturation = drawn.to(torch.int32)[..., None, None, None]
        values = (images.to(torch.int32) * brightness // SCALE).clamp(max=255)
        gray = _gray(values).flatten(1)
        values = _blend(values, (gray.sum(1) // gray.shape[1]).to(torch.int32)[:, None, None, None], contrast)
        if images.shape[1] == len(GRAY):
            values = _blend(values, _gray(values), saturation)
        return values.to(torch.uint8)


def _blend(values: Tensor, gray: Tensor, factor: Tensor) -> Tensor:
    """Returns values whose differences from gray are multiplied by a factor, from 0 to 255."""
    return (gray + (values - gray) * factor // SCALE).clamp(0, 255)


def _gray(values: Tensor) -> Tensor:
    """Returns images `[N, 1, Y, X]` in shades of gray, of any number of channels."""
    if values.shape[1] != len(GRAY):
        return values.sum(1, keepdim=True, dtype=torch.int32) // values.shape[1]
    weights = torch.tensor(GRAY, dtype=torch.int32, device=values.device)[:, None, None]
    return ((values * weights).sum(1, keepdim=True, dtype=torch.int32) + 2**15) // 2**16


@dataclass(frozen=True)
class Cutout(Augmentation):
    """A square at a random place is replaced by one color (DeVries and Taylor 2017); the border may clip it."""

    side: int
    """Side length of the square, in pixels."""
    fill: tuple[int, ...]
    """Value of each channel in the square, 0 to 255."""

    num_drawn = 2

    def draw(self, batch: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws the row and the column of the center of each square."""
        return torch.stack([torch.randint(size, (batch,), generator=generator) for size in shape[1:]])

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Returns images with a square in one color."""
        rows, columns = (
            (torch.arange(size, device=images.device) - center.unsqueeze(1) + self.side // 2) // self.side == 0
            for center, size in zip(drawn, images.shape[2:], strict=True)
        )
        is_filled = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
        fill = torch.tensor(self.fill, dtype=torch.uint8, device=images.device)[:, None, None]
        return torch.where(is_filled, fill, images)
