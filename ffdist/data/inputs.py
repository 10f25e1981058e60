"""Images that a finished network is to look at: files, folders and Parquet files, brought to its shape."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ffdist.config import ConfigError
from ffdist.data.files import (
    FORMAT,
    Skipped,
    and_skipped,
    describe_skipped,
    extension,
    is_parquet,
    list_files,
    skip,
)
from ffdist.data.images import Sample, decode, is_grey, is_image, pixels
from ffdist.data.parquet import has_images, open_table, rows
from ffdist.paths import kind_of, printable
from ffdist.screen import track
from ffdist.sections import Data


class Inputs(NamedTuple):
    """Images and where they stand."""

    images: Tensor
    """uint8 `[N, channels, height, width]`."""
    labels: Tensor | None
    """True labels `[N]`, where all are known."""
    places: list[str]
    """A file, or a file and row."""
    unlabelled: str = ""
    """Where the first of them is whose label is not known, and what stands there."""
    skipped: str = ""
    """Which files of the folders were not read, and why."""
    meaning: str = ""
    """Where the labels stand, and what they are."""


@dataclass
class _Notes:
    """What is found out while images are read."""

    skipped: Skipped = field(default_factory=dict)
    meanings: Counter[str] = field(default_factory=Counter)
    """Number of files by what their labels are."""
    problem: str = ""
    """Why the first file without known labels has none."""


def read_inputs(
    paths: Sequence[Path], config: Data, shape: tuple[int, int, int], classes: int, names: Sequence[str] = ()
) -> Inputs:
    """Reads images and brings them to the shape that a network was trained on.

    Where the shape is another, an image is resized as in training (`data.image_size`) or to the same proportions; grey
    becomes colour, and colour that is grey in every pixel becomes grey.

    Args:
        paths: Image files, Parquet files and folders of either. A folder that has one for each class, by its name where
            classes have names, else by its number, and no images elsewhere, tells the labels. So does a column of a
            Parquet file, called as in `config` or `label`, of names; or of numbers, where classes go by those.
        config: Columns of Parquet files, and whether training resized.
        shape: Channels, height and width.
        classes: Number of them.
        names: Theirs, where they have some.

    Raises:
        ConfigError: Names the file or row that cannot be brought to it, and the rule.
    """
    images, labels, places, notes = list[Tensor](), list[int | None](), list[str](), _Notes()
    for sample in track(_samples(paths, config, classes, names, notes), "reading images"):
        images.append(pixels(_fitted(decode(sample), sample.place, shape, resize=config.image_size is not None)))
        labels.append(sample.label)
        places.append(sample.place)
    if not images:
        raise ConfigError(
            f"there must be an image to look at (none in: {', '.join(map(printable, paths))}"
            f"{and_skipped(notes.skipped)})"
        )
    skipped = describe_skipped(notes.skipped)
    for place, label in zip(places, labels, strict=True):
        if not (isinstance(label, int) and 0 <= label < classes):
            unlabelled = notes.problem or f"{place} has {'none' if label is None else repr(label)}"
            return Inputs(torch.stack(images), None, places, unlabelled, skipped)
    meaning = ", ".join(f"{meaning} (files: {count:,})" for meaning, count in notes.meanings.items())
    return Inputs(torch.stack(images), torch.tensor(labels), places, skipped=skipped, meaning=meaning)


def write_parquet(columns: dict[str, list[Any]], path: Path) -> None:
    """Writes columns to a Parquet file.

    Raises:
        ConfigError: It cannot be written.
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
        elif is_parquet(path):
            yield from _samples_of_table(path, config, names, notes)
        elif kind == "file":
            yield Sample(path, None, printable(path))
        else:
            raise ConfigError(
                f"{printable(path)} must be an image, a Parquet file or a folder of either; there is none"
            )


def _samples_of_folder(
    folder: Path, config: Data, classes: int, names: Sequence[str], notes: _Notes
) -> Iterator[Sample]:
    files = list_files(folder, notes.skipped)
    tables = {file: None for file in files if is_parquet(file) and has_images(file, config)}
    for table in tables:
        yield from _samples_of_table(table, config, names, notes)
    images = [(file, printable(file.relative_to(folder).parts[0])) for file in files if is_image(file)]
    order = list(names) or _numbers(classes)
    known = all(file.parent != folder and name in order for file, name in images)
    if known and images:
        notes.meanings["names of folders"] += len(images)
    for file, name in images:
        yield Sample(file, order.index(name) if known else None, printable(file))
    skip(notes.skipped, FORMAT, *(extension(file) for file in files if not is_image(file) and file not in tables))


def _samples_of_table(file: Path, config: Data, names: Sequence[str], notes: _Notes) -> Iterator[Sample]:
    """Yields the samples of a Parquet file, without labels where it is not certain which column holds them or how."""
    table, problem = open_table(file, config, labelled=False), ""
    what = "numbers" if table.kind == "integers" and not (names and table.names) else "names"
    if table.label is None:
        problem = f"which column of {printable(file)} holds the labels is not known, of {sorted(table.columns)}"
    elif what == "numbers" and names and list(names) != _numbers(len(names)):
        problem = f"the column {table.label} of {printable(file)} holds numbers, and the classes have names"
    else:
        notes.meanings[f"column {table.label}, {what} of classes"] += 1
    notes.problem = notes.problem or problem
    yield from rows(table._replace(label=None) if problem else table, names)


def _numbers(classes: int) -> list[str]:
    """Returns the names of classes that have none."""
    return [str(number) for number in range(classes)]


def _fitted(image: Image.Image, place: str, shape: tuple[int, int, int], *, resize: bool) -> Image.Image:
    channels, height, width = shape
    if channels == 1 and not is_grey(image):
        raise ConfigError(
            f"{place}: the network was trained on grey images, and this one is in colour; write it in grey"
        )
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size == (width, height):
        return image
    if not resize and image.width * height != image.height * width:
        raise ConfigError(
            f"{place}: the network was trained on images of {height} x {width}, and this one, {image.height} x "
            f"{image.width}, has other proportions; cut it to them"
        )
    return image.resize((width, height), Image.Resampling.BILINEAR)
