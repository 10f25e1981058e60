"""Bytes and labels in: every dataset becomes uint8 images `[N, D]` and int64 labels `[N]` per split."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffdist.config import ConfigError
from ffdist.data import order
from ffdist.data.files import and_skipped
from ffdist.data.splits import Origin, Splits, read_image_folder, read_parquet
from ffdist.sections import Data

DIGITS_TEST_SAMPLES = 360
"""A fifth of scikit-learn's digits, which come without a test set; always the same."""

XOR_REPEATS = 250
"""Times that each of the four cases of XOR is in its training set."""

MOVED_BYTES = 2**24
"""Images that are moved together; they are copied on the way."""
SHOWN = 10
"""Class names that one line has room for."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels by split: `train`, `validation` (may be empty) and `test`."""

    images: dict[str, Tensor]
    """uint8 `[N, D]`, channel after channel, row after row."""
    labels: dict[str, Tensor]
    """int64 `[N]`, in [0, classes)."""
    classes: int
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    names: tuple[str, ...] = ()
    """Of the classes, where they have some; one without samples goes by its number."""
    name: str = ""
    """`data.name` of the configuration."""
    origin: Origin = Origin()  # noqa: RUF009, immutable
    """Where it was read from."""
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def untrained(self) -> tuple[int, ...]:
        """Classes without training samples."""
        return _classes_without_samples(self.labels["train"], self.classes)

    def sha256(self, split: str) -> str:
        """Digests the images and labels of a split."""
        if split not in self._digests:
            digest = hashlib.sha256(f"{self.shape} {self.classes}".encode())
            for tensor in (self.images[split], self.labels[split]):
                digest.update(tensor.contiguous().view(-1).numpy().data)
            self._digests[split] = digest.hexdigest()
        return self._digests[split]

    @property
    def facts(self) -> dict[str, Any]:
        """What was read, for the summary of a run."""
        channels, height, width = self.shape
        return {
            "name": self.name,
            "files": dict(self.origin.files),
            "columns": dict(self.origin.columns),
            "height": height,
            "width": width,
            "channels": channels,
            "samples": {split: len(labels) for split, labels in self.labels.items()},
            "classes": self.classes,
            "classes_without_samples": {
                split: list(_classes_without_samples(self.labels[split], self.classes)) for split in ("train", "test")
            },
            "skipped": {reason: dict(names) for reason, names in self.origin.skipped.items()},
            "notes": list(self.origin.notes),
        }

    def in_words(self) -> str:
        """Returns the same in one line."""
        facts, parts = self.facts, [self.name]
        if facts["files"]:
            parts.append(_counts(facts["files"], "files"))
        if facts["columns"]:
            parts.append(f"images in column {facts['columns']['image']}, labels in column {facts['columns']['label']}")
        channels, height, width = self.shape
        parts.append(_counts(facts["samples"], "samples"))
        parts.append(f"{height} x {width} pixels, {channels} channel{'s' * (channels > 1)}")
        parts.append(f"{self.classes} classes{': ' * bool(self.names)}{_listed(self.names)}")
        for split, words in (("train", "training"), ("test", "test")):
            if empty := facts["classes_without_samples"][split]:
                named = _listed([self.names[number] if self.names else str(number) for number in empty])
                parts.append(f"classes without {words} samples: {len(empty)} of {self.classes} ({named})")
        unknown = torch.isin(self.labels["test"], torch.tensor(self.untrained, dtype=torch.int64)).sum().item()
        if unknown:
            parts.append(f"test samples of classes without training samples, which count as wrong: {unknown:,}")
        text = "; ".join([*parts, *self.origin.notes]) + and_skipped(self.origin.skipped)
        return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def load_dataset(config: Data, *, seed: int, validation_samples: int) -> Dataset:
    """Reads a dataset whole and checks it.

    Args:
        config: Which one, and from where.
        seed: Decides which training samples are held out.
        validation_samples: How many are.

    Raises:
        ConfigError: It is missing, damaged or does not fit together; the text names file, row and rule.
    """
    readers = {"xor": _xor, "digits": _digits, "parquet": read_parquet, "image_folder": read_image_folder}
    images, labels, names, origin = readers.get(config.name, _torchvision)(config)
    samples = len(labels["train"])
    if validation_samples >= samples:
        raise ConfigError(
            f"training.validation_samples must leave something to train on "
            f"(validation_samples: {validation_samples}, training samples: {samples})"
        )
    classes = config.classes or len(names) or int(labels["train"].max()) + 1
    channels, height, width = images["train"].shape[1:]
    _check_shape(config, classes, channels, height, width)
    train, validation = _hold_out(images.pop("train").flatten(1), labels["train"], seed, validation_samples)
    dataset = Dataset(
        {"train": train[0], "validation": validation[0], "test": images.pop("test").flatten(1)},
        {"train": train[1], "validation": validation[1], "test": labels["test"]},
        classes,
        (channels, height, width),
        tuple(names and [*names, *map(str, range(len(names), classes))][:classes]),
        config.name,
        origin,
    )
    if (trained := classes - len(dataset.untrained)) < 2:
        raise ConfigError(
            f"training needs samples of at least two classes (data: {config.path or config.name}, classes with "
            f"training samples: {trained}){and_skipped(origin.skipped)}"
        )
    return dataset


