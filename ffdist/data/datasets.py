"""Loading of datasets as samples `[N, D]` and int64 labels `[N]` per split."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ffdist.config.architecture import build_encoder
from ffdist.config.sections import ARRAYS, Data
from ffdist.data import order
from ffdist.data.arrays import call_function, read_given, read_npz
from ffdist.data.huggingface import read_huggingface
from ffdist.data.listing import skip_suffix
from ffdist.data.readers import Origin, Splits, read_csv, read_image_folder, read_parquet
from ffdist.errors import ConfigError
from ffdist.ff.encoders import ENCODERS, Encoder

DIGITS_TEST_SAMPLES = 360
"""Size of the fixed test set: a fifth of scikit-learn's digits, which have no test set of their own."""

BREAST_CANCER_TEST_SAMPLES = 114
"""Size of the fixed test set: a fifth."""

COVERTYPE_SPLITS = {"train": slice(11_340), "validation": slice(11_340, 15_120), "test": slice(15_120, None)}
"""Rows of the splits of covertype that its authors used and published."""

COVERTYPE_NAMES = (
    *("Spruce/Fir", "Lodgepole Pine", "Ponderosa Pine", "Cottonwood/Willow"),
    *("Aspen", "Douglas-fir", "Krummholz"),
)
"""Names of the classes 1 to 7 of covertype."""

XOR_REPEATS = 250
"""Number of copies of each of the four XOR cases in the training set."""

COPY_BYTES = 2**24
"""Size of the temporary buffer for moving training samples in memory."""
MIN_VALIDATION, MAX_VALIDATION = 100, 10_000
"""Limits of the number of samples that are held out by default; fewer would say little."""
MAX_LISTED_CLASSES = 10
"""Maximum number of class names in a one-line description."""


