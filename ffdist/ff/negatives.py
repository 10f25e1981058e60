"""Negative data: what stands against each positive sample.

A kind is a function `kind(data, samples, draw, **options)`. It is asked for the negatives of `samples` `[n]`, indices
into the training set, and takes every random number from `draw`, a generator that is fresh for the request. It returns

- labels `[n]`, int64: the negative is the sample's own image under that label, or
- labels `[n, M]`, int64: M negatives a sample, each of which weighs a share of one, or
- images `[n, D]`, uint8: the negative is that image, under the sample's own label where labels are shown.

Anybody's own kind is named `package.module:function` and keeps the same contract; what it gets in `data` and `samples`
is shared, and must not be written to.
"""

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.ff.keyed import generator

COUNTED = 10_000
"""Images that the mean and deviation of normal noise are computed from."""


class TrainingSet(NamedTuple):
    """What negatives are made from."""

    images: Tensor
    """uint8 `[N, D]`, channel after channel, row after row."""
    labels: Tensor
    """int64 `[N]`, in [0, classes)."""
    classes: int
    """Number of classes; some may have no sample here."""
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    seed: int
    """The run's, for draws that are the same in every epoch."""

    @property
    def trained(self) -> Tensor:
        """The classes that have samples, ascending `[T]`; a label of another would be told from them by itself."""
        return torch.bincount(self.labels, minlength=self.classes).nonzero().flatten()


class NegativesError(ValueError):
    """Negatives that cannot be made, or cannot be used; the text says why."""


def wrong_label(data: TrainingSet, samples: Tensor, draw: torch.Generator) -> Tensor:
    """Draws a wrong class for every sample, each of the T - 1 that have samples equally likely: `[n]`.

    Shuffling the labels would show the true one in a case of T.
    """
    step = torch.randint(1, len(data.trained), samples.shape, generator=draw)
    return _shifted(data, samples, step)


def fixed(data: TrainingSet, samples: Tensor, draw: torch.Generator) -> Tensor:
    """Returns a wrong class for every sample, drawn once and the same in every epoch: `[n]`."""
    once = generator(data.seed, "fixed negatives")
    return wrong_label(data, torch.arange(len(data.labels)), once)[samples]


def all_wrong(data: TrainingSet, samples: Tensor, draw: torch.Generator) -> Tensor:
    """Returns every wrong class of every sample, of the T that have samples: `[n, T - 1]`."""
    return _shifted(data, samples.unsqueeze(1), torch.arange(1, len(data.trained)))


def _shifted(data: TrainingSet, samples: Tensor, step: Tensor) -> Tensor:
    """Returns the class that is `step` after each sample's, of those that have samples."""
    trained = data.trained
    return trained[(torch.searchsorted(trained, data.labels[samples]) + step) % len(trained)]


