"""A user's own images: Parquet files and image folders, checked sample by sample."""

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ffdist.config import ConfigError
from ffdist.sections import MOST_CLASSES, Data

SPLITS = ("train", "test")
UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows and leaves to others to decode; Ghostscript would run what an EPS holds."""
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's tag that says how a photograph is stored, and what brings it upright."""


class Sample(NamedTuple):
    """An image that is still to be decoded."""

    image: Any
    """Encoded bytes, or the path of a file."""
    label: Any
    place: str
    """Where it stands, for errors."""


def read_parquet(config: Data) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Reads `train*` and `test*`, files or folders of files, of `data.path`.

    The image column holds encoded images, as bytes or as the common `{bytes, path}` structure; the label column holds
    integers from 0 on.

    Returns:
        uint8 images `[N, channels, height, width]` and int64 labels `[N]`, by split; and the names of the classes, in
        their order, where Hugging Face's `datasets` wrote them.

    Raises:
        ConfigError: Names the file and row that break a rule.
    """
    assert config.path is not None
    files = {split: _files(config.path, split) for split in SPLITS}
    names = _class_names(files["train"][0], config.label_column)
    samples = {split: chain.from_iterable(rows(f, config, names) for f in files[split]) for split in SPLITS}
    return *_read(config, samples, config.classes or len(names)), names


def read_image_folder(config: Data) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Reads one image folder per split (`train*` and `test*`), each with one folder per class, as torchvision does.

    Returns:
        As `read_parquet`; and the names of the classes, in their order, by which they are numbered.

    Raises:
        ConfigError: Names the folder or file that breaks a rule.
    """
    from torchvision.datasets import ImageFolder

    assert config.path is not None
    folders = {}
    for split in SPLITS:
        found = [path for path in sorted(config.path.glob(f"{split}*")) if path.is_dir()]
        if len(found) != 1:
            raise ConfigError(f"data.path must hold one folder {split}* (path: {config.path}, found: {len(found)})")
        try:
            folders[split] = ImageFolder(str(found[0]), is_valid_file=lambda file: is_image(Path(file)))
        except OSError as error:
            raise ConfigError(f"{found[0]}: {' '.join(str(error).split())}") from error
    if folders["train"].classes != folders["test"].classes:
        odd = sorted(set(folders["train"].classes) ^ set(folders["test"].classes))
        raise ConfigError(f"{config.path}: train and test must have the same class folders (only in one: {odd})")
    samples = {
        split: (Sample(Path(path), label, printable(path)) for path, label in folder.samples)
        for split, folder in folders.items()
    }
    names = folders["train"].classes
    return *_read(config, samples, config.classes or len(names)), names