@dataclass(frozen=True)
class Dataset:
    """Samples and labels by split: `train`, `validation` (may be empty) and `test`."""

    samples: dict[str, Tensor]
    """Samples `[N, D]`, of the encoder's type; of images uint8, ordered by channel, row and column."""
    labels: dict[str, Tensor]
    """int64 `[N]`, in [0, classes)."""
    encoder: Encoder
    """Turns samples into input rows."""
    names: tuple[str, ...] = ()
    """Class names, or empty if the dataset has none. A class beyond the named ones is named by its number."""
    name: str = ""
    """`data.name` of the configuration."""
    origin: Origin = Origin()  # noqa: RUF009, immutable
    """Files and columns that the dataset was read from."""
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample; of an image, channels, height and width."""
        return self.encoder.shape

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.encoder.classes

    @cached_property
    def untrained(self) -> tuple[int, ...]:
        """Classes without training samples."""
        return _classes_without_samples(self.labels["train"], self.classes)

    def sha256(self, split: str) -> str:
        """Returns the SHA-256 digest of the samples and labels of a split, in hexadecimal."""
        if split not in self._digests:
            digest = hashlib.sha256(f"{self.shape} {self.classes}".encode())
            for tensor in (self.samples[split], self.labels[split]):
                digest.update(tensor.contiguous().view(-1).numpy().data)
            self._digests[split] = digest.hexdigest()
        return self._digests[split]

    @property
    def facts(self) -> dict[str, Any]:
        """Description of the dataset as JSON data, for the summary of a run."""
        return {
            "name": self.name,
            "files": dict(self.origin.files),
            "columns": dict(self.origin.columns),
            "features": list(self.origin.features),
            "shape": list(self.shape),
            "samples": {split: len(labels) for split, labels in self.labels.items()},
            "classes": self.classes,
            "classes_without_samples": {
                split: list(_classes_without_samples(self.labels[split], self.classes)) for split in ("train", "test")
            },
            "skipped": {reason: dict(names) for reason, names in self.origin.skipped.items()},
            "notes": list(self.origin.notes),
        }

    def describe(self) -> str:
        """Returns `facts` as one line of text."""
        facts, parts = self.facts, [self.name]
        if facts["files"]:
            parts.append(_format_counts(facts["files"], "files"))
        if columns := facts["columns"]:
            images = f"images in column {columns['image']}, " if "image" in columns else ""
            parts.append(f"{images}labels in column {columns['label']}")
        parts.append(_format_counts(facts["samples"], "samples"))
        parts.append(self.encoder.describe())
        parts.append(f"{self.classes} classes{': ' * bool(self.names)}{_join(self.names)}")
        for split, adjective in (("train", "training"), ("test", "test")):
            if empty := facts["classes_without_samples"][split]:
                names = _join([self.names[number] if self.names else str(number) for number in empty])
                parts.append(f"classes without {adjective} samples: {len(empty)} of {self.classes} ({names})")
        num_unknown = torch.isin(self.labels["test"], torch.tensor(self.untrained, dtype=torch.int64)).sum().item()
        if num_unknown:
            parts.append(f"test samples of classes without training samples, which count as wrong: {num_unknown:,}")
        text = "; ".join([*parts, *self.origin.notes]) + skip_suffix(self.origin.skipped)
        return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def load_dataset(
    config: Data,
    *,
    seed: int,
    validation_samples: int | Literal["auto"],
    data: Any = None,
    may_import: bool = False,
) -> Dataset:
    """Reads a dataset into memory and validates it.

    Args:
        config: Name, location and options of the dataset.
        seed: Seed of the random split into training and validation samples.
        validation_samples: Number of training samples to hold out for validation; `auto`: the data's own validation
            split, else a tenth of the training samples, at most 10,000, or none if that would be fewer than 100.
        data: Samples that are given in Python, in a form that `train` takes; by default, `config` names the dataset.
        may_import: Whether the configuration is the user's own, and not only found in the folder of a run or store.
            Such a folder must not cause imports, downloads from the Hub or the loading of pickles.

    Raises:
        ConfigError: The dataset is missing, damaged or inconsistent. The message names the file, row and rule.
    """
    splits = read_given(data, config, seed=seed) if data is not None else _read(config, seed, may_import=may_import)
    shape = splits.samples["train"].shape[1:]
    names, classes = splits.names, config.classes or len(splits.names) or int(splits.labels["train"].max()) + 1
    if "validation" in splits.samples and validation_samples == 0:
        note = "the data's own validation split is not used, because of training.validation_samples=0"
        splits = splits._replace(origin=splits.origin._replace(notes=(*splits.origin.notes, note)))
    samples, labels = _with_validation(splits, seed, validation_samples)
    settings = {**splits.encoder_settings, **ENCODERS[splits.encoder].fit(samples["train"], shape, config.model_dump())}
    dataset = Dataset(
        samples,
        labels,
        build_encoder(config, splits.encoder, shape, classes, **settings),
        tuple(names and [*names, *map(str, range(len(names), classes))][:classes]),
        config.name,
        splits.origin,
    )
    if (num_trained := classes - len(dataset.untrained)) < 2:
        raise ConfigError(
            f"training needs samples of at least two classes (data: {config.path or config.name}, classes with "
            f"training samples: {num_trained}){skip_suffix(splits.origin.skipped)}"
        )
    return dataset


def _read(config: Data, seed: int, *, may_import: bool) -> Splits:
    """Reads the dataset that a configuration names."""
    if config.name == ARRAYS:
        raise ConfigError(
            "data.name=arrays stands for samples that are given in Python, and no file has them: use train(..., "
            "data=...), resume(RUN, data=...) or, for a finished run, run.evaluate(samples, labels)"
        )
    if not may_import and not config.is_loadable:
        raise ConfigError(
            f"the folder of a run or a store must not cause imports, downloads from the Hub or the loading of pickles "
            f"(data.name: {config.name}); use run.evaluate(samples, labels), or name a file or folder of samples"
        )
    if config.is_function:
        return read_given(call_function(config, seed=seed), config, seed=seed)
    return READERS.get(config.name, _torchvision)(config)


def _with_validation(
    splits: Splits, seed: int, validation_samples: int | Literal["auto"]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns samples `[N, D]` and labels of all splits: with the data's own validation split, or one held out.

    The samples of `splits` are moved, because a copy would double their memory.
    """
    samples = {split: splits.samples.pop(split).flatten(1) for split in list(splits.samples)}
    labels, num_samples = splits.labels, len(splits.labels["train"])
    if validation_samples == 0:
        samples.pop("validation", None)
    if "validation" in samples:
        if validation_samples != "auto":
            raise ConfigError(
                f"the data has its own validation split ({len(labels['validation']):,} samples), so no training "
                f"samples are held out (training.validation_samples: {validation_samples}); leave it out"
            )
        order_of_splits = ("train", "validation", "test")
        return {split: samples[split] for split in order_of_splits}, {split: labels[split] for split in order_of_splits}
    num_validation = _default_validation(num_samples) if validation_samples == "auto" else validation_samples
    if num_validation >= num_samples:
        raise ConfigError(
            f"training.validation_samples must be smaller than the training set "
            f"(validation_samples: {validation_samples}, training samples: {num_samples})"
        )
    train, validation = _hold_out(samples["train"], labels["train"], seed, num_validation)
    return (
        {"train": train[0], "validation": validation[0], "test": samples["test"]},
        {"train": train[1], "validation": validation[1], "test": labels["test"]},
    )


