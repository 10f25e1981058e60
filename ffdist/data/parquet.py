"""Parquet files of images: selection of columns, class names and rows."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ffdist.config.sections import Data
from ffdist.data.images import Sample
from ffdist.errors import ConfigError
from ffdist.storage.paths import printable

LABEL_COLUMNS = ("label", "labels")
"""Lower-case names of columns that are recognized as labels."""
BATCH_ROWS = 128
"""Number of rows per read. It is small because a photograph can have several megabytes."""


class Table(NamedTuple):
    """A Parquet file and the columns to read."""

    file: Path
    image: str
    """Name of the image column."""
    label: str | None
    """Name of the label column, or None if there is none and labels are optional."""
    label_type: str
    """`integers`, `strings` (also for booleans), or empty without a label column or for any other type."""
    names: tuple[str, ...]
    """Class names from the metadata of Hugging Face's `datasets`, or empty."""
    columns: frozenset[str]
    """Names of all columns."""
    num_rows: int


def has_images(file: Path, config: Data) -> bool:
    """Returns whether a Parquet file has an image column; True if it cannot be read, so that reading reports why."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return True
    return config.image_column in schema.names or any(_is_image_type(field.type) for field in schema)


def open_table(file: Path, config: Data, *, require_labels: bool = True) -> Table:
    """Selects the columns of a Parquet file.

    Args:
        file: The file.
        config: Column names, if set.
        require_labels: Whether labels are required. If they are optional, only the column named in `config` or `label`
            is used. If they are required, a single other integer column is used, too.

    Raises:
        ConfigError: The file cannot be read, or the columns are missing or ambiguous.
    """
    import pyarrow.parquet as pq

    with _convert_errors(file), pq.ParquetFile(file) as parquet:
        schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
    types = {field.name: field.type for field in schema}
    image = _image_column(file, types, config.image_column)
    label = _label_column(file, schema, config.label_column, require=require_labels)
    if duplicates := [name for name in (image, label) if schema.names.count(name) > 1]:
        raise ConfigError(
            f"{printable(file)}: the image and label columns must have unique names ({duplicates[0]}: "
            f"{schema.names.count(duplicates[0])} columns); rename or remove the others"
        )
    label_type = _label_type(types[label]) if label is not None else ""
    names = _class_names(schema, label) if label_type == "integers" else []
    return Table(file, image, label, label_type, tuple(names), frozenset(types), num_rows)


def check_same_columns(tables: dict[str, list[Table]]) -> None:
    """Checks that all files have the same image and label columns, and that files of a split have the same schema.

    Raises:
        ConfigError: Two files differ.
    """
    first = next(iter(tables.values()))[0]
    for split_tables in tables.values():
        head = split_tables[0]
        for table in split_tables:
            if table[1:4] != first[1:4]:
                columns = [f"{each.image} and {each.label} ({each.label_type})" for each in (first, table)]
                raise ConfigError(
                    f"{_pair(first, table)} must have the same image and label columns "
                    f"({' in one, '.join(columns)} in the other); set data.image_column and data.label_column, or use "
                    f"the same schema"
                )
            if extra := table.columns ^ head.columns:
                raise ConfigError(f"{_pair(head, table)} must have the same columns (only in one: {sorted(extra)})")
            if bool(table.names) != bool(head.names):
                named = printable((head if head.names else table).file)
                raise ConfigError(f"{_pair(head, table)} must both name the classes or neither (only {named} does)")


def read_class_names(tables: Sequence[Table]) -> list[str]:
    """Returns the distinct labels of files with string labels, sorted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = set[str]()
    for table in tables:
        with _convert_errors(table.file):
            column = pq.read_table(table.file, columns=[table.label]).column(0)
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            labels |= {str(label) for label in column.unique().to_pylist() if label is not None}
    return sorted(labels)


