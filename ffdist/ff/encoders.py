"""Encoders: how samples and labels become the input rows of the first layer.

Shapes: `K` minibatches, `B` samples of a minibatch, `D` values of a sample, `C` classes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ffdist.ff import MAX_CLASSES
from ffdist.ff.augmentation import Augmentation, Color, Crop, Cutout, Flip, Shift
from ffdist.ff.forms import Form
from ffdist.ff.labels import LABELS
from ffdist.ff.specs import MAX_VALUE

FIT_ROWS = 4096
"""Number of samples whose copy in a wider type is in memory at once when an encoder is fitted."""
MAX_SCALE = 1e30
"""Largest reciprocal of a deviation, so that it is a float32 number."""
MAX_FLOAT = torch.finfo(torch.float32).max
MAX_DEVIATIONS = 1e6
"""Largest standardized value. Larger ones are clamped, because the square of an outlier could overflow."""
AUGMENTED_BYTES = 20
"""Bytes per value of the integers that crops and colors compute with."""


@dataclass(frozen=True)
class Encoder(ABC):
    """Turns samples into input rows.

    A field with the name of a setting of the section `data` is set by it; the default of `label` is the meaning of
    `data.label: auto`. Readers of datasets and `fit` set other fields.
    """

    shape: tuple[int, ...]
    """Shape of a sample, whose values are stored as `[D]`."""
    classes: int
    """Number of classes C."""
    label: str = "overwrite"
    """How a row shows the label, a key of `LABELS`, or `none`."""
    label_scale: float = 1.0
    """Scale of the label's one-hot values."""

    dtype: ClassVar[torch.dtype]
    """Type of the values of a sample. It must not be int64, the type of labels."""

    @classmethod
    def fit(cls, samples: Tensor, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings that depend on the training samples.

        Args:
            samples: `[N, D]`.
            shape: Shape of a sample.
            settings: The section `data` of the configuration.
        """
        return {}

    def __post_init__(self) -> None:
        """Checks the settings, and converts `shape` to a tuple.

        Raises:
            ValueError: A setting is invalid.
        """
        object.__setattr__(self, "shape", tuple(self.shape))
        if not self.shape or not all(type(size) is int and 1 <= size <= MAX_VALUE for size in self.shape):
            raise ValueError(f"shape must be positive integers (shape: {self.shape})")
        if self.label == "overwrite" and self.classes >= self.size:
            raise ValueError(
                f"data.label=overwrite replaces the first values of a sample by {self.classes} label values, but a "
                f"sample has only {self.size}; set data.label to append"
            )
        if self.label not in (*LABELS, "none"):
            raise ValueError(f"label must be one of {', '.join(LABELS)}, none (label: {self.label})")
        if not 1 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"classes must be from 1 to {MAX_CLASSES} (classes: {self.classes})")

    @property
    def size(self) -> int:
        """Number of values of a sample D."""
        return math.prod(self.shape)

    @property
    def labels_shown(self) -> bool:
        """Whether rows show a label."""
        return self.label != "none"

    @property
    def form(self) -> Form:
        """Form of an input row."""
        return Form(self.shape, shared=self.classes if self.label in ("append", "everywhere") else 0)

    def describe(self) -> str:
        """Returns a description of the samples."""
        return f"{' x '.join(map(str, self.shape))} values"

    @abstractmethod
    def values(self, samples: Tensor) -> Tensor:
        """Returns samples `[..., D]` as float32 values `[..., D]`."""

    def _set_moments(self, count: int, repeats: int) -> None:
        """Checks the fields `mean` and `deviation`, and converts them to tuples.

        Args:
            count: Number of values that each of them must have.
            repeats: Number of values of a sample that have the same mean and deviation, next to each other.

        Raises:
            ValueError: They are invalid.
        """
        for name in ("mean", "deviation"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != count or not all(isinstance(each, int | float) for each in values):
                noun = "columns" if repeats == 1 else "channels"
                raise ValueError(f"{name} must be a number for each of the {count} {noun} (given: {len(values)})")
        moments = torch.tensor([getattr(self, name) for name in ("mean", "deviation")], dtype=torch.float64)
        if not (moments.isfinite().all() and (moments[1] >= 0).all()):
            raise ValueError("mean and deviation must be finite, and no deviation negative")
        scale = moments[1].reciprocal().clamp(max=MAX_SCALE)
        moments = torch.stack((moments[0], torch.where(moments[1] > 0, scale, 0))).to(torch.float32)
        repeated = moments.repeat_interleave(repeats, 1)
        object.__setattr__(self, "_moments", {torch.device("cpu"): repeated})  # no field: it follows from the others

    def _standardized(self, values: Tensor) -> Tensor:
        """Returns values `[..., D]` minus their mean in the training set, divided by the standard deviation."""
        by_device: dict[torch.device, Tensor] = self.__dict__["_moments"]
        if values.device not in by_device:  # copied once: a CUDA graph cannot copy from host memory
            by_device[values.device] = by_device[torch.device("cpu")].to(values.device)
        mean, scale = by_device[values.device]
        differences = (values - mean).clamp(-MAX_FLOAT, MAX_FLOAT)  # infinity times the scale 0 would be NaN
        standardized: Tensor = (differences * scale).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        return standardized

    @property
    def augments(self) -> bool:
        """Whether training samples are augmented."""
        return False

    def draw_augmentation(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draws the random numbers for the augmentation of a minibatch `[..., B]`."""
        raise NotImplementedError

    def augment(self, samples: Tensor, drawn: Tensor) -> Tensor:
        """Returns augmented samples `[K, B, D]`.

        Args:
            samples: Samples of K minibatches `[K, B, D]`.
            drawn: Result of `draw_augmentation` for each minibatch `[K, ..., B]`.
        """
        raise NotImplementedError

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample."""
        return self.size * self.dtype.itemsize

    @property
    def augmentation_bytes(self) -> int:
        """Bytes of a sample during the augmentation, in addition to those before and after it."""
        return 0


@dataclass(frozen=True)
class ImageEncoder(Encoder):
    """Images: uint8 pixels of shape `(channels, height, width)`, which become values from 0 to 1."""

    subtract_mean: bool = False
    """Whether to subtract each image's own mean."""
    standardize: bool = False
    """Whether to subtract the mean of each channel in the training set, and to divide by its standard deviation."""
    crop: float = 1.0
    """Smallest fraction of its area to which a training image is cropped; 1 for no crop."""
    jitter: int = 0
    """Largest random shift of a training image in each direction, in pixels."""
    flip: bool = False
    """Whether training images are mirrored left to right at random."""
    color: float = 0.0
    """Largest difference of the factors of brightness, contrast and saturation from 1."""
    cutout: int = 0
    """Side length of the square that is cut out of training images, in pixels."""
    mean: tuple[float, ...] = ()
    """Mean of each channel in the training set, from 0 to 1; empty if images are not standardized."""
    deviation: tuple[float, ...] = ()
    """Standard deviation of each channel in the training set."""

    dtype = torch.uint8

    @classmethod
    def fit(cls, samples: Tensor, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the mean and the standard deviation of each channel, from exact sums of integers."""
        if not settings["standardize"]:
            return {}
        channels = samples.view(len(samples), shape[0], -1).unbind(1)
        counts = [
            torch.stack([torch.bincount(part.flatten(), minlength=256) for part in torch.split(each, FIT_ROWS)]).sum(0)
            for each in channels
        ]
        moments = [[int((count * torch.arange(256) ** power).sum()) for power in range(3)] for count in counts]
        means = [total / count / 255 for count, total, _ in moments]
        deviations = [math.sqrt(count * square - total**2) / count / 255 for count, total, square in moments]
        return {"mean": tuple(means), "deviation": tuple(deviations)}

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is invalid.
        """
        super().__post_init__()
        if len(self.shape) != 3:
            raise ValueError(f"the shape of images must be channels, height and width (shape: {self.shape})")
        channels, height, width = self.shape
        if self.jitter >= min(height, width):
            raise ValueError(
                f"data.jitter must be smaller than the images (jitter: {self.jitter}, images: {height} x {width}); "
                f"otherwise a shift can move the whole image out of view"
            )
        if self.cutout >= min(height, width):
            raise ValueError(
                f"data.cutout must be smaller than the images (cutout: {self.cutout}, images: {height} x {width})"
            )
        if self.standardize and self.subtract_mean:
            raise ValueError(
                "data.standardize and data.subtract_mean both subtract a mean; set data.subtract_mean to false"
            )
        self._set_moments(channels if self.standardize else 0, height * width)

    def describe(self) -> str:
        """Returns the size and the number of channels."""
        channels, height, width = self.shape
        return f"{height} x {width} pixels, {channels} channel{'s' * (channels > 1)}"

    def values(self, samples: Tensor) -> Tensor:
        """Returns the pixels: from 0 to 1, or with a mean of 0."""
        values = samples.to(torch.float32) / 255
        if self.subtract_mean:  # the sum of integers does not depend on their order
            values = values - samples.sum(-1, keepdim=True) / (255 * self.size)
        return self._standardized(values) if self.standardize else values

    @cached_property
    def augmentations(self) -> list[Augmentation]:
        """Augmentations of training images, in their order."""
        fill = tuple(round(255 * mean) for mean in self.mean) or (0,) * self.shape[0]
        every = {
            Crop(self.crop): self.crop < 1,
            Shift(self.jitter): self.jitter > 0,
            Flip(): self.flip,
            Color(self.color): self.color > 0,
            Cutout(self.cutout, fill): self.cutout > 0,
        }
        return [augmentation for augmentation, is_used in every.items() if is_used]

    @property
    def augments(self) -> bool:
        """Whether there are augmentations."""
        return bool(self.augmentations)

    def draw_augmentation(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draws the numbers of all augmentations for a minibatch `[V, B]`."""
        return torch.cat([each.draw(batch, self.shape, generator) for each in self.augmentations])

    def augment(self, samples: Tensor, drawn: Tensor) -> Tensor:
        """Returns augmented images `[K, B, D]`."""
        images, numbers = samples.reshape(-1, *self.shape), drawn.transpose(0, 1).flatten(1)
        parts = torch.split(numbers, [each.num_drawn for each in self.augmentations])
        for each, part in zip(self.augmentations, parts, strict=True):
            images = each.apply(images, part)
        return images.reshape(samples.shape)

    @property
    def augmentation_bytes(self) -> int:
        """Bytes of an image with a border, and of the integers of crops and colors."""
        channels, height, width = self.shape
        integers = AUGMENTED_BYTES * self.size if self.crop < 1 or self.color else 0
        return channels * (height + 2 * self.jitter) * (width + 2 * self.jitter) + integers


@dataclass(frozen=True)
class TableEncoder(Encoder):
    """Rows of a table: float32 columns of shape `(D,)`, standardized by the statistics of the training set."""

    label: str = "append"
    """As in `Encoder`, but not `overwrite`: a table has no border."""
    mean: tuple[float, ...] = ()
    """Mean of each column, `[D]`."""
    deviation: tuple[float, ...] = ()
    """Standard deviation of each column, `[D]`; 0 for a constant column, whose values become 0."""

    dtype = torch.float32

    @classmethod
    def fit(cls, samples: Tensor, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the mean and the standard deviation of each column.

        The sums are numpy's, in float64, because those of torch depend on the number of threads.
        """
        mean = samples.numpy().mean(0, dtype="float64")
        squares = sum(((rows.numpy() - mean) ** 2).sum(0) for rows in torch.split(samples, FIT_ROWS))
        deviation = torch.from_numpy(squares / len(samples)).sqrt()
        deviation[(samples == samples[0]).all(0)] = 0
        return {"mean": tuple(mean.tolist()), "deviation": tuple(deviation.tolist())}

    def __post_init__(self) -> None:
        """Checks the settings, and converts lists to tuples.

        Raises:
            ValueError: A setting is invalid.
        """
        if self.label == "overwrite":
            raise ValueError("data.label=overwrite is for images, whose border is empty; set data.label to append")
        super().__post_init__()
        if len(self.shape) != 1:
            raise ValueError(f"the shape of rows of a table must be the number of columns (shape: {self.shape})")
        self._set_moments(self.size, 1)

    def describe(self) -> str:
        """Returns the number of columns."""
        return f"{self.size:,} columns"

    def values(self, samples: Tensor) -> Tensor:
        """Returns the columns with a mean of 0 and a standard deviation of 1."""
        return self._standardized(samples)


ENCODERS: dict[str, type[Encoder]] = {"image": ImageEncoder, "table": TableEncoder}
"""Encoders, by the name that a dataset gives."""


def parse_encoder(entry: Any) -> Encoder:
    """Returns the encoder of an entry in a file, the result of `encoder_entry`.

    Raises:
        ValueError: The entry is invalid.
    """
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if not (isinstance(kind, str) and kind in ENCODERS):
        raise ValueError(f"the kind of an encoder must be one of {', '.join(ENCODERS)} (kind: {str(kind)[:99]!r})")
    settings = {key: value for key, value in entry.items() if key != "kind"}
    for field in fields(ENCODERS[kind]):
        value, default = settings.get(field.name, field.default), field.default
        value = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        if default is not MISSING and type(value) is not type(default) and not isinstance(value, int | float):
            raise ValueError(f"{field.name} must be of type {type(default).__name__} (given: {str(value)[:99]!r})")
    try:
        return ENCODERS[kind](**settings)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"the settings of an encoder are invalid ({error})") from error


def encoder_entry(encoder: Encoder) -> dict[str, Any]:
    """Returns an encoder as JSON data."""
    kind = next(name for name, cls in ENCODERS.items() if cls is type(encoder))
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(encoder).items()}
    return {"kind": kind, **values}
