"""Readers of custom datasets in files: Parquet, CSV and image folders."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.config.sections import MAX_CLASSES, Data
from ffdist.console import track
from ffdist.data.images import ImageBuffer, Sample, check_fits, decode, is_image
from ffdist.data.listing import (
    FORMAT,
    Skipped,
    describe_contents,
    describe_skipped,
    extension,
    find_splits,
    is_csv,
    is_parquet,
    list_entries,
    list_files,
    skip,
    skip_suffix,
)
from ffdist.data.tables import (
    Source,
    Table,
    check_same_columns,
    open_source,
    open_table,
    read_class_names,
    read_images,
    read_numbers,
)
from ffdist.errors import ConfigError
from ffdist.storage.paths import kind_of, printable


class Origin(NamedTuple):
    """Files and columns that a dataset was read from, reported to the user."""

    files: Mapping[str, int] = {}
    """Number of files by split."""
    columns: Mapping[str, str] = {}
    """Names of the `image` and `label` columns of tables."""
    features: tuple[str, ...] = ()
    """Names of the columns of a table of numbers, in the order of a sample's values; empty if they have none."""
    skipped: Mapping[str, Mapping[str, int]] = {}
    """Skipped entries, as in `Skipped`."""
    notes: tuple[str, ...] = ()
    """Conversions that the user should know of."""


class Splits(NamedTuple):
    """Samples and labels by split."""

    samples: dict[str, Tensor]
    """Samples `[N, ...]` of `train`, `test` and, if the dataset has its own, `validation`. Images are uint8
    `[N, channels, height, width]`, and rows of a table float32 `[N, D]`. The tensors belong to the dataset."""
    labels: dict[str, Tensor]
    """int64 `[N]`."""
    names: list[str] = []  # noqa: RUF012, never modified
    """Class names in order, or empty."""
    origin: Origin = Origin()
    encoder: str = "image"
    """Kind of the samples, a key of `ENCODERS`."""
    encoder_settings: Mapping[str, Any] = {}
    """Settings of the encoder that the reader determines."""


class Encoded(NamedTuple):
    """Images of a split that are not decoded yet."""

    samples: Iterable[Sample]
    num_samples: int


def read_parquet(config: Data) -> Splits:
    """Reads the Parquet files, or folders of Parquet files, `train*`, `test*` and perhaps `val*` in `data.path`.

    The image column holds encoded images, as bytes or `{bytes, path}` structs. The label column holds strings, or
    non-negative integers, for which the metadata of Hugging Face's `datasets` may have class names. Without an image
    column, the other columns are numbers.

    Raises:
        ConfigError: A file or sample is invalid. The message names the file and row.
    """
    skipped: Skipped = {}
    expected = "*.parquet or a folder * of Parquet files"
    paths = find_splits(_path(config), lambda path: is_parquet(path) or _is_folder(path), expected, skipped)
    files = {split: [file for each in paths[split] for file in _parquet_files(each, skipped)] for split in paths}
    return _read_files(config, files, skipped)


def read_csv(config: Data) -> Splits:
    """Reads the CSV files `train*.csv`, `test*.csv` and perhaps `val*.csv` in `data.path`.

    The first line holds the names of the columns. The label column holds strings or non-negative integers. A column
    `file_name`, `file` or `path` holds names of image files, relative to the CSV file. Without one, the other columns
    are numbers.

    Raises:
        ConfigError: A file or sample is invalid. The message names the file and row.
    """
    skipped: Skipped = {}
    files = find_splits(_path(config), lambda path: is_csv(path) and not _is_folder(path), "*.csv", skipped)
    return _read_files(config, files, skipped)


def _read_files(config: Data, files: Mapping[str, Sequence[Path]], skipped: Skipped) -> Splits:
    sources = {split: [open_source(file) for file in split_files] for split, split_files in files.items()}
    return read_tables(config, sources, Origin({split: len(each) for split, each in files.items()}, skipped=skipped))


