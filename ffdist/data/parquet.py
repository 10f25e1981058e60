"""Parquet files of images: their columns, class names and rows."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ffdist.config import ConfigError
from ffdist.data.images import Sample
from ffdist.paths import printable
from ffdist.sections import Data

LABELS = ("label", "labels")
"""Names of a column that holds the labels whatever other columns there are."""
ROWS = 128
"""Rows that are read together; a photograph may have several megabytes."""


class Table(NamedTuple):
    """A Parquet file and which of its columns are read."""

    file: Path
    image: str
    """Column of images."""
    label: str | None
    """Column of labels; None where there is none and none is needed."""
    kind: str
    """What labels are: `integers`, `words` (also booleans), or another type, which no label has."""
    names: tuple[str, ...]
    """Names of the classes, where Hugging Face's `datasets` wrote them."""
    columns: frozenset[str]
    """Names of all columns."""
    num_rows: int


def has_images(file: Path, config: Data) -> bool:
    """Says whether a Parquet file has a column of images; where that cannot be seen, reading it will say why."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return True
    return config.image_column in schema.names or any(_holds_images(field.type) for field in schema)


def open_table(file: Path, config: Data, *, labelled: bool = True) -> Table:
    """Returns which columns of a Parquet file are read.

    Args:
        file: The file.
        config: Names the columns, where it does.
        labelled: Whether there must be labels. Else they are in the column that `config` names or one called `label`,
            and not in another of integers, which may be anything.

    Raises:
        ConfigError: The file cannot be read, or which column is meant cannot be decided.
    """
    import pyarrow.parquet as pq

    with _reading(file), pq.ParquetFile(file) as parquet:
        schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
    types = {field.name: field.type for field in schema}
    image = _image_column(file, types, config.image_column)
    label = _label_column(file, schema, config.label_column, labelled=labelled)
    if twice := [name for name in (image, label) if schema.names.count(name) > 1]:
        raise ConfigError(
            f"{printable(file)}: a column that is read must be the only one of its name ({twice[0]}: "
            f"{schema.names.count(twice[0])} columns); rename the others, or remove them"
        )
    kind = _kind(types[label]) if label is not None else ""
    names = _class_names(schema, label) if kind == "integers" else []
    return Table(file, image, label, kind, tuple(names), frozenset(types), num_rows)


def check_alike(tables: dict[str, list[Table]]) -> None:
    """Makes sure that the files of all splits are read alike, and that those of one split have the same columns.

    Raises:
        ConfigError: Two files differ.
    """
    first = next(iter(tables.values()))[0]
    for of_split in tables.values():
        one = of_split[0]
        for table in of_split:
            if table[1:4] != first[1:4]:
                read = [f"{each.image} and {each.label} ({each.kind})" for each in (first, table)]
                raise ConfigError(
                    f"{_both(first, table)} must have the same columns of images and labels ({' in one, '.join(read)} "
                    f"in the other); set data.image_column and data.label_column, or write them alike"
                )
            if only := table.columns ^ one.columns:
                raise ConfigError(f"{_both(one, table)} must have the same columns (only in one: {sorted(only)})")
            if bool(table.names) != bool(one.names):
                named = one if one.names else table
                raise ConfigError(
                    f"{_both(one, table)} must both name the classes or neither (only {printable(named.file)} does)"
                )


def words_of(tables: Sequence[Table]) -> list[str]:
    """Returns the different labels of files in which labels are words, sorted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = set[str]()
    for table in tables:
        with _reading(table.file):
            column = pq.read_table(table.file, columns=[table.label]).column(0)
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            words |= {str(word) for word in column.unique().to_pylist() if word is not None}
    return sorted(words)


def rows(table: Table, names: Sequence[str] = ()) -> Iterator[Sample]:
    """Yields the samples of a Parquet file; the label of one in a file without labels is None.

    Classes that the file names are numbered as in `names`; one that is not in there is given by its name.

    Raises:
        ConfigError: The file cannot be read.
    """
    import pyarrow.parquet as pq

    own = enumerate(table.names) if names else ()
    numbers = {index: names.index(name) if name in names else name for index, name in own}
    columns, row = [table.image, *([table.label] if table.label is not None else [])], 0
    with _reading(table.file), pq.ParquetFile(table.file) as parquet:
        for batch in parquet.iter_batches(batch_size=ROWS, columns=columns):
            labels = [None] * batch.num_rows if table.label is None else batch[table.label].to_pylist()
            for encoded, label in zip(batch[table.image].to_pylist(), labels, strict=True):
                content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
                if content is None:
                    raise ConfigError(
                        f"{printable(table.file)}, row {row}: an image is its encoded bytes, and here are none"
                    )
                yield Sample(content, _number(label, names, numbers), f"{printable(table.file)}, row {row}")
                row += 1