def read_rows(table: Table, names: Sequence[str] = ()) -> Iterator[Sample]:
    """Yields the samples of a Parquet file. Without a label column, labels are None.

    Converts class names to their index in `names`. A name that is not in `names` stays a string.

    Raises:
        ConfigError: The file cannot be read.
    """
    import pyarrow.parquet as pq

    file_names = enumerate(table.names) if names else ()
    mapping = {index: names.index(name) if name in names else name for index, name in file_names}
    columns, row = [table.image, *([table.label] if table.label is not None else [])], 0
    location = printable(table.file)
    with _convert_errors(table.file), pq.ParquetFile(table.file) as parquet:
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            labels = [None] * batch.num_rows if table.label is None else batch[table.label].to_pylist()
            for encoded, label in zip(batch[table.image].to_pylist(), labels, strict=True):
                content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
                if content is None:
                    raise ConfigError(f"{location}, row {row}: an image must be encoded bytes (image: null)")
                yield Sample(content, _class_index(label, names, mapping), f"{location}, row {row}")
                row += 1


def _class_index(label: Any, names: Sequence[str], mapping: dict[int, int | str]) -> Any:
    if isinstance(label, bool | str):
        return names.index(str(label)) if str(label) in names else str(label)
    return mapping.get(label, label) if isinstance(label, int) else label


def _pair(first: Table, second: Table) -> str:
    return f"{printable(first.file)} and {printable(second.file)}"


@contextmanager
def _convert_errors(file: Path) -> Iterator[None]:
    """Re-raises read errors as ConfigError naming the file."""
    import pyarrow as pa

    try:
        yield
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # for example, text that is not UTF-8
        raise ConfigError(
            f"{printable(file)} cannot be read as Parquet: {' '.join(str(error).split())[:200]}; write it again"
        ) from error


def _image_column(file: Path, types: dict[str, Any], setting: str | None) -> str:
    candidates = [name for name, arrow_type in types.items() if _is_image_type(arrow_type)]
    if setting is None and len(candidates) == 1:
        return candidates[0]
    if setting is None:
        raise ConfigError(
            f"{printable(file)}: data.image_column must name the image column (candidates: {candidates}, all columns: "
            f"{list(types)}); images are encoded bytes or {{bytes, path}} structs"
        )
    if setting not in candidates:
        raise ConfigError(
            f"{printable(file)}: data.image_column={setting} must be a column of encoded bytes or {{bytes, path}} "
            f"structs ({_describe_column(setting, types)})"
        )
    return setting


def _label_column(file: Path, schema: Any, setting: str | None, *, require: bool) -> str | None:
    import pyarrow as pa

    types = {field.name: field.type for field in schema}
    by_name, index = [name for name in types if name.lower() in LABEL_COLUMNS], _index_columns(schema)
    integers = [name for name in types if pa.types.is_integer(types[name]) and name not in index]
    candidates: list[str] = by_name or integers if require else by_name
    if setting is not None and (require or setting in types):
        candidates = [setting]
    if len(candidates) == 1 and candidates[0] in types:
        if require and not _label_type(types[candidates[0]]):
            raise ConfigError(
                f"{printable(file)}: labels must be non-negative integers, strings or booleans (the column "
                f"{candidates[0]} is of type {types[candidates[0]]}); convert it, or set data.label_column"
            )
        return candidates[0]
    if not require:
        return None
    if setting is not None:
        raise ConfigError(
            f"{printable(file)}: data.label_column must be one of the columns ({_describe_column(setting, types)})"
        )
    raise ConfigError(
        f"{printable(file)}: data.label_column must name the label column (candidates: {candidates}, all columns: "
        f"{list(types)}); a column named label is used by default"
    )


def _describe_column(name: str, types: dict[str, Any]) -> str:
    return f"{name} is of type {types[name]}" if name in types else f"given: {name}, columns: {list(types)}"


def _index_columns(schema: Any) -> set[str]:
    """Returns the names of the columns that hold a pandas index, such as row numbers."""
    index = {name for name in schema.names if name.startswith("__index_level_")}
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


def _is_image_type(arrow_type: Any) -> bool:
    import pyarrow as pa

    is_binary = (pa.types.is_binary, pa.types.is_large_binary)
    if pa.types.is_struct(arrow_type):
        return any(field.name == "bytes" and any(test(field.type) for test in is_binary) for field in arrow_type)
    return any(test(arrow_type) for test in is_binary)