def _read(
    config: Data, splits: Mapping[str, Iterable[Sample]], classes: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from ffdist.screen import track

    mode, size, most = None, config.image_size, min(classes or MOST_CLASSES, MOST_CLASSES)
    images, labels = {}, {}
    for split, samples in splits.items():
        decoded: list[Tensor] = []
        numbers: list[int] = []
        for sample in track(samples, f"reading {split} images"):
            image = decode(sample)
            mode = mode or ("L" if image.mode in ("1", "L") else "RGB")
            if image.mode not in ("1", "L") and mode == "L":
                raise ConfigError(
                    f"{sample.place}: the first image is grey and this one is not (mode: {image.mode}); "
                    f"write all of them in grey, or all in colour"
                )
            size = size or (image.height, image.width)
            if (image.height, image.width) != size and not config.image_size:
                raise ConfigError(
                    f"{sample.place}: every image must be as large as the first (first: {size[0]} x {size[1]}, this: "
                    f"{image.height} x {image.width}); set data.image_size to [height, width] to resize them"
                )
            image = image.convert(mode)
            if image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            decoded.append(pixels(image))
            if not isinstance(sample.label, int) or not 0 <= sample.label < most:
                below = f"{most}{', the number of classes' if most == classes else ''}"
                raise ConfigError(
                    f"{sample.place}: a label must be an integer from 0 to below {below} (label: {sample.label!r})"
                )
            numbers.append(sample.label)
        if not decoded:
            raise ConfigError(f"{config.path}: the {split} split is empty; it must hold at least one sample")
        images[split], labels[split] = torch.stack(decoded), torch.tensor(numbers)
        most = classes = classes or max(numbers) + 1
    return images, labels


@cache
def _formats() -> list[str]:
    """Returns the formats of images that can be read."""
    Image.init()
    return [kind for kind in Image.OPEN if kind not in UNREADABLE]


def is_image(file: Path) -> bool:
    """Says whether a file's name is that of an image that can be read."""
    kind = Image.registered_extensions().get(file.suffix.lower())
    return kind in _formats() and not file.name.startswith(".")


def has_images(file: Path, config: Data) -> bool:
    """Says whether a Parquet file has a column of images; where that cannot be seen, reading it will say why."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.name.startswith(".") or file.is_dir():
        return False
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return True
    return config.image_column in schema.names or any(_holds_images(field.type) for field in schema)


def printable(path: Path | str) -> str:
    """Returns a path as it can be printed and written, whatever bytes its name is of."""
    return os.fsencode(path).decode(errors="replace")


def decode(sample: Sample) -> Image.Image:
    """Returns the image of a sample, upright, of 8 bits a channel and without transparency, whatever its mode.

    Raises:
        ConfigError: It cannot be decoded, has more bits, or is transparent somewhere.
    """
    try:
        content = io.BytesIO(sample.image) if isinstance(sample.image, bytes) else sample.image
        image: Image.Image = Image.open(content, formats=_formats())
        image.load()
    except Exception as error:  # each format has its own
        raise ConfigError(
            f"{sample.place}: the image cannot be decoded ({' '.join(str(error).split())[:200]}); "
            f"remove the sample or write it anew"
        ) from error
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        raise ConfigError(
            f"{sample.place}: images have 8 bits a channel (mode: {image.mode}); scale this one to 0 to 255"
        )
    with suppress(Exception):  # of EXIF data that nobody can read
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        image = image if turn is None else image.transpose(turn)
    if not image.has_transparency_data:
        return image
    opaque = image.convert("RGBA")
    if min(opaque.getchannel("A").tobytes()) < 255:
        raise ConfigError(
            f"{sample.place}: an image must not be transparent (mode: {image.mode}); put it on a background"
        )
    return image if image.mode in ("1", "L") else opaque.convert("RGB")


def pixels(image: Image.Image) -> Tensor:
    """Returns the pixels of an image, uint8 `[channels, height, width]`."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1)


def _files(folder: Path, split: str) -> list[Path]:
    found = sorted(folder.glob(f"{split}*"))
    files = [file for path in found for file in ([path] if path.is_file() else sorted(path.rglob("*.parquet")))]
    files = [file for file in files if file.suffix == ".parquet"]
    if not files:
        raise ConfigError(
            f"data.path must hold {split}*.parquet or a folder {split}* of Parquet files (path: {folder})"
        )
    return files


def rows(file: Path, config: Data, names: Sequence[str] = (), *, labelled: bool = True) -> Iterator[Sample]:
    """Yields the samples of a Parquet file; where they need no label, None stands for one that there is not.

    Where both it and the caller name the classes, they are numbered as in `names`, and one that is not there is called
    by its name.

    Raises:
        ConfigError: The file cannot be read, or its columns are not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            image = _column(file, schema, "image_column", config.image_column, _holds_images)
            integers = [field.name for field in schema if pa.types.is_integer(field.type)]
            columns, wanted = [image], config.label_column
            if not labelled and wanted is None and len(integers) > 1:
                wanted = "label"
            if labelled or wanted in integers or (wanted is None and integers):
                columns.append(_column(file, schema, "label_column", wanted, pa.types.is_integer))
            own, row = _class_names(file, columns[1]) if names and len(columns) == 2 else [], 0
            numbered = {index: names.index(name) if name in names else name for index, name in enumerate(own)}
            for batch in parquet.iter_batches(batch_size=1024, columns=columns):
                listed = batch[columns[-1]].to_pylist() if len(columns) == 2 else [None] * batch.num_rows
                for encoded, number in zip(batch[image].to_pylist(), listed, strict=True):
                    content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
                    if content is None:
                        raise ConfigError(f"{file}, row {row}: an image is its encoded bytes, and here are none")
                    yield Sample(content, numbered.get(number, number), f"{printable(file)}, row {row}")
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error


def _class_names(file: Path, label_column: str | None) -> list[str]:
    """Returns the names that Hugging Face's `datasets` gives the classes in a file; none where it did not write it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with suppress(pa.ArrowException, OSError, ValueError, LookupError, TypeError):  # reading the rows says what it is
        schema = pq.read_schema(file)
        label = _column(file, schema, "label_column", label_column, pa.types.is_integer)
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
        return list(map(str, names)) if len(names) <= MOST_CLASSES else []
    return []


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    binary = (pa.types.is_binary, pa.types.is_large_binary)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and any(test(field.type) for test in binary) for field in kind)
    return any(test(kind) for test in binary)


def _column(file: Path, schema: Any, setting: str, wanted: str | None, fits: Any) -> str:
    candidates = [field.name for field in schema if fits(field.type)]
    if wanted is None and len(candidates) == 1:
        return str(candidates[0])
    if wanted in candidates:
        return str(wanted)
    asked = (
        f"data.{setting}={wanted} is none" if wanted else f"there must be exactly one, or data.{setting} must name it"
    )
    raise ConfigError(
        f"{file}: {asked} (candidates: {candidates}, all columns: {schema.names}); images are encoded bytes or "
        f"{{bytes, path}} structures, labels are integers"
    )
