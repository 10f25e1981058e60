"""Reading a configuration: the file, what the command line sets over it, and what is wrong with it."""

import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ffdist.config import FLOAT, Config, ConfigError
from ffdist.sections import LocalLayer


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses a key that comes twice, of which YAML's own takes the last without a word."""
        node, seen = super().compose_mapping_node(anchor), set[tuple[str, str]]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} comes twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def config_folder() -> Path:
    """Returns the folder of the shipped configurations: inside an installed package, beside an editable one."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Returns the shipped configurations by their names."""
    return {path.stem: path for path in sorted(config_folder().rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """Finds a configuration by its path, or a shipped one by its bare name.

    Raises:
        ConfigError: There is neither.
    """
    shipped = shipped_configs()
    if os.path.isfile(name):  # noqa: PTH113, a name may be long
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise ConfigError(
        f"a configuration is a YAML file or the name of a shipped one (given: {name}; shipped: {', '.join(shipped)})"
        f"{_nearest(name, shipped)}"
    )


def load_config(name: str, overrides: Iterable[str] = ()) -> Config:
    """Reads and validates a configuration.

    Args:
        name: Path, or bare name of a shipped one.
        overrides: `section.key=value` each, the value in YAML; later ones win.

    Raises:
        ConfigError: Says in one paragraph what is wrong and what would be right.
    """
    path, overrides = find_config(name), list(overrides)
    tree = _read(path)
    for override in overrides:
        _apply(tree, override)
    origin = str(path)
    if overrides and _is_valid(_read(path)):  # then they are what is wrong, if something is
        origin = "overrides"  # not the text of them, which may hold a password
    return parse_config(tree, origin)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as data: and model: (it holds: {tree!r})")
    return tree


def _is_valid(tree: dict[str, Any]) -> bool:
    try:
        parse_config(tree, "")
    except ConfigError:
        return False
    return True


def parse_config(tree: dict[str, Any], origin: str) -> Config:
    """Validates a configuration given as nested dicts; `origin` is named in errors.

    Raises:
        ConfigError: As `load_config`.
    """
    try:
        return Config.model_validate({section: keys for section, keys in tree.items() if keys is not None})
    except ValidationError as error:
        raise ConfigError(f"{origin}: {'; '.join(_explain(error))}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"an override is section.key=value, without blanks around = (given: {override})")
    *sections, last = key.split(".")
    for section in sections:
        inner = tree[section] = tree.get(section) or {}  # a section left empty in the file is None
        if not isinstance(inner, dict):
            raise ConfigError(f"{section} is a value, not a section (given: {override})")
        tree = inner
    try:
        tree[last] = yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"the value of {key} must be YAML (given: {text})") from error


def _explain(error: ValidationError) -> Iterator[str]:
    rules: dict[str, list[str]] = {}  # by key, with its value: a key of several types breaks the rules of each
    for detail in error.errors(include_url=False):
        *section, last = [str(part) for part in detail["loc"] or ("",)]
        name = ".".join([*section, last])
        if detail["type"] == "extra_forbidden":
            known = _keys(section)
            yield f"unknown key {name}{_nearest(last, known)}; known here: {', '.join(known)}"
        elif detail["type"] == "missing":
            yield f"{name} is missing; every run needs it"
        elif detail["type"] == "value_error":
            rule = detail["msg"].removeprefix("Value error, ")
            yield f"{name}: {rule}" if section else rule  # those of a whole section name their keys
        else:
            key = ".".join(name.split(".")[: 1 if name.startswith("seed") else 2])
            rule = detail["msg"][0].lower() + detail["msg"][1:]
            rules.setdefault(f"{key} ({detail['input']!r})", []).append(rule)
    for key_and_value, broken in rules.items():
        yield f"{key_and_value}: {', or '.join(broken)}"


def _keys(section: list[str]) -> list[str]:
    inner: Any = Config
    for part in section:
        if part == "local":  # an entry of model.layers
            return list(LocalLayer.model_fields)
        inner = inner.model_fields[part].annotation if part in getattr(inner, "model_fields", {}) else inner
    return list(inner.model_fields)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
