"""Tables of samples in Parquet files, CSV files and Hugging Face's `datasets`: columns, class names and rows.

A table holds images (encoded, or the names of image files) or numbers. Its columns decide which.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.config.sections import Data
from ffdist.data.images import Sample
from ffdist.errors import ConfigError
from ffdist.storage.paths import printable

LABEL_COLUMNS = ("label", "labels")
"""Lower-case names of columns that are recognized as labels."""
FILE_COLUMNS = ("file_name", "file", "path")
"""Lower-case names of columns of CSV files that are recognized as the names of image files."""
BATCH_ROWS = 128
"""Number of images per read. It is small because a photograph can have several megabytes."""
BLOCK_VALUES = 2**20
"""Number of numbers per read."""


class Source(NamedTuple):
    """The rows of a table, wherever they are."""

    location: str
    """File or dataset, for messages."""
    format: str
    """Name of the format, for messages."""
    schema: Any
    """Arrow schema."""
    num_rows: int
    batches: Callable[[list[str], int], Iterator[Any]]
    """Reads columns, as Arrow record batches of at most a number of rows."""
    folder: Path | None = None
    """Folder of the image files that a column may name; None if none may."""


class Table(NamedTuple):
    """A source and the columns to read."""

    source: Source
    image: str | None
    """Name of the column of images or of file names; None for a table of numbers."""
    label: str | None
    """Name of the label column, or None if there is none and labels are optional."""
    label_type: str
    """`integers`, `strings` (also for booleans), or empty without a label column or for any other type."""
    names: tuple[str, ...]
    """Class names from the metadata of Hugging Face's `datasets`, or empty."""
    features: tuple[str, ...]
    """Names of the columns of a table of numbers, in their order."""


def open_source(file: Path) -> Source:
    """Opens a Parquet file, or reads a CSV file.

    Raises:
        ConfigError: The file cannot be read.
    """
    return _open_csv(file) if file.suffix.lower() == ".csv" else _open_parquet(file)


def _open_parquet(file: Path) -> Source:
    import pyarrow.parquet as pq

    def batches(columns: list[str], rows: int) -> Iterator[Any]:
        with pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(batch_size=rows, columns=columns)

    with _convert_errors(printable(file), "Parquet"), pq.ParquetFile(file) as parquet:
        return Source(printable(file), "Parquet", parquet.schema_arrow, parquet.metadata.num_rows, batches)


def _open_csv(file: Path) -> Source:
    from pyarrow import csv

    with _convert_errors(printable(file), "CSV"):
        table = csv.read_csv(file)
    if all(_is_numeral(name) for name in table.schema.names):
        raise ConfigError(f"{printable(file)}: the first line must hold names of columns (it holds numbers); add one")

    def batches(columns: list[str], rows: int) -> Iterator[Any]:
        yield from table.select(columns).to_batches(max_chunksize=rows)

    return Source(printable(file), "CSV", table.schema, table.num_rows, batches, file.parent)