def hybrid(
    data: TrainingSet, samples: Tensor, draw: torch.Generator, *, blurs: int = 6, threshold: float = 0.5
) -> Tensor:
    """Mixes every sample with one of another class, by a mask of large blobs (Hinton 2022, section 3.2): `[n, D]`.

    A mask is a random bit image, blurred with [1/4, 1/2, 1/4] in both directions and then cut at a threshold: 1 where
    the sample's own image shows, 0 where its partner's does. Every sample has a mask of its own, the same for all
    channels. At the border the outermost bit stands for what lies beyond it.

    Args:
        data: The training set.
        samples: Whose negatives `[n]`.
        draw: Source of masks and partners.
        blurs: Times that the bits are blurred; more make larger blobs.
        threshold: Where the blurred bits, whose mean is 1/2, are cut; in (0, 1).

    Raises:
        NegativesError: An option is out of its range.
    """
    if type(blurs) is not int or blurs < 0:
        raise NegativesError(f"blurs must be a whole number from 0 on (blurs: {blurs!r})")
    if not isinstance(threshold, float) or not 0 < threshold < 1:
        raise NegativesError(f"threshold must lie between 0 and 1 (threshold: {threshold!r})")
    _, height, width = data.shape
    drawn = torch.empty(-(-len(samples) * height * width // 8), dtype=torch.uint8).random_(0, 256, generator=draw)
    bits = drawn.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten()
    bits = bits[: len(samples) * height * width].view(-1, height, width).float()
    blurred = _blur(height, blurs) @ (bits @ _blur(width, blurs).t())
    mask = (blurred > threshold).flatten(1).repeat(1, data.shape[0])
    return torch.where(mask, data.images[samples], data.images[_partners(data, samples, draw)])


def _blur(size: int, times: int) -> Tensor:
    """Returns the matrix of all blurs along one side `[size, size]`; every row sums to 1."""
    once = (torch.eye(size) * 2 + torch.ones(size - 1).diag(1) + torch.ones(size - 1).diag(-1)) / 4
    once[0, 0] += 0.25
    once[-1, -1] += 0.25
    blurred: Tensor = torch.linalg.matrix_power(once, times)
    return blurred


def _partners(data: TrainingSet, samples: Tensor, draw: torch.Generator) -> Tensor:
    """Draws for every sample one of another class, each equally likely `[n]`."""
    by_class = data.labels.sort(stable=True).indices
    sizes = torch.bincount(data.labels, minlength=data.classes)
    size, start = sizes[data.labels[samples]], (sizes.cumsum(0) - sizes)[data.labels[samples]]
    others = len(data.labels) - size
    place = (torch.rand(samples.shape, generator=draw, dtype=torch.float64) * others).long()
    return by_class[torch.where(place < start, place, place + size)]


def noise(data: TrainingSet, samples: Tensor, draw: torch.Generator, *, distribution: str = "uniform") -> Tensor:
    """Draws images of noise `[n, D]`: `uniform` over 0 to 255, or `normal` with the data's mean and deviation.

    Raises:
        NegativesError: Another distribution is asked for.
    """
    shape = (len(samples), data.images.shape[1])
    if distribution == "uniform":
        return torch.empty(shape, dtype=torch.uint8).random_(0, 256, generator=draw)
    if distribution == "normal":
        some = data.images
        if len(some) > COUNTED:  # not the first ones, which may be of one class
            some = some[torch.randperm(len(some), generator=generator(data.seed, "noise"))[:COUNTED]]
        some = some.to(torch.int32)  # whole numbers: their sums do not depend on torch's threads
        mean = some.sum().item() / some.numel()
        deviation = math.sqrt(some.square().sum().item() / some.numel() - mean**2)
        return (torch.randn(shape, generator=draw) * deviation + mean).round_().clamp_(0, 255).to(torch.uint8)
    raise NegativesError(f"distribution must be uniform or normal (distribution: {distribution!r})")


def permuted(data: TrainingSet, samples: Tensor, draw: torch.Generator) -> Tensor:
    """Takes every pixel from an image of its own, drawn from the whole training set: `[n, D]`.

    What one pixel shows stays as likely as it was; what pixels have to do with each other is lost.
    """
    shape = (len(samples), data.images.shape[1])
    return data.images.gather(0, torch.randint(len(data.images), shape, generator=draw))


KINDS: dict[str, Callable[..., Tensor]] = {
    "wrong_label": wrong_label,
    "fixed": fixed,
    "hard_label": wrong_label,  # until the readout's draws come in, see `HardLabels`
    "all_wrong": all_wrong,
    "hybrid": hybrid,
    "noise": noise,
    "permuted": permuted,
}
"""Kinds of negatives, by the name that `negatives.kind` gives."""


def find_kind(name: str, options: dict[str, Any]) -> "partial[Tensor]":
    """Returns the kind of a name in `KINDS`, or a user's own by `package.module:function`, with all its options set.

    Raises:
        NegativesError: There is none, or it does not take an option, or needs one.
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
    """Digests the file of a user's own kind, which may change under its name; None for those that are given here."""
    if kind.func in KINDS.values():
        return None
    file = inspect.getsourcefile(kind.func)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def _import(name: str) -> Callable[..., Tensor]:
    module, colon, function = name.partition(":")
    if not colon:
        raise NegativesError(f"is none of {', '.join(KINDS)}, nor package.module:function")
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.append(folder)  # after installed packages, which files of the same name must not replace
    try:
        found: Callable[..., Tensor] = getattr(import_module(module), function)
        inspect.signature(found)
    except Exception as error:  # whatever a module of one's own may raise
        raise NegativesError(f"cannot be imported as a function ({type(error).__name__}: {error})") from error
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
    return found


def make_checked(
    kind: "partial[Tensor]", data: TrainingSet, samples: Tensor, draw: torch.Generator, *, labels_shown: bool
) -> Tensor:
    """Returns what a kind makes, and holds it to its contract.

    Raises:
        NegativesError: It raised something, or what it returned is of no use; the text says why.
    """
    try:
        made = kind(data, samples, draw)
    except NegativesError:
        raise
    except Exception as error:  # whatever a function of one's own may raise
        raise NegativesError(f"raised {type(error).__name__}: {error}") from error
    if not isinstance(made, Tensor):
        raise NegativesError(f"must return a tensor, as its contract says (returned: {type(made).__name__})")
    images = made.dtype == torch.uint8 and made.shape == (len(samples), data.images.shape[1])
    labels = made.dtype == torch.int64 and made.dim() in (1, 2) and len(made) == len(samples) and made.numel()
    if not images and not labels:
        raise NegativesError(
            f"must return labels [n] or [n, M], int64, or images [n, {data.images.shape[1]}], uint8 "
            f"(n: {len(samples)}, returned: {list(made.shape)}, {str(made.dtype).removeprefix('torch.')})"
        )
    if labels and not labels_shown:
        raise NegativesError(
            "shows wrong labels and data.label=none shows none; set hybrid, noise or permuted, or data.label"
        )
    true = data.labels[samples].view(-1, *[1] * (made.dim() - 1))
    if labels and not ((made >= 0) & (made < data.classes) & (made != true)).all():
        raise NegativesError(f"must return wrong labels, from 0 to below {data.classes}")
    return made


def draw_wrong_labels(logits: Tensor, labels: Tensor, draw: torch.Generator, untrained: Sequence[int] = ()) -> Tensor:
    """Draws each sample's wrong label from what a classifier takes it for (Hinton 2022, section 3.3).

    Args:
        logits: `[B, C]`.
        labels: True labels `[B]`, which are never drawn.
        draw: Source of the draws.
        untrained: Classes without training samples, which are never drawn either.

    Returns:
        Labels `[B]`, int64, from the softmax over the wrong classes.
    """
    possible = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    possible[:, list(untrained)] = -torch.inf
    wrong = possible.softmax(1).nan_to_num(1.0)  # a run that has NaNs is stopped elsewhere
    return torch.multinomial(wrong, 1, generator=draw).squeeze(1)
