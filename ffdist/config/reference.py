"""The reference of all settings, in Markdown. `python -m ffdist.config.reference` prints it.

`configs/README.md` ends with it, and a test compares the two.
"""

import ast
import inspect
from collections.abc import Sequence
from dataclasses import MISSING, Field
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ffdist.config.schema import NEUTRAL_SETTINGS, SECTIONS, Config
from ffdist.config.sections import LayerEntry
from ffdist.ff.specs import LAYERS, MAX_VALUE, LayerSpec, setting_fields

TYPE_NAMES: dict[Any, str] = {
    bool: "`true`, `false`",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    dict: "mapping",
}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
"""Comparison operators by pydantic's names of bounds."""
COLUMNS = ("setting", "values", "default", "affects weights", "description")


def settings_reference() -> str:
    """Returns the reference: a table for each section of the configuration, from its types and docstrings."""
    parts = [_format_table(setting_rows())]
    for name, section in SECTIONS.items():
        parts += [f"### {name}", " ".join(str(section.__doc__).split()), _format_table(setting_rows(name))]
    parts += ["### All layers", "Settings of every kind of layer.", _layer_table(LayerSpec)]  # type: ignore[type-abstract]
    for kind, spec in LAYERS.items():
        parts += [f"### Layers of `kind: {kind}`", " ".join(str(spec.__doc__).split()), _layer_table(spec)]
    return "\n\n".join(parts)


def _layer_table(spec: type[LayerSpec]) -> str:
    """Returns the table of a kind of layer, from the types and docstrings of its fields."""
    (definition,) = ast.parse(inspect.getsource(spec)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {
        attribute.target.id: text.value.value
        for attribute, text in pairwise(definition.body)
        if isinstance(attribute, ast.AnnAssign) and isinstance(attribute.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    rows = [
        (
            f"`{field.name}`",
            _layer_values(field),
            _layer_default(field),
            "yes",
            " ".join(str(texts.get(field.name, "")).split()),
        )
        for field in setting_fields(spec)
        if field.name in texts
    ]
    return _format_table(rows)


def _layer_default(field: Field[Any]) -> str:
    if field.default is None:
        return ""
    if field.default is not MISSING:
        return f"`{field.default}`"
    return "required" if field.default_factory is MISSING else f"`{field.default_factory()}`"


def _layer_values(field: Field[Any]) -> str:
    """Returns a description of the values of a setting of a layer."""
    if names := field.metadata.get("one_of"):
        return ", ".join(f"`{name}`" for name in names if name)
    if field.type in (int, "int", "int | None"):
        return f"integer >= {field.metadata.get('min', 1)}"
    if (below := field.metadata.get("below")) is not None:
        return f"number >= 0, < {below}" if below < MAX_VALUE else "number >= 0"
    return {"str": "text", "str | None": "text", "dict[str, Any]": "mapping"}.get(str(field.type), str(field.type))


def setting_rows(section: str = "") -> list[tuple[str, ...]]:
    """Returns a row of `COLUMNS` for each setting of a section; of none of them by default."""
    if section:
        settings = list(SECTIONS[section].settings(f"{section}."))
    else:
        settings = [(name, field) for name, field in Config.model_fields.items() if name not in SECTIONS]
    rows: list[tuple[str, ...]] = []
    for key, field in settings:
        text = " ".join((field.description or "").split())
        affects_weights = "no" if key.startswith(NEUTRAL_SETTINGS) else "yes"
        rows.append((f"`{key}`", _values(field.annotation, field.metadata), _default(field), affects_weights, text))
    return rows


def _format_table(rows: Sequence[tuple[str, ...]]) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def _default(field: FieldInfo) -> str:
    """Returns the default as it is written in YAML; empty if the setting is not set by default."""
    if field.is_required():
        return "required"
    return "" if field.default is None else f"`{field.default}`".replace("'", "")


def _values(annotation: Any, metadata: Any = ()) -> str:
    """Returns a description of the values that a type permits."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation == LayerEntry:
        return "layer"
    if origin is Annotated:
        return _values(args[0], args[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        return " or ".join(_values(each) for each in args if each is not NoneType)
    if origin in (list, tuple):
        return f"list{f' of {len(args)}' if origin is tuple else ''}: {_values(args[0])}"
    return TYPE_NAMES[origin or annotation] + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    """Returns the bounds of a number, without those that only keep it out of overflow."""
    flat = [each for item in metadata for each in (item.metadata if isinstance(item, FieldInfo) else [item])]
    pairs = [(sign, getattr(each, name, None)) for each in flat for name, sign in BOUNDS.items()]
    texts = [f"{sign} {value}" for sign, value in pairs if value is not None and abs(value) < MAX_VALUE]
    return f" {', '.join(texts)}" if texts else ""


if __name__ == "__main__":
    print(settings_reference())
