"""Inputs of evaluation and inference, read from files and folders, in the form that a network was trained on."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ffdist.config.sections import Data
from ffdist.console import track
from ffdist.data.images import Sample, decode, is_grayscale, is_image, to_tensor
from ffdist.data.listing import (
    FORMAT,
    Skipped,
    describe_skipped,
    extension,
    is_csv,
    is_parquet,
    list_files,
    skip,
    skip_suffix,
)
from ffdist.data.tables import Table, has_images, open_source, open_table, read_images, read_numbers
from ffdist.errors import ConfigError
from ffdist.storage.paths import kind_of, printable


class Inputs(NamedTuple):
    """Input samples, with their labels if all of them are known."""

    samples: Tensor
    """Images, uint8 `[N, channels, height, width]`, or rows of a table, float32 `[N, D]`."""
    labels: Tensor | None
    """int64 `[N]`, or None if any label is missing or invalid."""
    locations: list[str]
    """File, or file and row, of each sample."""
    label_problem: str = ""
    """Why `labels` is None."""
    skipped: str = ""
    """Files that were skipped, and why."""
    label_source: str = ""
    """Where the labels come from, for example "folder names (files: 10)"."""


@dataclass
class _Notes:
    """Observations collected while samples are read."""

    skipped: Skipped = field(default_factory=dict)
    label_sources: Counter[str] = field(default_factory=Counter)
    """Number of files by source of the labels."""
    label_problem: str = ""
    """Why the first file without usable labels has none."""


def read_inputs(
    paths: Sequence[Path], config: Data, shape: tuple[int, int, int], classes: int, names: Sequence[str] = ()
) -> Inputs:
    """Reads images and converts them to the shape that a network was trained on.

    Images of another size are resized if training resized them (`data.image_size`) or if the aspect ratio is the same.
    Grayscale images are converted to color, and color images to grayscale if every pixel is gray.

    Args:
        paths: Image files, Parquet files, folders of either, and CSV files with names of image files. Labels are the
            names of the top-level subfolders, if all images are in subfolders named after a class (or its number, for
            classes without names). In a table, they are the column named in `config` or `label`: class names, or
            numbers for classes without names.
        config: Columns of tables, and whether training resized images.
        shape: Channels, height and width.
        classes: Number of classes.
        names: Class names, or empty.

    Raises:
        ConfigError: An image cannot be read or converted. The message names the file or row, and the rule.
    """
    images, labels, locations, notes = list[Tensor](), list[int | None](), list[str](), _Notes()
    for sample in track(_samples(paths, config, classes, names, notes), "reading images"):
        image = _convert(decode(sample), sample.location, shape, resize=config.image_size is not None)
        images.append(to_tensor(image))
        labels.append(sample.label)
        locations.append(sample.location)
    if not images:
        raise ConfigError(
            f"there must be an image to classify (none in: {', '.join(map(printable, paths))}"
            f"{skip_suffix(notes.skipped)})"
        )
    return _with_labels(torch.stack(images), labels, locations, classes, notes)


def read_table_inputs(
    paths: Sequence[Path], config: Data, features: Sequence[str], classes: int, names: Sequence[str] = ()
) -> Inputs:
    """Reads rows of tables, with the columns that a network was trained on, in any order and among any others.

    Args:
        paths: Parquet files, CSV files and folders of either. Labels are as in `read_inputs`.
        config: Column of the labels.
        features: Names of the columns, in the order of training.
        classes: Number of classes.
        names: Class names, or empty.

    Raises:
        ConfigError: A file cannot be read, lacks a column, or has an invalid number. The message names file and row.
    """
    blocks, labels, locations, notes = list[Tensor](), list[Any](), list[str](), _Notes()
    for file in _table_files(paths, notes):
        source = open_source(file)
        table = open_table(source, config, require_labels=False, features=features)
        for block, block_labels in read_numbers(_with_usable_label(table, names, notes), names):
            blocks.append(block)
            labels += block_labels
        locations += [f"{source.location}, row {row}" for row in range(source.num_rows)]
    if not labels:
        raise ConfigError(
            f"there must be a row to classify (none in: {', '.join(map(printable, paths))}{skip_suffix(notes.skipped)})"
        )
    return _with_labels(torch.cat(blocks), labels, locations, classes, notes)


def _with_labels(samples: Tensor, labels: list[Any], locations: list[str], classes: int, notes: _Notes) -> Inputs:
    """Returns samples with their labels, or without any if one is missing or invalid."""
    skipped = describe_skipped(notes.skipped)
    for location, label in zip(locations, labels, strict=True):
        if not (isinstance(label, int) and 0 <= label < classes):
            problem = f"{location} has {'no label' if label is None else f'label {label!r}'}"
            return Inputs(samples, None, locations, notes.label_problem or problem, skipped)
    source = ", ".join(f"{source} (files: {count:,})" for source, count in notes.label_sources.items())
    return Inputs(samples, torch.tensor(labels), locations, skipped=skipped, label_source=source)


def write_parquet(columns: dict[str, list[Any]], path: Path) -> None:
    """Writes columns to a Parquet file.

    Raises:
        ConfigError: The file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.table(columns), path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}); name another file") from error