def _is_numeral(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def has_images(file: Path, config: Data) -> bool:
    """Returns whether a Parquet file has an image column; True if it cannot be read, so that reading reports why."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return True
    return config.image_column in schema.names or any(_is_image_type(field.type) for field in schema)


def open_table(
    source: Source,
    config: Data,
    *,
    require_labels: bool = True,
    require_images: bool = False,
    features: Sequence[str] | None = None,
) -> Table:
    """Selects the columns of a table.

    Args:
        source: The table.
        config: Column names, if set.
        require_labels: Whether labels are required. If they are optional, only the column named in `config` or `label`
            is used. If they are required, a single other column of integers is used, too, or of strings beside numbers.
        require_images: Whether the table must hold images.
        features: Columns of numbers to read; by default, images if there are any, else all columns but the label.

    Raises:
        ConfigError: The columns are missing or ambiguous.
    """
    schema = source.schema
    types = {field.name: field.type for field in schema}
    image = None if features else _image_column(source, types, config.image_column, require=require_images)
    label = _label_column(source, config.label_column, require=require_labels, are_numbers=image is None)
    if image is None:
        selected = tuple(features or _feature_columns(source, types, label))
        _check_numbers(source, types, selected)
    else:
        selected = ()
    if duplicates := [name for name in (image, label, *selected) if schema.names.count(name) > 1]:
        raise ConfigError(
            f"{source.location}: the selected columns must have unique names ({duplicates[0]}: "
            f"{schema.names.count(duplicates[0])} columns); rename or remove the others"
        )
    label_type = _label_type(types[label]) if label is not None else ""
    names = _class_names(schema, label) if label_type == "integers" else []
    return Table(source, image, label, label_type, tuple(names), selected)


def check_same_columns(tables: dict[str, list[Table]]) -> None:
    """Checks that all tables have the same columns of samples and labels, and those of a split the same columns.

    Raises:
        ConfigError: Two tables differ.
    """
    first = next(iter(tables.values()))[0]
    for split_tables in tables.values():
        head = split_tables[0]
        for table in split_tables:
            if table[1:4] != first[1:4]:
                columns = [f"{each.image or 'numbers'} and {each.label} ({each.label_type})" for each in (first, table)]
                raise ConfigError(
                    f"{_pair(first, table)} must have the same image and label columns "
                    f"({' in one, '.join(columns)} in the other); set data.image_column and data.label_column, or use "
                    f"the same schema"
                )
            if extra := set(table.source.schema.names) ^ set(head.source.schema.names):
                raise ConfigError(f"{_pair(head, table)} must have the same columns (only in one: {sorted(extra)})")
            if extra := set(table.features) ^ set(first.features):
                raise ConfigError(f"{_pair(first, table)} must have the same columns (only in one: {sorted(extra)})")
            if bool(table.names) != bool(head.names):
                named = (head if head.names else table).source.location
                raise ConfigError(f"{_pair(head, table)} must both name the classes or neither (only {named} does)")


def read_class_names(tables: Sequence[Table]) -> list[str]:
    """Returns the distinct labels of tables with string labels, sorted."""
    import pyarrow as pa

    labels = set[str]()
    for table in tables:
        assert table.label is not None, "labels are required"
        with _convert_errors(table.source.location, table.source.format):
            for batch in table.source.batches([table.label], BLOCK_VALUES):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.cast(column.type.value_type)
                labels |= {str(label) for label in column.unique().to_pylist() if label is not None}
    return sorted(labels - {""})


def read_images(table: Table, names: Sequence[str] = ()) -> Iterator[Sample]:
    """Yields the samples of a table of images. Without a label column, labels are None.

    Converts class names to their index in `names`. A name that is not in `names` stays a string.

    Raises:
        ConfigError: The table cannot be read.
    """
    assert table.image is not None, "it holds images"
    source, to_class, row = table.source, _class_numbers(table, names), 0
    columns = [table.image, *([table.label] if table.label is not None else [])]
    with _convert_errors(source.location, source.format):
        for batch in source.batches(columns, BATCH_ROWS):
            labels = [None] * batch.num_rows if table.label is None else batch.column(table.label).to_pylist()
            for encoded, label in zip(batch.column(table.image).to_pylist(), labels, strict=True):
                content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
                location = f"{source.location}, row {row}"
                if content is None:
                    path = encoded.get("path") if isinstance(encoded, dict) else None
                    fix = "use save_to_disk of datasets, which stores the bytes" if path else "remove the row"
                    raise ConfigError(f"{location}: an image must be encoded bytes (path: {path}, bytes: null); {fix}")
                if isinstance(content, str):
                    assert source.folder is not None, "strings are only selected there"
                    location, content = f"{location} ({content})", source.folder / content
                yield Sample(content, to_class(label), location)
                row += 1


def read_numbers(table: Table, names: Sequence[str] = ()) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yields blocks of rows of a table of numbers: float32 `[n, D]`, and labels as `read_images` yields them.

    Raises:
        ConfigError: The table cannot be read, or a number is missing or not finite.
    """
    source, to_class, row = table.source, _class_numbers(table, names), 0
    columns = [*table.features, *([table.label] if table.label is not None else [])]
    with _convert_errors(source.location, source.format):
        for batch in source.batches(columns, max(1, BLOCK_VALUES // len(columns))):
            block = torch.empty(batch.num_rows, len(table.features))
            for index, name in enumerate(table.features):
                block[:, index] = _to_numbers(batch.column(name), f"the column {name}", source.location, row)
            labels = [None] * batch.num_rows if table.label is None else batch.column(table.label).to_pylist()
            yield block, [to_class(label) for label in labels]
            row += batch.num_rows


def _to_numbers(column: Any, name: str, location: str, first_row: int) -> Tensor:
    import pyarrow as pa

    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)  # missing values become NaN
    numbers = torch.tensor(values, dtype=torch.float32)
    invalid = (~numbers.isfinite()).nonzero().flatten().tolist()
    if invalid:
        value = column[invalid[0]].as_py()
        raise ConfigError(
            f"{location}, row {first_row + invalid[0]}: {name} must hold a finite 32-bit number (value: "
            f"{'missing' if value is None else value}); fill it in, or remove the row or the column"
        )
    return numbers


def _class_numbers(table: Table, names: Sequence[str]) -> Callable[[Any], Any]:
    """Returns a function that converts a label of a table to its class; it returns unknown ones as they are."""
    by_name = {name: number for number, name in enumerate(names)}
    by_index = {index: by_name.get(name, name) for index, name in enumerate(table.names if names else ())}

    def to_class(label: Any) -> Any:
        if isinstance(label, bool | str):
            return by_name.get(str(label), str(label))
        return by_index.get(label, label) if isinstance(label, int) else label

    return to_class


def _pair(first: Table, second: Table) -> str:
    return f"{first.source.location} and {second.source.location}"


@contextmanager
def _convert_errors(location: str, format_name: str) -> Iterator[None]:
    """Re-raises read errors as ConfigError naming the file."""
    import pyarrow as pa

    try:
        yield
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # for example, text that is not UTF-8
        raise ConfigError(
            f"{location} cannot be read as {format_name}: {' '.join(str(error).split())[:200]}; write it again"
        ) from error


def _image_column(source: Source, types: dict[str, Any], setting: str | None, *, require: bool) -> str | None:
    candidates = [name for name, arrow_type in types.items() if _is_image_type(arrow_type)]
    if source.folder is not None:
        strings = [name for name, arrow_type in types.items() if _label_type(arrow_type) == "strings"]
        candidates = candidates or [name for name in strings if name == setting or name.lower() in FILE_COLUMNS]
    if setting is None and len(candidates) == 1:
        return candidates[0]
    if setting is None and not candidates and not require:
        return None
    if setting is None:
        raise ConfigError(
            f"{source.location}: data.image_column must name the image column (candidates: {candidates}, all columns: "
            f"{list(types)}); images are encoded bytes or {{bytes, path}} structs, or, in CSV files, names of files"
        )
    if setting not in candidates:
        raise ConfigError(
            f"{source.location}: data.image_column={setting} must be a column of encoded bytes or {{bytes, path}} "
            f"structs, or, in a CSV file, of file names ({_describe_column(setting, types)})"
        )
    return setting


def _label_column(source: Source, setting: str | None, *, require: bool, are_numbers: bool) -> str | None:
    import pyarrow as pa

    types, index = {str(field.name): field.type for field in source.schema}, _index_columns(source.schema)
    candidates = [name for name in types if name.lower() in LABEL_COLUMNS]
    if require and not candidates:
        types_of_others = {name: _label_type(types[name]) for name in types if name not in index}
        integers = [name for name, label_type in types_of_others.items() if label_type == "integers"]
        strings = [name for name, label_type in types_of_others.items() if label_type == "strings"]
        strings = [name for name in strings if are_numbers and not pa.types.is_boolean(types[name])]
        candidates = strings or integers
    if setting is not None and (require or setting in types):
        candidates = [setting]
    if len(candidates) == 1 and candidates[0] in types:
        if require and not _label_type(types[candidates[0]]):
            raise ConfigError(
                f"{source.location}: labels must be non-negative integers, strings or booleans (the column "
                f"{candidates[0]} is of type {types[candidates[0]]}); convert it, or set data.label_column"
            )
        return candidates[0]
    if not require:
        return None
    if setting is not None:
        raise ConfigError(
            f"{source.location}: data.label_column must be one of the columns ({_describe_column(setting, types)})"
        )
    raise ConfigError(
        f"{source.location}: data.label_column must name the label column (candidates: {candidates}, all columns: "
        f"{list(types)}); a column named label is used by default"
    )


def _feature_columns(source: Source, types: dict[str, Any], label: str | None) -> list[str]:
    index = _index_columns(source.schema)
    return [name for name in types if name != label and name not in index]


def _check_numbers(source: Source, types: dict[str, Any], features: Sequence[str]) -> None:
    """Checks the columns of a table of numbers."""
    if missing := [name for name in features if name not in types]:
        raise ConfigError(
            f"{source.location} must have the columns that the network was trained on (missing: {_first(missing)}; "
            f"columns: {_first(list(types))})"
        )
    if texts := [f"{name}: {types[name]}" for name in features if not _is_number_type(types[name])]:
        raise ConfigError(
            f"{source.location}: all columns of a table but the label must be numbers (others: {_first(texts)}); "
            f"encode or remove them, or, for images, set data.image_column"
        )
    if not features:
        raise ConfigError(f"{source.location} must have a column beside the label (columns: {_first(list(types))})")


def _first(names: list[str]) -> str:
    return ", ".join(names[:10]) + ", ..." * (len(names) > 10)


def _describe_column(name: str, types: dict[str, Any]) -> str:
    return f"{name} is of type {types[name]}" if name in types else f"given: {name}, columns: {list(types)}"


def _index_columns(schema: Any) -> set[str]:
    """Returns the names of the columns that hold a pandas index, such as row numbers."""
    index = {name for name in schema.names if name.startswith("__index_level_") or name in ("", "Unnamed: 0")}
    with suppress(ValueError, LookupError, TypeError):  # without pandas metadata
        index |= {name for name in json.loads(schema.metadata[b"pandas"])["index_columns"] if isinstance(name, str)}
    return index


def _class_names(schema: Any, label: str | None) -> list[str]:
    """Returns the class names from the metadata of Hugging Face's `datasets`, or an empty list."""
    with suppress(ValueError, LookupError, TypeError):
        return list(map(str, json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]))
    return []


def _label_type(arrow_type: Any) -> str:
    """Returns the `Table.label_type` of a column of an Arrow type."""
    import pyarrow as pa

    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    if pa.types.is_integer(arrow_type):
        return "integers"
    is_string = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    return "strings" if any(test(arrow_type) for test in is_string) else ""


def _is_number_type(arrow_type: Any) -> bool:
    """Returns whether a column of an Arrow type can hold numbers; a column without any value has the type null."""
    import pyarrow as pa

    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean, pa.types.is_null)
    return any(test(arrow_type) for test in tests)


def _is_image_type(arrow_type: Any) -> bool:
    import pyarrow as pa

    is_binary = (pa.types.is_binary, pa.types.is_large_binary)
    if pa.types.is_struct(arrow_type):
        return any(field.name == "bytes" and any(test(field.type) for test in is_binary) for field in arrow_type)
    return any(test(arrow_type) for test in is_binary)
