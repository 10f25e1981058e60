"""Negative data: what each positive sample is contrasted with.

A kind is a function `kind(data, indices, generator, **options)`. It returns the negatives of the training samples
`indices` `[n]`, and draws all random numbers from `generator`, which is fresh in each call. It returns

- labels `[n]`, int64: the negative is the sample with that label, or
- labels `[n, M]`, int64: M negatives per sample, each with the weight 1 / M, or
- samples `[n, D]`, of the type of the training samples: the negative is that sample, with the sample's own label where
  labels are shown.

A custom kind is named `package.module:function` and has the same contract. It must not modify `data` and `indices`.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.ff import keyed
from ffdist.ff.custom import import_custom

MAX_NOISE_SAMPLES = 10_000
"""Largest number of samples that the mean and standard deviation of normal noise are computed from."""


class TrainingSet(NamedTuple):
    """The data that negatives are made from."""

    samples: Tensor
    """`[N, D]`; of images uint8, ordered by channel, row and column."""
    labels: Tensor
    """int64 `[N]`, in [0, classes)."""
    classes: int
    """Number of classes; some may have no samples."""
    shape: tuple[int, ...]
    """Shape of a sample; of an image, channels, height and width."""
    seed: int
    """Seed of the run, for draws that are the same in every epoch."""

    @property
    def trained(self) -> Tensor:
        """Classes that have samples, ascending `[T]`. Labels of other classes would be recognized as wrong."""
        return torch.bincount(self.labels, minlength=self.classes).nonzero().flatten()


class NegativesError(ValueError):
    """Negatives cannot be made or used; the message says why."""


def _image_shape(data: TrainingSet) -> tuple[int, int, int]:
    if data.samples.dtype != torch.uint8 or len(data.shape) != 3:
        raise NegativesError(
            f"needs images (samples: {_name(data.samples.dtype)} of shape {list(data.shape)}); set permuted, or a kind "
            f"of wrong labels"
        )
    channels, height, width = data.shape
    return channels, height, width


def wrong_label(data: TrainingSet, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a wrong label for each sample, with equal probability for each class that has samples: `[n]`.

    A permutation of the labels would draw the true label for one sample in T.
    """
    step = torch.randint(1, len(data.trained), indices.shape, generator=generator)
    return _shifted(data, indices, step)