def _samples(
    paths: Sequence[Path], config: Data, classes: int, names: Sequence[str], notes: _Notes
) -> Iterator[Sample]:
    for path in paths:
        kind = kind_of(path)
        if kind == "folder":
            yield from _samples_of_folder(path, config, classes, names, notes)
        elif is_parquet(path) or is_csv(path):
            yield from _samples_of_table(path, config, names, notes)
        elif kind == "file":
            yield Sample(path, None, printable(path))
        else:
            raise ConfigError(
                f"{printable(path)} must be an image, a Parquet or CSV file, or a folder of images and Parquet files "
                f"(not found)"
            )


def _table_files(paths: Sequence[Path], notes: _Notes) -> Iterator[Path]:
    for path in paths:
        kind = kind_of(path)
        files = list_files(path, notes.skipped) if kind == "folder" else [path] if kind else []
        tables = [file for file in files if is_parquet(file) or is_csv(file)]
        if kind != "folder" and not tables:
            raise ConfigError(
                f"{printable(path)} must be a Parquet file, a CSV file or a folder of either, because the network was "
                f"trained on rows of a table"
            )
        yield from tables
        skip(notes.skipped, FORMAT, *(extension(file) for file in files if file not in tables))


def _samples_of_folder(
    folder: Path, config: Data, classes: int, names: Sequence[str], notes: _Notes
) -> Iterator[Sample]:
    files = list_files(folder, notes.skipped)
    tables = {file: None for file in files if is_parquet(file) and has_images(file, config)}
    for table in tables:
        yield from _samples_of_table(table, config, names, notes)
    images = [(file, printable(file.relative_to(folder).parts[0])) for file in files if is_image(file)]
    class_names = list(names) or _default_names(classes)
    has_labels = all(file.parent != folder and name in class_names for file, name in images)
    if has_labels and images:
        notes.label_sources["folder names"] += len(images)
    for file, name in images:
        yield Sample(file, class_names.index(name) if has_labels else None, printable(file))
    skip(notes.skipped, FORMAT, *(extension(file) for file in files if not is_image(file) and file not in tables))


def _samples_of_table(file: Path, config: Data, names: Sequence[str], notes: _Notes) -> Iterator[Sample]:
    table = open_table(open_source(file), config, require_labels=False, require_images=True)
    yield from read_images(_with_usable_label(table, names, notes), names)


def _with_usable_label(table: Table, names: Sequence[str], notes: _Notes) -> Table:
    """Returns a table without its label column if the column or its encoding is ambiguous."""
    location, problem = table.source.location, ""
    encoding = "numbers" if table.label_type == "integers" and not (names and table.names) else "names"
    if table.label is None:
        problem = f"the label column of {location} is ambiguous (columns: {sorted(set(table.source.schema.names))})"
    elif encoding == "numbers" and names and list(names) != _default_names(len(names)):
        problem = f"the column {table.label} of {location} holds numbers, but the classes have names"
    else:
        notes.label_sources[f"column {table.label}, class {encoding}"] += 1
    notes.label_problem = notes.label_problem or problem
    return table._replace(label=None) if problem else table


def _default_names(classes: int) -> list[str]:
    return [str(number) for number in range(classes)]


def _convert(image: Image.Image, location: str, shape: tuple[int, int, int], *, resize: bool) -> Image.Image:
    channels, height, width = shape
    if channels == 1 and not is_grayscale(image):
        raise ConfigError(
            f"{location}: the network was trained on grayscale images, and this one is in color; convert it to "
            f"grayscale"
        )
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size == (width, height):
        return image
    if not resize and image.width * height != image.height * width:
        raise ConfigError(
            f"{location}: the network was trained on images of {height} x {width}, and this one, {image.height} x "
            f"{image.width}, has a different aspect ratio; crop it"
        )
    return image.resize((width, height), Image.Resampling.BILINEAR)