def read_tables(config: Data, sources: Mapping[str, Sequence[Source]], origin: Origin) -> Splits:
    """Reads the tables of each split: images if there is a column of images, else numbers.

    Raises:
        ConfigError: A table or sample is invalid. The message names the table and row.
    """
    for split, each in sources.items():
        _check_not_empty(sum(source.num_rows for source in each), split, config, origin)
    tables = {split: [open_table(source, config) for source in each] for split, each in sources.items()}
    check_same_columns(tables)
    first = tables["train"][0]
    names = list(first.names) or (read_class_names(tables["train"]) if first.label_type == "strings" else [])
    check_classes(names, first.source.location, config)
    columns = {"image": first.image, "label": first.label}
    origin = origin._replace(
        columns={key: name for key, name in columns.items() if name is not None}, features=first.features
    )
    if first.image is None:
        return _read_numbers(config, tables, names, origin)
    encoded = {
        split: Encoded(
            chain.from_iterable(read_images(table, names) for table in split_tables),
            sum(table.source.num_rows for table in split_tables),
        )
        for split, split_tables in tables.items()
    }
    return read_encoded(config, encoded, names, origin)


def _read_numbers(config: Data, tables: dict[str, list[Table]], names: list[str], origin: Origin) -> Splits:
    check, samples, labels = LabelCheck(config, names), {}, {}
    for split, split_tables in tables.items():
        num_rows, numbers, done = sum(table.source.num_rows for table in split_tables), list[int](), 0
        shape = torch.Size((num_rows, len(origin.features)))
        check_fits(shape.numel() * torch.float32.itemsize)
        samples[split] = torch.empty(shape)
        for table in split_tables:
            ordered, row = table._replace(features=origin.features), 0
            for block, classes in track(read_numbers(ordered, names), f"reading {split} rows"):
                check(classes, table.source.location, row)
                samples[split][done : done + len(block)] = block
                numbers += classes
                done, row = done + len(block), row + len(block)
        labels[split] = torch.tensor(numbers)
        check.end_of_split(numbers)
    return Splits(samples, labels, names, origin, "table")


def read_image_folder(config: Data) -> Splits:
    """Reads one image folder per split (`train*`, `test*`, perhaps `val*`) in `data.path`, with a subfolder per class.

    The classes are the subfolders of the training set in alphabetical order, as in torchvision's `ImageFolder`.

    Raises:
        ConfigError: A folder or file is invalid. The message names it.
    """
    skipped: Skipped = {}
    paths_by_split = find_splits(_path(config), _is_folder, "one folder *", skipped)
    folders = {}
    for split, paths in paths_by_split.items():
        if len(paths) != 1:
            raise ConfigError(f"data.path must hold one folder {split}* (path: {config.path}, found: {len(paths)})")
        folders[split] = _class_folders(paths[0], skipped)
    classes = list(folders["train"])
    for split, class_folders in folders.items():
        if unknown := [name for name in class_folders if name not in classes]:
            raise ConfigError(
                f"{paths_by_split[split][0]}: every class of the {split} set must have a folder in "
                f"{paths_by_split['train'][0]} (without one: {', '.join(map(printable, unknown))})"
            )
    names = [printable(name) for name in classes]
    check_classes(names, paths_by_split["train"][0], config)
    encoded = {}
    for split, class_folders in folders.items():
        samples = [
            Sample(path, classes.index(name), printable(path))
            for name, folder in class_folders.items()
            for path in _images_of_class(folder, skipped)
        ]
        encoded[split] = Encoded(samples, len(samples))
    files = {split: each.num_samples for split, each in encoded.items()}
    return read_encoded(config, encoded, names, Origin(files, skipped=skipped))


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