def _check_shape(config: Data, classes: int, channels: int, height: int, width: int) -> None:
    if config.label == "overwrite" and classes >= channels * height * width:
        raise ConfigError(
            f"data.label=overwrite puts {classes} label values in place of the first pixels, and an image has only "
            f"{channels * height * width}; set data.label to append"
        )
    if config.jitter >= min(height, width):
        raise ConfigError(
            f"data.jitter must be smaller than the images (jitter: {config.jitter}, images: {height} x {width}); a "
            f"larger shift leaves nothing of them"
        )


def _hold_out(
    images: Tensor, labels: Tensor, seed: int, held_out: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Parts a training set in two. Its images are moved within their own memory, because a copy would double it."""
    rest, validation = order.split(seed, len(labels), held_out)
    taken = images[validation], labels[validation]
    count = max(1, MOVED_BYTES // images[0].nbytes)
    if held_out:
        for start in range(0, len(rest), count):  # `rest` ascends: nothing is written over before it is read
            rows = rest[start : start + count]
            images[start : start + len(rows)] = images[rows]
    return (images[: len(rest)], labels[rest]), taken


def _classes_without_samples(labels: Tensor, classes: int) -> tuple[int, ...]:
    return tuple((torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist())


def _counts(numbers: dict[str, int], what: str) -> str:
    return f"{what}: {', '.join(f'{number:,} {split}' for split, number in numbers.items())}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def _xor(config: Data) -> Splits:
    images = torch.tensor([[0, 0], [0, 255], [255, 0], [255, 255]], dtype=torch.uint8).view(4, 1, 1, 2)
    labels = torch.tensor([0, 1, 1, 0])
    return Splits(
        {"train": images.repeat(XOR_REPEATS, 1, 1, 1), "test": images},
        {"train": labels.repeat(XOR_REPEATS), "test": labels},
    )


def _digits(config: Data) -> Splits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=DIGITS_TEST_SAMPLES, stratify=labels, random_state=0)
    return Splits({"train": images[train], "test": images[test]}, {"train": labels[train], "test": labels[test]})


def _torchvision(config: Data) -> Splits:
    from torchvision import datasets  # takes a second, and only these need it

    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[config.name]
    root = config.root or _default_root()
    images, labels = {}, {}
    for split in ("train", "test"):
        try:
            dataset = kind(str(root), train=split == "train", download=True)  # found files are not fetched again
        except (OSError, RuntimeError, ValueError, AssertionError, HTTPException) as error:
            raise ConfigError(
                f"{config.name} is not in {root} in torchvision's layout and could not be downloaded there "
                f"({' '.join(str(error).split())[:200]}); set data.root or FFDIST_DATA to a folder that has it "
                f"({kind.__name__}/raw/... for MNIST's kind), or run once where there is a network"
            ) from error
        pixels = torch.as_tensor(dataset.data)
        images[split] = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        labels[split] = torch.as_tensor(dataset.targets)
    return Splits(images, labels)


def _default_root() -> Path:
    if root := os.environ.get("FFDIST_DATA"):
        return Path(root)
    try:
        return Path.home() / ".cache" / "ffdist"
    except RuntimeError as error:  # such as a container's user that has no entry in passwd
        raise ConfigError(f"the home folder is unknown ({error}); set HOME, data.root or FFDIST_DATA") from error