def _default_validation(num_samples: int) -> int:
    """Returns the number of training samples that are held out by default."""
    tenth = num_samples // 10
    return min(tenth, MAX_VALIDATION) if tenth >= MIN_VALIDATION else 0


def _hold_out(
    samples: Tensor, labels: Tensor, seed: int, num_validation: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Splits a training set in two. Compacts it in place, because a copy would double its memory."""
    train, validation = order.split(seed, len(labels), num_validation)
    validation_set = samples[validation], labels[validation]
    num_rows = max(1, COPY_BYTES // samples[0].nbytes)
    if num_validation:
        for start in range(0, len(train), num_rows):  # `train` is sorted: no row is overwritten before it is read
            rows = train[start : start + num_rows]
            samples[start : start + len(rows)] = samples[rows]
    return (samples[: len(train)], labels[train]), validation_set


def _classes_without_samples(labels: Tensor, classes: int) -> tuple[int, ...]:
    return tuple((torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist())


def _format_counts(counts: dict[str, int], unit: str) -> str:
    return f"{unit}: {', '.join(f'{count:,} {split}' for split, count in counts.items())}"


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_LISTED_CLASSES]) + ", ..." * (len(names) > MAX_LISTED_CLASSES)


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


def _breast_cancer(config: Data) -> Splits:
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    bunch = load_breast_cancer()
    values, labels = torch.from_numpy(bunch.data).float(), torch.from_numpy(bunch.target).to(torch.int64)
    size = BREAST_CANCER_TEST_SAMPLES
    train, test = train_test_split(range(len(labels)), test_size=size, stratify=labels, random_state=0)
    return Splits(
        {"train": values[train], "test": values[test]},
        {"train": labels[train], "test": labels[test]},
        list(map(str, bunch.target_names)),
        Origin(features=tuple(map(str, bunch.feature_names))),
        "table",
    )


def _covertype(config: Data) -> Splits:
    from sklearn.datasets import fetch_covtype

    root = config.root or _default_root()
    try:
        bunch = fetch_covtype(data_home=root)  # skips an existing file
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise ConfigError(
            f"covertype is not in {root} in scikit-learn's layout and could not be downloaded there "
            f"({' '.join(str(error).split())[:200]}); set data.root or FFDIST_DATA to a folder that contains it "
            f"(covertype/...), or run once with network access"
        ) from error
    values, labels = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target).to(torch.int64) - 1
    return Splits(
        {split: values[rows].to(torch.float32, copy=True) for split, rows in COVERTYPE_SPLITS.items()},
        {split: labels[rows] for split, rows in COVERTYPE_SPLITS.items()},
        list(COVERTYPE_NAMES),
        Origin(features=tuple(map(str, bunch.feature_names))),
        "table",
    )


def _torchvision(config: Data) -> Splits:
    from torchvision import datasets  # imported here because it takes a second

    dataset_class = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[
        config.name
    ]
    root = config.root or _default_root()
    images, labels = {}, {}
    for split in ("train", "test"):
        try:
            dataset = dataset_class(str(root), train=split == "train", download=True)  # skips existing files
        except (OSError, RuntimeError, ValueError, AssertionError, HTTPException) as error:
            raise ConfigError(
                f"{config.name} is not in {root} in torchvision's layout and could not be downloaded there "
                f"({' '.join(str(error).split())[:200]}); set data.root or FFDIST_DATA to a folder that contains it "
                f"({dataset_class.__name__}/raw/... for the MNIST family), or run once with network access"
            ) from error
        pixels = torch.as_tensor(dataset.data)
        images[split] = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        labels[split] = torch.as_tensor(dataset.targets)
    return Splits(images, labels)


READERS: dict[str, Callable[[Data], Splits]] = {
    "xor": _xor,
    "digits": _digits,
    "breast_cancer": _breast_cancer,
    "covertype": _covertype,
    "parquet": read_parquet,
    "image_folder": read_image_folder,
    "csv": read_csv,
    "npz": read_npz,
    "huggingface": read_huggingface,
}
"""Readers of datasets, by `data.name`. torchvision reads the others."""


def _default_root() -> Path:
    if root := os.environ.get("FFDIST_DATA"):
        return Path(root)
    try:
        return Path.home() / ".cache" / "ffdist"
    except RuntimeError as error:  # for example, a container's user without an entry in passwd
        raise ConfigError(f"the home folder is unknown ({error}); set HOME, data.root or FFDIST_DATA") from error