def _number(label: Any, names: Sequence[str], numbers: dict[int, int | str]) -> Any:
    if isinstance(label, bool | str):
        return names.index(str(label)) if str(label) in names else str(label)
    return numbers.get(label, label) if isinstance(label, int) else label


def _both(one: Table, other: Table) -> str:
    return f"{printable(one.file)} and {printable(other.file)}"


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # such as text that is not UTF-8
        raise ConfigError(
            f"{printable(file)} cannot be read as Parquet: {' '.join(str(error).split())[:200]}; write it again"
        ) from error


def _image_column(file: Path, types: dict[str, Any], wanted: str | None) -> str:
    candidates = [name for name, kind in types.items() if _holds_images(kind)]
    if wanted is None and len(candidates) == 1:
        return candidates[0]
    if wanted is None:
        raise ConfigError(
            f"{printable(file)}: data.image_column must name the column of images (candidates: {candidates}, "
            f"all columns: {list(types)}); images are encoded bytes or {{bytes, path}} structures"
        )
    if wanted not in candidates:
        raise ConfigError(
            f"{printable(file)}: data.image_column={wanted} must be a column of encoded bytes or {{bytes, path}} "
            f"structures ({_found(wanted, types)})"
        )
    return wanted


def _label_column(file: Path, schema: Any, wanted: str | None, *, labelled: bool) -> str | None:
    import pyarrow as pa

    types = {field.name: field.type for field in schema}
    named, index = [name for name in types if name.lower() in LABELS], _index_columns(schema)
    integers = [name for name, kind in types.items() if pa.types.is_integer(kind) and name not in index]
    candidates: list[str] = named or integers if labelled else named
    if wanted is not None and (labelled or wanted in types):
        candidates = [wanted]
    if len(candidates) == 1 and candidates[0] in types:
        if labelled and not _kind(types[candidates[0]]):
            raise ConfigError(
                f"{printable(file)}: labels must be integers from 0 on, words or booleans (the column {candidates[0]} "
                f"is of type {types[candidates[0]]}); convert it, or set data.label_column"
            )
        return candidates[0]
    if not labelled:
        return None
    if wanted is not None:
        raise ConfigError(f"{printable(file)}: data.label_column must be one of the columns ({_found(wanted, types)})")
    raise ConfigError(
        f"{printable(file)}: data.label_column must name the column of labels (candidates: {candidates}, all columns: "
        f"{list(types)}); a column named label is found without it"
    )


def _found(wanted: str, types: dict[str, Any]) -> str:
    return f"{wanted} is of type {types[wanted]}" if wanted in types else f"given: {wanted}, columns: {list(types)}"


def _index_columns(schema: Any) -> set[str]:
    """Returns the columns that pandas wrote for its index, which are row numbers and the like."""
    index = {name for name in schema.names if name.startswith("__index_level_")}
    with suppress(ValueError, LookupError, TypeError):  # of metadata that pandas did not write
        index |= {name for name in json.loads(schema.metadata[b"pandas"])["index_columns"] if isinstance(name, str)}
    return index


def _class_names(schema: Any, label: str | None) -> list[str]:
    """Returns the names that Hugging Face's `datasets` gives the classes; none where it did not write the file."""
    with suppress(ValueError, LookupError, TypeError):
        return list(map(str, json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]))
    return []


def _kind(kind: Any) -> str:
    """Returns what labels of a type are; nothing where they cannot be labels."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    words = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    return "integers" if pa.types.is_integer(kind) else "words" if any(test(kind) for test in words) else ""


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    binary = (pa.types.is_binary, pa.types.is_large_binary)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and any(test(field.type) for test in binary) for field in kind)
    return any(test(kind) for test in binary)