def check_classes(names: Sequence[str], location: Path | str, config: Data) -> None:
    """Checks the number of class names, and that they differ."""
    if len(names) > MAX_CLASSES and not config.classes:
        raise ConfigError(f"{printable(location)}: there may be at most {MAX_CLASSES} classes (found: {len(names)})")
    all_names = names and [*names, *map(str, range(len(names), config.classes or 0))]
    if duplicates := [name for name, count in Counter(all_names).items() if count > 1]:
        raise ConfigError(
            f"{printable(location)}: classes must have different names (duplicate: {duplicates[0]}); rename one"
        )


def read_encoded(config: Data, splits: Mapping[str, Encoded], names: list[str], origin: Origin) -> Splits:
    """Decodes images.

    Args:
        config: Size of the images and number of classes, if set.
        splits: Images and labels of each split, training set first.
        names: Class names, or empty.
        origin: Origin of the images.

    Raises:
        ConfigError: A sample is invalid. The message names it.
    """
    check, images, labels, notes = LabelCheck(config, names), {}, {}, []
    size, channels = config.image_size, None
    for split, encoded in splits.items():
        _check_not_empty(encoded.num_samples, split, config, origin)
        buffer, numbers = ImageBuffer(encoded.num_samples, size, channels, resize=config.image_size is not None), []
        for sample in track(encoded.samples, f"reading {split} images"):
            buffer.add(decode(sample), sample.location)
            check([sample.label], sample.location)
            numbers.append(sample.label)
        images[split], labels[split] = buffer.images, torch.tensor(numbers)
        size, channels = buffer.size, buffer.channels
        check.end_of_split(numbers)
        if buffer.num_grayscale and channels == 3:
            count = f"{buffer.num_grayscale:,} of {len(numbers):,}"
            notes.append(f"{count} {split} images are grayscale and were converted to color")
    return Splits(images, labels, names, origin._replace(notes=(*origin.notes, *notes)))


def _path(config: Data) -> Path:
    assert config.path is not None, "checked by the configuration"
    return config.path


def _check_not_empty(num_samples: int, split: str, config: Data, origin: Origin) -> None:
    if not num_samples:
        raise ConfigError(
            f"{config.path or config.name}: the {split} split is empty; it must hold at least one sample"
            f"{skip_suffix(origin.skipped)}"
        )


class LabelCheck:
    """Checks the labels of one split after another, training set first.

    Args:
        config: Number of classes, if it is set.
        names: Class names, or empty.
    """

    def __init__(self, config: Data, names: Sequence[str]) -> None:
        self._classes, self._names = config.classes or len(names), names

    def __call__(self, labels: Sequence[Any], location: str, first_row: int | None = None) -> None:
        """Checks labels.

        Args:
            labels: Labels; class names that are not known are strings.
            location: Location of the labels, for messages.
            first_row: Number of the first label, if the location has several.

        Raises:
            ConfigError: A label is not the number of a class.
        """
        limit = min(self._classes or MAX_CLASSES, MAX_CLASSES)
        for row, label in enumerate(labels, first_row or 0):
            if type(label) is not int or not 0 <= label < limit:
                raise self._error(label, location if first_row is None else f"{location}, row {row}", limit)

    def end_of_split(self, labels: Sequence[int]) -> None:
        """Takes the number of classes from the training labels, if it is not known yet."""
        self._classes = self._classes or max(labels) + 1

    def _error(self, label: Any, location: str, limit: int) -> ConfigError:
        if isinstance(label, str) or (label is None and self._names):
            return ConfigError(
                f"{location}: a label must be one of the classes of the training set (label: {label!r}, "
                f"classes: {', '.join(self._names[:10])}{', ...' * (len(self._names) > 10)})"
            )
        bound = f"{limit}{', the number of classes' if self._classes else ''}"
        hint = "; -1 stands for no label: take test samples from the training set" if label == -1 else ""
        return ConfigError(f"{location}: a label must be an integer from 0 to below {bound} (label: {label!r}){hint}")
