"""A user's own images, read whole: Parquet files and image folders, by split."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from PIL import Image
from torch import Tensor

from ffdist.config import ConfigError
from ffdist.data.files import (
    FORMAT,
    Skipped,
    and_skipped,
    describe_skipped,
    entries,
    extension,
    find_splits,
    is_parquet,
    list_files,
    skip,
)
from ffdist.data.images import GREY, Sample, decode, is_grey, is_image, pixels
from ffdist.data.parquet import check_alike, open_table, rows, words_of
from ffdist.paths import kind_of, printable
from ffdist.screen import track
from ffdist.sections import MOST_CLASSES, Data

SPLITS = ("train", "test")


class Origin(NamedTuple):
    """Where a dataset was read from, for the user to check."""

    files: Mapping[str, int] = {}
    """Number of files of each split."""
    columns: Mapping[str, str] = {}
    """Columns of Parquet files: of the `image` and of the `label`."""
    skipped: Mapping[str, Mapping[str, int]] = {}
    """What was skipped, as `Skipped`."""
    notes: tuple[str, ...] = ()
    """What else was decided."""


class Splits(NamedTuple):
    """Images and labels by split."""

    images: dict[str, Tensor]
    """uint8 `[N, channels, height, width]`."""
    labels: dict[str, Tensor]
    """int64 `[N]`."""
    names: list[str] = []  # noqa: RUF012, never written to
    """Of the classes, in their order, where they have some."""
    origin: Origin = Origin()


class _Encoded(NamedTuple):
    samples: Iterable[Sample]
    num_samples: int


def read_parquet(config: Data) -> Splits:
    """Reads `train*` and `test*`, files or folders of files, of `data.path`.

    The image column holds encoded images, as bytes or as the common `{bytes, path}` structure; the label column holds
    integers from 0 on, which Hugging Face's `datasets` may have named, or words.

    Raises:
        ConfigError: Names the file and row that break a rule.
    """
    assert config.path is not None
    skipped: Skipped = {}
    what = "*.parquet or a folder * of Parquet files"
    found = find_splits(config.path, SPLITS, lambda path: is_parquet(path) or _is_folder(path), what, skipped)
    files = {
        split: [file for path in paths for file in _parquet_files(path, skipped)] for split, paths in found.items()
    }
    tables = {split: [open_table(file, config) for file in of_split] for split, of_split in files.items()}
    check_alike(tables)
    first = tables["train"][0]
    names = list(first.names) or (words_of(tables["train"]) if first.kind == "words" else [])
    _check_classes(names, first.file, config)
    encoded = {
        split: _Encoded(
            chain.from_iterable(rows(table, names) for table in of_split), sum(table.num_rows for table in of_split)
        )
        for split, of_split in tables.items()
    }
    columns = {"image": first.image, "label": str(first.label)}
    origin = Origin({split: len(of_split) for split, of_split in files.items()}, columns, skipped)
    return _read(config, encoded, names, origin)


def read_image_folder(config: Data) -> Splits:
    """Reads one image folder per split (`train*` and `test*`), each with one folder per class.

    Classes are the folders of the training set, numbered by name as torchvision's `ImageFolder` does.

    Raises:
        ConfigError: Names the folder or file that breaks a rule.
    """
    assert config.path is not None
    skipped: Skipped = {}
    found = find_splits(config.path, SPLITS, _is_folder, "one folder *", skipped)
    folders = {}
    for split, paths in found.items():
        if len(paths) != 1:
            raise ConfigError(f"data.path must hold one folder {split}* (path: {config.path}, found: {len(paths)})")
        folders[split] = _class_folders(paths[0], skipped)
    classes = list(folders["train"])
    if unknown := [name for name in folders["test"] if name not in classes]:
        raise ConfigError(
            f"{found['test'][0]}: every class of the test set must have a folder in {found['train'][0]} "
            f"(without one: {', '.join(map(printable, unknown))})"
        )
    names = [printable(name) for name in classes]
    _check_classes(names, found["train"][0], config)
    encoded = {}
    for split, by_name in folders.items():
        samples = [
            Sample(path, classes.index(name), printable(path))
            for name, folder in by_name.items()
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
    found = [file for file in files if is_parquet(file)]
    if not found:
        raise ConfigError(f"the folder {printable(path)} must hold Parquet files ({_held(files)})")
    return found


def _class_folders(folder: Path, skipped: Skipped) -> dict[str, Path]:
    found = list(entries(folder, skipped))
    if broken := [path for path in found if not kind_of(path) and path.is_symlink()]:
        raise ConfigError(
            f"{printable(broken[0])} may be the folder of a class and must not be a broken link (it leads to "
            f"{printable(broken[0].readlink())}); correct it, or remove it"
        )
    folders = {path.name: path for path in found if _is_folder(path)}
    others = (extension(path) for path in found if path.name not in folders)
    skip(skipped, "files outside of the class folders", *others)
    if not folders:
        raise ConfigError(f"{printable(folder)} must hold a folder of images for each class ({_held(found)})")
    return folders


def _images_of_class(folder: Path, skipped: Skipped) -> list[Path]:
    files = list_files(folder, skipped)
    images = [file for file in files if is_image(file)]
    others = [extension(file) for file in files if not is_image(file)]
    if len(others) > len(images):
        raise ConfigError(
            f"{printable(folder)}: at least half of the files must be images that can be read (images: {len(images)}, "
            f"{describe_skipped({FORMAT: Counter(others)})}); convert the others, or move them elsewhere"
        )
    skip(skipped, FORMAT, *others)
    return images


def _held(paths: list[Path]) -> str:
    return f"it holds {', '.join(printable(path.name) for path in paths[:5]) or 'nothing'}{', ...' * (len(paths) > 5)}"


def _check_classes(names: list[str], place: Path, config: Data) -> None:
    if len(names) > MOST_CLASSES and not config.classes:
        raise ConfigError(f"{printable(place)}: there may be at most {MOST_CLASSES} classes (found: {len(names)})")
    all_names = names and [*names, *map(str, range(len(names), config.classes or 0))]
    if twice := [name for name, count in Counter(all_names).items() if count > 1]:
        raise ConfigError(f"{printable(place)}: classes must have different names (equal: {twice[0]}); rename one")


def _read(config: Data, splits: Mapping[str, _Encoded], names: list[str], origin: Origin) -> Splits:
    classes = config.classes or len(names)
    images, labels, notes = {}, {}, []
    size, channels = config.image_size, None
    for split, encoded in splits.items():
        if not encoded.num_samples:
            raise ConfigError(
                f"{config.path}: the {split} split is empty; it must hold at least one sample"
                f"{and_skipped(origin.skipped)}"
            )
        decoded, numbers = _Images(encoded.num_samples, size, channels, resize=config.image_size is not None), []
        for sample in track(encoded.samples, f"reading {split} images"):
            decoded.add(decode(sample), sample.place)
            numbers.append(_checked_label(sample, min(classes or MOST_CLASSES, MOST_CLASSES), names, bool(classes)))
        images[split], labels[split] = decoded.images, torch.tensor(numbers)
        size, channels = decoded.size, decoded.channels
        classes = classes or max(numbers) + 1
        if decoded.num_grey and channels == 3:
            notes.append(f"{decoded.num_grey:,} of {len(numbers):,} {split} images are grey and were read as colour")
    return Splits(images, labels, names, origin._replace(notes=tuple(notes)))


def _checked_label(sample: Sample, most: int, names: list[str], are_known: bool) -> int:
    if isinstance(sample.label, str) or (sample.label is None and names):
        raise ConfigError(
            f"{sample.place}: a label must be one of the classes of the training set (label: {sample.label!r}, "
            f"classes: {', '.join(names[:10])}{', ...' * (len(names) > 10)})"
        )
    if not isinstance(sample.label, int) or not 0 <= sample.label < most:
        below = f"{most}{', the number of classes' if are_known else ''}"
        hint = "; -1 stands for no label: take test samples from the training set" if sample.label == -1 else ""
        raise ConfigError(
            f"{sample.place}: a label must be an integer from 0 to below {below} (label: {sample.label!r}){hint}"
        )
    return sample.label


class _Images:
    """Images of one size, decoded into memory that is allocated once.

    Args:
        num_images: Number of images.
        size: Height and width; None for those of the images, which all have the same.
        channels: Those of the training set; None where this is the training set, in which one image in colour gives
            all of them 3.
        resize: Whether images of another size are resized.
    """

    def __init__(self, num_images: int, size: tuple[int, int] | None, channels: int | None, *, resize: bool) -> None:
        self.size, self.num_grey = size, 0
        self._num_images, self._channels, self._resize, self._count = num_images, channels, resize, 0
        self._pixels = torch.empty(0, channels or 1, 0, 0, dtype=torch.uint8)

    @property
    def images(self) -> Tensor:
        """uint8 `[N, channels, height, width]`."""
        return self._pixels[: self._count]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self._pixels.shape[1]

    def add(self, image: Image.Image, place: str) -> None:
        """Adds an image.

        Raises:
            ConfigError: It has another size than those before it, or is in colour and the training images are grey.
        """
        has_no_colour = image.mode in GREY or (self._channels == 1 and is_grey(image))
        self.num_grey += has_no_colour
        if not has_no_colour and self._channels == 1:
            raise ConfigError(
                f"{place}: the training images are grey, and this one is in colour (mode: {image.mode}); write all of "
                f"them in grey, or all in colour"
            )
        self.size = self.size or (image.height, image.width)
        if (image.height, image.width) != self.size and not self._resize:
            raise ConfigError(
                f"{place}: all images must have the same size (those before: {self.size[0]} x {self.size[1]}, this: "
                f"{image.height} x {image.width}); set data.image_size to [height, width] to resize them"
            )
        if not self._count:
            self._pixels = self._allocate(self._channels or (1 if has_no_colour else 3))
        elif not has_no_colour and self.channels == 1:
            grey, self._pixels = self._pixels, self._allocate(3)
            self._pixels[: self._count] = grey[: self._count]
        image = image.convert("L" if self.channels == 1 else "RGB")
        if image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        self._pixels[self._count] = pixels(image)
        self._count += 1

    def _allocate(self, channels: int) -> Tensor:
        assert self.size, "set by the first image"
        shape = (self._num_images, channels, *self.size)
        num_bytes, memory = torch.Size(shape).numel(), psutil.virtual_memory().total
        if num_bytes > memory:
            raise ConfigError(
                f"the images of a split must fit into memory (images: {num_bytes / 1e9:,.1f} GB, memory: "
                f"{memory / 1e9:,.1f} GB); set data.image_size smaller"
            )
        return torch.empty(shape, dtype=torch.uint8)
