"""Bytes and labels in: every dataset becomes uint8 images `[N, D]` and int64 labels `[N]` per split."""

import hashlib
import os
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor

from ffdist.config import ConfigError
from ffdist.data import order
from ffdist.data.images import read_image_folder, read_parquet
from ffdist.sections import Data

DIGITS_TEST_SAMPLES = 360
"""A fifth of scikit-learn's digits, which come without a test set; always the same."""

XOR_REPEATS = 250
"""Times that each of the four cases of XOR is in its training set."""


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

    def sha256(self, split: str) -> str:
        """Digests the images and labels of a split."""
        digest = hashlib.sha256(f"{self.shape} {self.classes}".encode())
        digest.update(self.images[split].numpy().tobytes())
        digest.update(self.labels[split].numpy().tobytes())
        return digest.hexdigest()


def load_dataset(config: Data, *, seed: int, validation_samples: int) -> Dataset:
    """Reads a dataset whole and checks it.

    Args:
        config: Which one, and from where.
        seed: Decides which training samples are held out.
        validation_samples: How many are.

    Raises:
        ConfigError: It is missing, damaged or does not fit together; the text names file, row and rule.
    """
    names: list[str] = []
    if config.name == "xor":
        images, labels = _xor()
    elif config.name == "digits":
        images, labels = _digits()
    elif config.name == "parquet":
        images, labels, names = read_parquet(config)
    elif config.name == "image_folder":
        images, labels, names = read_image_folder(config)
    else:
        images, labels = _torchvision(config)
    samples = len(labels["train"])
    if validation_samples >= samples:
        raise ConfigError(
            f"training.validation_samples must leave something to train on "
            f"(validation_samples: {validation_samples}, training samples: {samples})"
        )
    classes = config.classes or len(names) or int(labels["train"].max()) + 1
    if classes < 2:
        raise ConfigError(
            f"training needs samples of at least two classes (data: {config.path or config.name}, classes: 1)"
        )
    channels, height, width = images["train"].shape[1:]
    shape = (channels, height, width)
    if config.label == "overwrite" and classes >= channels * height * width:
        raise ConfigError(
            f"data.label=overwrite puts {classes} label values in place of the first pixels, and an image has only "
            f"{channels * height * width}; set data.label to append"
        )
    rest, held_out = order.split(seed, samples, validation_samples)
    index = {"train": rest, "validation": held_out}
    return Dataset(
        {name: images["train"][rows].flatten(1) for name, rows in index.items()} | {"test": images["test"].flatten(1)},
        {name: labels["train"][rows] for name, rows in index.items()} | {"test": labels["test"]},
        classes,
        shape,
        tuple(names and [*names, *map(str, range(len(names), classes))][:classes]),
    )


Splits = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Images `[N, channels, height, width]` and labels `[N]`, by split."""


def _xor() -> Splits:
    images = torch.tensor([[0, 0], [0, 255], [255, 0], [255, 255]], dtype=torch.uint8).view(4, 1, 1, 2)
    labels = torch.tensor([0, 1, 1, 0])
    return (
        {"train": images.repeat(XOR_REPEATS, 1, 1, 1), "test": images},
        {"train": labels.repeat(XOR_REPEATS), "test": labels},
    )


def _digits() -> Splits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=DIGITS_TEST_SAMPLES, stratify=labels, random_state=0)
    return {"train": images[train], "test": images[test]}, {"train": labels[train], "test": labels[test]}


def _torchvision(config: Data) -> Splits:
    from torchvision import datasets  # takes a second, and only these need it

    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[config.name]
    root = config.root or Path(os.environ.get("FFDIST_DATA") or Path.home() / ".cache" / "ffdist")
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
    return images, labels