def fixed(data: TrainingSet, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a wrong label for each sample, the same in every epoch: `[n]`."""
    once = keyed.generator(data.seed, "fixed negatives")
    return wrong_label(data, torch.arange(len(data.labels)), once)[indices]


def all_wrong(data: TrainingSet, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Returns all wrong labels of each sample, of the T classes that have samples: `[n, T - 1]`."""
    return _shifted(data, indices.unsqueeze(1), torch.arange(1, len(data.trained)))


def _shifted(data: TrainingSet, indices: Tensor, step: Tensor) -> Tensor:
    """Returns the class that is `step` after that of each sample, among the classes that have samples."""
    trained = data.trained
    return trained[(torch.searchsorted(trained, data.labels[indices]) + step) % len(trained)]


def hybrid(
    data: TrainingSet, indices: Tensor, generator: torch.Generator, *, blurs: int = 6, threshold: float = 0.5
) -> Tensor:
    """Mixes each image with one of another class, by a mask of large blobs (Hinton 2022, section 3.2): `[n, D]`.

    A mask is a random binary image that is blurred with [1/4, 1/2, 1/4] in both directions, and then thresholded: where
    it is 1, the negative shows the image, and elsewhere the other one. Each image has its own mask, which is the same
    for all channels. Beyond the border, the pixels of the border are repeated.

    Args:
        data: The training set.
        indices: Training samples that need a negative `[n]`.
        generator: Source of masks and of the other images.
        blurs: Number of blurs; more blurs make larger blobs.
        threshold: Threshold of the blurred mask, whose mean is 1/2, in (0, 1).

    Raises:
        NegativesError: An option is out of its range, or the samples are not images.
    """
    if type(blurs) is not int or blurs < 0:
        raise NegativesError(f"blurs must be an integer that is at least 0 (blurs: {blurs!r})")
    if not isinstance(threshold, float) or not 0 < threshold < 1:
        raise NegativesError(f"threshold must be between 0 and 1 (threshold: {threshold!r})")
    channels, height, width = _image_shape(data)
    drawn = torch.empty(-(-len(indices) * height * width // 8), dtype=torch.uint8).random_(0, 256, generator=generator)
    bits = drawn.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten()
    bits = bits[: len(indices) * height * width].view(-1, height, width).float()
    blurred = _blur(height, blurs) @ (bits @ _blur(width, blurs).t())
    mask = (blurred > threshold).flatten(1).repeat(1, channels)
    return torch.where(mask, data.samples[indices], data.samples[_partners(data, indices, generator)])


def _blur(size: int, times: int) -> Tensor:
    """Returns the matrix of all blurs along one side `[size, size]`, whose rows sum to 1."""
    once = (torch.eye(size) * 2 + torch.ones(size - 1).diag(1) + torch.ones(size - 1).diag(-1)) / 4
    once[0, 0] += 0.25
    once[-1, -1] += 0.25
    blurred: Tensor = torch.linalg.matrix_power(once, times)
    return blurred


def _partners(data: TrainingSet, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a sample of another class for each sample, with equal probabilities `[n]`."""
    by_class = data.labels.sort(stable=True).indices
    sizes = torch.bincount(data.labels, minlength=data.classes)
    size, start = sizes[data.labels[indices]], (sizes.cumsum(0) - sizes)[data.labels[indices]]
    others = len(data.labels) - size
    place = (torch.rand(indices.shape, generator=generator, dtype=torch.float64) * others).long()
    return by_class[torch.where(place < start, place, place + size)]


def mixed(data: TrainingSet, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Averages each image with another one of any class (Chen et al. 2024, self-contrastive forward-forward): `[n, D]`.

    It uses no labels.

    Raises:
        NegativesError: The samples are not images, or there is only one.
    """
    _image_shape(data)
    if len(data.samples) < 2:
        raise NegativesError("needs at least two samples (samples: 1)")
    step = torch.randint(1, len(data.samples), indices.shape, generator=generator)
    others = data.samples[(indices + step) % len(data.samples)]
    return ((data.samples[indices].to(torch.int16) + others) // 2).to(torch.uint8)


def noise(data: TrainingSet, indices: Tensor, generator: torch.Generator, *, distribution: str = "uniform") -> Tensor:
    """Draws images of noise `[n, D]`.

    Args:
        data: The training set.
        indices: Training samples that need a negative `[n]`.
        generator: Source of the noise.
        distribution: `uniform` from 0 to 255, or `normal` with the mean and standard deviation of the pixels.

    Raises:
        NegativesError: It is another distribution, or the samples are not images.
    """
    _image_shape(data)
    shape = (len(indices), data.samples.shape[1])
    if distribution == "uniform":
        return torch.empty(shape, dtype=torch.uint8).random_(0, 256, generator=generator)
    if distribution != "normal":
        raise NegativesError(f"distribution must be uniform or normal (distribution: {distribution!r})")
    pixels = data.samples
    if len(pixels) > MAX_NOISE_SAMPLES:  # not the first ones, which may be of one class
        order = torch.randperm(len(pixels), generator=keyed.generator(data.seed, "noise"))
        pixels = pixels[order[:MAX_NOISE_SAMPLES]]
    pixels = pixels.to(torch.int32)  # the sums of integers do not depend on the number of threads
    mean = pixels.sum().item() / pixels.numel()
    deviation = math.sqrt(pixels.square().sum().item() / pixels.numel() - mean**2)
    values = torch.randn(shape, generator=generator) * deviation + mean
    return values.round_().clamp_(0, 255).to(torch.uint8)


def permuted(data: TrainingSet, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Takes each value from another random training sample: `[n, D]`.

    The distribution of each value stays the same; the dependence between values is lost.
    """
    shape = (len(indices), data.samples.shape[1])
    return data.samples.gather(0, torch.randint(len(data.samples), shape, generator=generator))


KINDS: dict[str, Callable[..., Tensor]] = {
    "wrong_label": wrong_label,
    "fixed": fixed,
    "hard_label": wrong_label,  # until labels drawn by the readout arrive, see `HardLabels`
    "all_wrong": all_wrong,
    "hybrid": hybrid,
    "mixed": mixed,
    "noise": noise,
    "permuted": permuted,
}
"""Kinds of negatives, by the name in `negatives.kind`."""


def find_kind(name: str, options: dict[str, Any]) -> "partial[Tensor]":
    """Returns a kind with its options, by its name in `KINDS` or as `package.module:function`.

    Raises:
        NegativesError: There is no such kind, or an option is unknown or missing.
    """
    function = KINDS.get(name) or _import(name)
    parameters = list(inspect.signature(function).parameters.values())[3:]
    known = {
        parameter.name: parameter.default for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD
    }
    unknown = sorted(set(options) - set(known)) if len(known) == len(parameters) else []
    if unknown:
        raise NegativesError(f"takes no option {', '.join(unknown)} (its options: {', '.join(known) or 'none'})")
    settings = known | options
    missing = [name for name, value in settings.items() if value is inspect.Parameter.empty]
    if missing:
        raise NegativesError(f"needs the option {', '.join(missing)}; set it in negatives.options")
    return partial(function, **settings)


def source_sha256(kind: "partial[Tensor]") -> str | None:
    """Returns the SHA-256 digest of the source file of a custom kind, which may change; None for those in `KINDS`."""
    if kind.func in KINDS.values():
        return None
    file = inspect.getsourcefile(kind.func)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def _import(name: str) -> Callable[..., Tensor]:
    if ":" not in name:
        raise NegativesError(f"is none of {', '.join(KINDS)}, nor package.module:function")
    try:
        kind: Callable[..., Tensor] = import_custom(name)
        inspect.signature(kind)
    except Exception as error:  # a custom module may raise anything
        raise NegativesError(f"cannot be imported as a function ({type(error).__name__}: {error})") from error
    return kind


def make_checked(
    kind: "partial[Tensor]", data: TrainingSet, indices: Tensor, generator: torch.Generator, *, labels_shown: bool
) -> Tensor:
    """Returns the negatives of a kind, and checks its contract.

    Raises:
        NegativesError: It raised an error, or returned something invalid.
    """
    try:
        negatives = kind(data, indices, generator)
    except NegativesError:
        raise
    except Exception as error:  # a custom function may raise anything
        raise NegativesError(f"raised {type(error).__name__}: {error}") from error
    if not isinstance(negatives, Tensor):
        raise NegativesError(f"must return a tensor (returned: {type(negatives).__name__})")
    count, dtype = len(indices), data.samples.dtype
    are_samples = negatives.dtype == dtype and negatives.shape == (count, data.samples.shape[1])
    is_label_shape = negatives.dim() in (1, 2) and len(negatives) == count and negatives.numel() > 0
    are_labels = negatives.dtype == torch.int64 and is_label_shape
    if not are_samples and not are_labels:
        raise NegativesError(
            f"must return labels [n] or [n, M], int64, or samples [n, {data.samples.shape[1]}], {_name(dtype)} "
            f"(n: {count}, returned: {list(negatives.shape)}, {_name(negatives.dtype)})"
        )
    if are_labels and not labels_shown:
        raise NegativesError(
            "shows wrong labels, but data.label=none shows no labels; set hybrid, mixed, noise or permuted, or "
            "data.label"
        )
    true = data.labels[indices].view(-1, *[1] * (negatives.dim() - 1))
    if are_labels and not ((negatives >= 0) & (negatives < data.classes) & (negatives != true)).all():
        raise NegativesError(f"must return wrong labels, from 0 to {data.classes - 1}")
    return negatives


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw_wrong_labels(
    logits: Tensor, labels: Tensor, generator: torch.Generator, untrained: Sequence[int] = ()
) -> Tensor:
    """Draws a wrong label for each sample that a classifier considers likely (Hinton 2022, section 3.3).

    Args:
        logits: `[B, C]`.
        labels: True labels `[B]`, which are never drawn.
        generator: Source of the draws.
        untrained: Classes without training samples, which are never drawn.

    Returns:
        Labels `[B]`, int64, from the softmax over the wrong classes.
    """
    possible = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    possible[:, list(untrained)] = -torch.inf
    wrong = possible.softmax(1).nan_to_num(1.0)  # a run with NaNs is stopped elsewhere
    return torch.multinomial(wrong, 1, generator=generator).squeeze(1)
