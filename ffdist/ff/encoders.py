"""Encoders: how samples and labels become the input rows of the first layer.

Shapes: `K` minibatches, `B` samples of a minibatch, `D` values of a sample, `C` classes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ffdist.ff import MAX_CLASSES
from ffdist.ff.forms import Form
from ffdist.ff.labels import LABELS
from ffdist.ff.specs import MAX_VALUE


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
    def fit(cls, samples: Tensor) -> dict[str, Any]:
        """Returns the settings that depend on the training samples `[N, D]`."""
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

    def rows(self, samples: Tensor, claims: Tensor | None) -> Tensor:
        """Returns the rows of samples.

        Args:
            samples: `[..., D]`.
            claims: Label values `[..., C]`, float32, 1 for the label; None to show no label.

        Returns:
            Rows `[..., D']`, float32, not normalized.
        """
        values = self.values(samples)
        return values if claims is None else LABELS[self.label](values, claims * self.label_scale)

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
    jitter: int = 0
    """Largest random shift of a training image in each direction, in pixels."""
    flip: bool = False
    """Whether training images are mirrored left to right at random."""

    dtype = torch.uint8

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is invalid.
        """
        super().__post_init__()
        if len(self.shape) != 3:
            raise ValueError(f"the shape of images must be channels, height and width (shape: {self.shape})")
        _, height, width = self.shape
        if self.jitter >= min(height, width):
            raise ValueError(
                f"data.jitter must be smaller than the images (jitter: {self.jitter}, images: {height} x {width}); "
                f"otherwise a shift can move the whole image out of view"
            )

    def describe(self) -> str:
        """Returns the size and the number of channels."""
        channels, height, width = self.shape
        return f"{height} x {width} pixels, {channels} channel{'s' * (channels > 1)}"

    def values(self, samples: Tensor) -> Tensor:
        """Returns the pixels, from 0 to 1, or with a mean of 0."""
        values = samples.to(torch.float32) / 255
        if self.subtract_mean:  # the sum of integers does not depend on their order
            values = values - samples.sum(-1, keepdim=True) / (255 * self.size)
        return values

    @property
    def augments(self) -> bool:
        """Whether images are shifted or mirrored."""
        return self.jitter > 0 or self.flip

    def draw_augmentation(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draws the shift of each image, down and right, from 0 to 2 * jitter, and whether it is mirrored `[3, B]`."""
        shifts = torch.randint(2 * self.jitter + 1, (2, batch), generator=generator)
        flips = torch.randint(2, (1, batch), generator=generator) if self.flip else shifts.new_zeros(1, batch)
        return torch.cat((shifts, flips))

    def augment(self, samples: Tensor, drawn: Tensor) -> Tensor:
        """Returns shifted and mirrored images `[K, B, D]`; pixels from beyond the border are 0."""
        channels, height, width = self.shape
        padded = F.pad(samples.reshape(-1, channels, height, width), (self.jitter,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        down, right, flipped = drawn.transpose(0, 1).flatten(1)
        images = windows[torch.arange(len(padded), device=padded.device), :, down, right]
        if self.flip:
            images = torch.where(flipped.bool()[:, None, None, None], images.flip(3), images)
        return images.reshape(samples.shape)

    @property
    def augmentation_bytes(self) -> int:
        """Bytes of an image with a border."""
        channels, height, width = self.shape
        return channels * (height + 2 * self.jitter) * (width + 2 * self.jitter)


FIT_ROWS = 4096
"""Number of rows whose float64 copy is in memory at once when a table encoder is fitted."""
MAX_SCALE = 1e30
"""Largest reciprocal of a deviation, so that it is a float32 number."""
MAX_FLOAT = torch.finfo(torch.float32).max
MAX_DEVIATIONS = 1e6
"""Largest standardized value. Larger ones are clamped, because the square of an outlier could overflow."""


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
    def fit(cls, samples: Tensor) -> dict[str, Any]:
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
        for name in ("mean", "deviation"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != self.size or not all(isinstance(each, int | float) for each in values):
                raise ValueError(f"{name} must be a number for each of the {self.size} columns (given: {len(values)})")
        moments = torch.tensor([self.mean, self.deviation], dtype=torch.float64)
        if not (moments.isfinite().all() and (moments[1] >= 0).all()):
            raise ValueError("mean and deviation must be finite, and no deviation negative")
        scale = moments[1].reciprocal().clamp(max=MAX_SCALE)
        moments = torch.stack((moments[0], torch.where(moments[1] > 0, scale, 0))).to(torch.float32)
        object.__setattr__(self, "_moments", {torch.device("cpu"): moments})  # no field: it follows from the others

    def describe(self) -> str:
        """Returns the number of columns."""
        return f"{self.size:,} columns"

    def values(self, samples: Tensor) -> Tensor:
        """Returns the columns with a mean of 0 and a standard deviation of 1."""
        by_device: dict[torch.device, Tensor] = self.__dict__["_moments"]
        if samples.device not in by_device:  # copied once: a CUDA graph cannot copy from host memory
            by_device[samples.device] = by_device[torch.device("cpu")].to(samples.device)
        mean, scale = by_device[samples.device]
        differences = (samples - mean).clamp(-MAX_FLOAT, MAX_FLOAT)  # infinity times the scale 0 would be NaN
        values: Tensor = (differences * scale).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        return values


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
    return {"kind": kind, **asdict(encoder), "shape": list(encoder.shape)}
