"""Images that a finished network is to look at: files, folders and Parquet files, brought to its shape."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageChops
from torch import Tensor

from ffdist.config import ConfigError
from ffdist.data.images import Sample, decode, has_images, is_image, pixels, printable, rows
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


def read_inputs(
    paths: Sequence[Path], config: Data, shape: tuple[int, int, int], classes: int, names: Sequence[str] = ()
) -> Inputs:
    """Reads images and brings them to the shape that a network was trained on.

    Where the shape is another, an image is resized as in training (`data.image_size`) or to the same proportions; grey
    becomes colour, and colour that is grey in every pixel becomes grey.

    Args:
        paths: Image files, Parquet files and folders of either. A folder that has one for each class, by its name where
            classes have names, else by its number, and no images elsewhere, tells the labels.
        config: Columns of Parquet files, and whether training resized.
        shape: Channels, height and width.
        classes: Number of them.
        names: Theirs, where they have some.

    Raises:
        ConfigError: Names the file or row that cannot be brought to it, and the rule.
    """
    images, labels, places = list[Tensor](), list[int | None](), list[str]()
    for sample in track(_samples(paths, config, classes, names), "reading images"):
        images.append(pixels(_fitted(decode(sample), sample.place, shape, resize=config.image_size is not None)))
        labels.append(sample.label)
        places.append(sample.place)
    if not images:
        raise ConfigError(f"there must be an image to look at (none in: {', '.join(map(str, paths))})")
    for place, label in zip(places, labels, strict=True):
        if not (isinstance(label, int) and 0 <= label < classes):
            told = f"{place} has {'none' if label is None else repr(label)}"
            return Inputs(torch.stack(images), None, places, told)
    return Inputs(torch.stack(images), torch.tensor(labels), places)


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


def _samples(paths: Sequence[Path], config: Data, classes: int, names: Sequence[str]) -> Iterator[Sample]:
    for path in paths:
        if path.is_dir():
            walked = os.walk(path, followlinks=True)  # as torchvision does for training
            files = sorted(Path(folder, name) for folder, _, found in walked for name in found)
            for parquet in (file for file in files if file.suffix == ".parquet" and has_images(file, config)):
                yield from rows(parquet, config, names, labelled=False)
            order = list(names) or [str(number) for number in range(classes)]
            images = [(file, file.relative_to(path).parts) for file in files if is_image(file)]
            known = all(len(parts) > 1 and parts[0] in order for _, parts in images)
            for file, (first, *_) in images:
                yield Sample(file, order.index(first) if known else None, printable(file))
        elif path.suffix == ".parquet":
            yield from rows(path, config, names, labelled=False)
        elif path.is_file():
            yield Sample(path, None, printable(path))
        else:
            raise ConfigError(f"{path} must be an image, a Parquet file or a folder of either; there is none")


def _fitted(image: Image.Image, place: str, shape: tuple[int, int, int], *, resize: bool) -> Image.Image:
    channels, height, width = shape
    if channels == 1 and image.mode not in ("1", "L"):
        red, green, blue = image.convert("RGB").split()
        if any(ImageChops.difference(red, other).getbbox() for other in (green, blue)):
            raise ConfigError(
                f"{place}: the network was trained on grey images, and this one is in colour; write it in grey"
            )
        image = red
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size == (width, height):
        return image
    if not resize and image.width * height != image.height * width:
        raise ConfigError(
            f"{place}: the network was trained on images of {height} x {width}, and this one, {image.height} x "
            f"{image.width}, has other proportions; cut it to them"
        )
    return image.resize((width, height), Image.Resampling.BILINEAR)
