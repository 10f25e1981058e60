"""Readers of custom datasets: Parquet files and image folders."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from PIL import Image
from torch import Tensor

from ffdist.config.sections import MAX_CLASSES, Data
from ffdist.console import track
from ffdist.data.images import GRAYSCALE_MODES, Sample, decode, is_grayscale, is_image, to_tensor
from ffdist.data.listing import (
    FORMAT,
    Skipped,
    describe_contents,
    describe_skipped,
    extension,
    find_splits,
    is_parquet,
    list_entries,
    list_files,
    skip,
    skip_suffix,
)
from ffdist.data.parquet import check_same_columns, open_table, read_class_names, read_rows
from ffdist.errors import ConfigError
from ffdist.storage.paths import kind_of, printable

SPLITS = ("train", "test")


class Origin(NamedTuple):
    """Files and columns that a dataset was read from, reported to the user."""

    files: Mapping[str, int] = {}
    """Number of files by split."""
    columns: Mapping[str, str] = {}
    """Names of the `image` and `label` columns of Parquet files."""
    skipped: Mapping[str, Mapping[str, int]] = {}
    """Skipped entries, as in `Skipped`."""
    notes: tuple[str, ...] = ()
    """Conversions that the user should know of."""


class Splits(NamedTuple):
    """Samples and labels by split."""

    samples: dict[str, Tensor]
    """Samples `[N, ...]`; of images uint8 `[N, channels, height, width]`."""
    labels: dict[str, Tensor]
    """int64 `[N]`."""
    names: list[str] = []  # noqa: RUF012, never modified
    """Class names in order, or empty."""
    origin: Origin = Origin()
    encoder: str = "image"
    """Kind of the samples, a key of `ENCODERS`."""
    encoder_settings: Mapping[str, Any] = {}
    """Settings of the encoder that the reader determines."""


class _Encoded(NamedTuple):
    samples: Iterable[Sample]
    num_samples: int


def read_parquet(config: Data) -> Splits:
    """Reads the Parquet files, or folders of Parquet files, `train*` and `test*` in `data.path`.

    The image column holds encoded images, as bytes or `{bytes, path}` structs. The label column holds strings, or
    non-negative integers, for which the metadata of Hugging Face's `datasets` may have class names.

    Raises:
        ConfigError: A file or sample is invalid. The message names the file and row.
    """
    assert config.path is not None
    skipped: Skipped = {}
    expected = "*.parquet or a folder * of Parquet files"
    paths_by_split = find_splits(
        config.path, SPLITS, lambda path: is_parquet(path) or _is_folder(path), expected, skipped
    )
    files = {
        split: [file for path in paths for file in _parquet_files(path, skipped)]
        for split, paths in paths_by_split.items()
    }
    tables = {split: [open_table(file, config) for file in split_files] for split, split_files in files.items()}
    check_same_columns(tables)
    first = tables["train"][0]
    names = list(first.names) or (read_class_names(tables["train"]) if first.label_type == "strings" else [])
    _check_classes(names, first.file, config)
    encoded = {
        split: _Encoded(
            chain.from_iterable(read_rows(table, names) for table in split_tables),
            sum(table.num_rows for table in split_tables),
        )
        for split, split_tables in tables.items()
    }
    columns = {"image": first.image, "label": str(first.label)}
    origin = Origin({split: len(split_files) for split, split_files in files.items()}, columns, skipped)
    return _read(config, encoded, names, origin)


def read_image_folder(config: Data) -> Splits:
    """Reads one image folder per split (`train*` and `test*`) in `data.path`, with one subfolder per class.

    The classes are the subfolders of the training set in alphabetical order, as in torchvision's `ImageFolder`.

    Raises:
        ConfigError: A folder or file is invalid. The message names it.
    """
    assert config.path is not None
    skipped: Skipped = {}
    paths_by_split = find_splits(config.path, SPLITS, _is_folder, "one folder *", skipped)
    folders = {}
    for split, paths in paths_by_split.items():
        if len(paths) != 1:
            raise ConfigError(f"data.path must hold one folder {split}* (path: {config.path}, found: {len(paths)})")
        folders[split] = _class_folders(paths[0], skipped)
    classes = list(folders["train"])
    if unknown := [name for name in folders["test"] if name not in classes]:
        raise ConfigError(
            f"{paths_by_split['test'][0]}: every class of the test set must have a folder in "
            f"{paths_by_split['train'][0]} (without one: {', '.join(map(printable, unknown))})"
        )
    names = [printable(name) for name in classes]
    _check_classes(names, paths_by_split["train"][0], config)
    encoded = {}
    for split, class_folders in folders.items():
        samples = [
            Sample(path, classes.index(name), printable(path))
            for name, folder in class_folders.items()
            for path in _images_of_class(folder, skipped)
        ]
        encoded[split] = _Encoded(samples, len(samples))
    files = {split: each.num_samples for split, each in encoded.items()}
    return _read(config, encoded, names, Origin(files, skipped=skipped))


def _is_folder(path: Path) -> bool:
    return kind_of(path) == "folder"


def _parquet_files(path: Path, skipped: Skipped) -> list[Path]:
    if not _is_folder(path):
        return [path]
    files = list_files(path, skipped)
    skip(skipped, FORMAT, *(extension(file) for file in files if not is_parquet(file)))
    parquet_files = [file for file in files if is_parquet(file)]
    if not parquet_files:
        raise ConfigError(f"the folder {printable(path)} must hold Parquet files ({describe_contents(files, 5)})")
    return parquet_files


def _class_folders(folder: Path, skipped: Skipped) -> dict[str, Path]:
    paths = list(list_entries(folder, skipped))
    if broken := [path for path in paths if not kind_of(path) and path.is_symlink()]:
        raise ConfigError(
            f"{printable(broken[0])} may be a class folder and must not be a broken link (target: "
            f"{printable(broken[0].readlink())}); fix or remove it"
        )
    folders = {path.name: path for path in paths if _is_folder(path)}
    others = (extension(path) for path in paths if path.name not in folders)
    skip(skipped, "files outside of the class folders", *others)
    if not folders:
        raise ConfigError(
            f"{printable(folder)} must hold an image folder for each class ({describe_contents(paths, 5)})"
        )
    return folders


def _images_of_class(folder: Path, skipped: Skipped) -> list[Path]:
    files = list_files(folder, skipped)
    images = [file for file in files if is_image(file)]
    others = [extension(file) for file in files if not is_image(file)]
    if len(others) > len(images):
        raise ConfigError(
            f"{printable(folder)}: at least half of the files must be images of a supported format (images: "
            f"{len(images)}, {describe_skipped({FORMAT: Counter(others)})}); convert or move the others"
        )
    skip(skipped, FORMAT, *others)
    return images


def _check_classes(names: list[str], location: Path, config: Data) -> None:
    if len(names) > MAX_CLASSES and not config.classes:
        raise ConfigError(f"{printable(location)}: there may be at most {MAX_CLASSES} classes (found: {len(names)})")
    all_names = names and [*names, *map(str, range(len(names), config.classes or 0))]
    if duplicates := [name for name, count in Counter(all_names).items() if count > 1]:
        raise ConfigError(
            f"{printable(location)}: classes must have different names (duplicate: {duplicates[0]}); rename one"
        )


def _read(config: Data, splits: Mapping[str, _Encoded], names: list[str], origin: Origin) -> Splits:
    classes = config.classes or len(names)
    images, labels, notes = {}, {}, []
    size, channels = config.image_size, None
    for split, encoded in splits.items():
        if not encoded.num_samples:
            raise ConfigError(
                f"{config.path}: the {split} split is empty; it must hold at least one sample"
                f"{skip_suffix(origin.skipped)}"
            )
        buffer, numbers = _Images(encoded.num_samples, size, channels, resize=config.image_size is not None), []
        for sample in track(encoded.samples, f"reading {split} images"):
            buffer.add(decode(sample), sample.location)
            numbers.append(_check_label(sample, min(classes or MAX_CLASSES, MAX_CLASSES), names, bool(classes)))
        images[split], labels[split] = buffer.images, torch.tensor(numbers)
        size, channels = buffer.size, buffer.channels
        classes = classes or max(numbers) + 1
        if buffer.num_grayscale and channels == 3:
            count = f"{buffer.num_grayscale:,} of {len(numbers):,}"
            notes.append(f"{count} {split} images are grayscale and were converted to color")
    return Splits(images, labels, names, origin._replace(notes=tuple(notes)))


def _check_label(sample: Sample, limit: int, names: list[str], is_num_classes: bool) -> int:
    if isinstance(sample.label, str) or (sample.label is None and names):
        raise ConfigError(
            f"{sample.location}: a label must be one of the classes of the training set (label: {sample.label!r}, "
            f"classes: {', '.join(names[:10])}{', ...' * (len(names) > 10)})"
        )
    if not isinstance(sample.label, int) or not 0 <= sample.label < limit:
        bound = f"{limit}{', the number of classes' if is_num_classes else ''}"
        hint = "; -1 stands for no label: take test samples from the training set" if sample.label == -1 else ""
        raise ConfigError(
            f"{sample.location}: a label must be an integer from 0 to below {bound} (label: {sample.label!r}){hint}"
        )
    return sample.label


class _Images:
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
        num_bytes, memory_bytes = torch.Size(shape).numel(), psutil.virtual_memory().total
        if num_bytes > memory_bytes:
            raise ConfigError(
                f"the images of a split must fit into host memory (images: {num_bytes / 1e9:,.1f} GB, memory: "
                f"{memory_bytes / 1e9:,.1f} GB); set a smaller data.image_size"
            )
        return torch.empty(shape, dtype=torch.uint8)
