"""Loading of configurations: reading the file, applying overrides, and explaining errors."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ffdist.config.schema import FLOAT, Config
from ffdist.errors import ConfigError

RENAMED_SETTINGS = {
    "data.center": "data.subtract_mean",
    "negatives.ahead": "negatives.prefetch_chunks",
    "training.smoothing": "training.momentum",
    "training.repeats": "training.updates_per_minibatch",
    "training.evaluate_every": "training.validate_every_epochs",
    "checkpoint.keep": "checkpoint.keep_last",
    "tracking.every_minibatches": "tracking.log_every_minibatches",
    "tracking.paper_error": "reference.paper_error",
    "tracking.target_error": "reference.target_error",
}
"""New names of settings, by old name."""
RENAMED_VALUES = {"training.optimizer": {"release": "hinton"}}
"""New names of values, by setting and old name."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Rejects duplicate keys; YAML's own loader silently uses the last one."""
        node, keys = super().compose_mapping_node(anchor), set[tuple[str, str]]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if (key.tag, key.value) in keys:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            keys.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def shipped_configs() -> dict[str, Path]:
    """Returns the paths of the shipped configurations, by name."""
    package = Path(__file__).parent.parent
    root = package if (package / "configs").is_dir() else package.parent  # installed, or editable
    return {path.stem: path for path in sorted((root / "configs").rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """Returns the path of a configuration, given by its path or by the name of a shipped one.

    Raises:
        ConfigError: There is no such configuration.
    """
    shipped = shipped_configs()
    if os.path.isfile(name):  # noqa: PTH113, a name may be long
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise ConfigError(
        f"CONFIG must be a YAML file or the name of a shipped one (given: {name}; shipped: {', '.join(shipped)})"
        f"{_suggestion(name, shipped)}"
    )


def load_config(name: str, overrides: Iterable[str] = ()) -> Config:
    """Loads and validates a configuration.

    Args:
        name: Path of a YAML file, or name of a shipped configuration.
        overrides: `section.key=value` strings with YAML values. Later ones take precedence.

    Raises:
        ConfigError: The configuration is invalid. The message has the fix.
    """
    path, overrides = find_config(name), list(overrides)
    tree = _read(path)
    for override in overrides:
        _apply(tree, override)
    origin = str(path)
    if overrides:
        with suppress(ConfigError):
            parse_config(_read(path), "")
            origin = "overrides"  # any error is in them; not their text, which may contain a password
    return parse_config(tree, origin)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as data: and model: (it holds: {tree!r})")
    return tree


def parse_config(tree: dict[str, Any], origin: str) -> Config:
    """Validates a configuration.

    Args:
        tree: Settings as nested dicts.
        origin: Source of the settings, for errors.

    Raises:
        ConfigError: The configuration is invalid.
    """
    try:
        return Config.model_validate({section: keys for section, keys in tree.items() if keys is not None})
    except ValidationError as error:
        raise ConfigError(f"{origin}: {'; '.join(_explain(error))}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"an override must be section.key=value, without spaces around = (given: {override})")
    *sections, last = key.split(".")
    for section in sections:
        inner = tree[section] = tree.get(section) or {}  # an empty section is None
        if not isinstance(inner, dict):
            raise ConfigError(f"{section} is a value, not a section (given: {override})")
        tree = inner
    try:
        tree[last] = yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"the value of {key} must be YAML (given: {text})") from error


def _explain(error: ValidationError) -> Iterator[str]:
    rules: dict[str, list[str]] = {}  # by key and value; a key that allows several types breaks the rule of each type
    for detail in error.errors(include_url=False):
        *section, last = [str(part) for part in detail["loc"] or ("",)]
        name = ".".join([*section, last])
        if detail["type"] == "extra_forbidden":
            keys, new_name = _keys(section), RENAMED_SETTINGS.get(name)
            hint = f"; it was renamed to {new_name}" if new_name else _suggestion(last, keys)
            yield f"unknown key {name}{hint}; valid keys: {', '.join(keys)}"
        elif detail["type"] == "missing":
            yield f"{name} is missing; every run needs it"
        elif detail["type"] == "value_error":
            rule = detail["msg"].removeprefix("Value error, ")
            yield f"{name}: {rule}" if section else rule  # errors of a whole section name their keys
        else:
            key = ".".join(name.split(".")[: 1 if name.startswith("seed") else 2])
            rule = detail["msg"][0].lower() + detail["msg"][1:]
            if new_value := RENAMED_VALUES.get(key, {}).get(str(detail["input"])):
                rule += f" ({detail['input']} was renamed to {new_value})"
            rules.setdefault(f"{key} ({detail['input']!r})", []).append(rule)
    for key_and_value, messages in rules.items():
        yield f"{key_and_value}: {', or '.join(messages)}"


def _keys(section: list[str]) -> list[str]:
    inner: Any = Config
    for part in section:
        inner = inner.model_fields[part].annotation if part in getattr(inner, "model_fields", {}) else inner
    return list(inner.model_fields)


def _suggestion(name: str, candidates: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
