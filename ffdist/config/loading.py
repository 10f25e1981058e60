"""Loading of configurations: reading the file, applying overrides, and explaining errors."""

import copy
import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ffdist.config.schema import FLOAT, SECTIONS, Config
from ffdist.config.sections import ARRAYS
from ffdist.errors import ConfigError

CONFIG = "config.yaml"
"""File in the folder of a run with its resolved configuration."""
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
USUAL_NAMES = {
    "training.batch_size": ("batch", "bs", "minibatch_size", "train_batch_size", "per_device_train_batch_size"),
    "training.epochs": ("epoch", "max_epochs", "n_epochs", "num_epochs", "num_train_epochs"),
    "training.learning_rate": ("lr", "eta", "step_size"),
    "training.momentum": ("beta", "beta1", "beta_1", "betas"),
    "training.optimizer": ("opt", "optim"),
    "training.precision": ("amp", "bf16", "dtype", "fp16", "fp32", "mixed_precision"),
    "training.validation_samples": ("num_validation", "val_samples", "val_size", "val_split", "validation_split"),
    "training.validate_every_epochs": ("check_val_every_n_epoch", "eval_every", "eval_interval", "evaluate_every"),
    "training.weight_decay": ("l2", "wd"),
    "training.stop.patience": ("early_stopping", "early_stopping_patience"),
    "training.callbacks": ("callback", "hooks"),
    "model.layers": ("architecture", "dims", "hidden", "hidden_size", "hidden_sizes", "layer_sizes", "units", "width"),
    "data.name": ("dataset", "data_set"),
    "data.path": ("data_dir", "data_folder", "data_path", "dataset_path"),
    "data.root": ("download_root",),
    "data.jitter": ("augment", "augmentation", "random_crop", "random_shift", "shift"),
    "data.crop": ("random_resized_crop",),
    "data.color": ("color_jitter",),
    "data.standardize": ("normalize", "standardise"),
    "training.clip_norm": ("clip_grad_norm", "grad_clip", "gradient_clip_val", "max_grad_norm", "max_norm"),
    "training.learning_rate_steps": ("milestones",),
    "negatives.actors": ("dataloader_num_workers", "num_workers", "workers"),
    "negatives.kind": ("negative", "neg", "negative_kind"),
    "pipeline.stages": ("gpus", "num_gpus", "num_stages", "pipeline_stages", "pp_size"),
    "pipeline.device": ("accelerator", "cuda"),
    "pipeline.threads_per_stage": ("num_threads", "threads"),
    "checkpoint.keep_last": ("save_top_k", "save_total_limit"),
    "checkpoint.every_minibatches": ("checkpoint_interval", "save_every", "save_steps"),
    "checkpoint.uri": ("checkpoint_dir", "ckpt_dir", "save_dir"),
    "tracking.experiment": ("experiment_name", "project"),
    "tracking.log_every_minibatches": ("log_every", "log_every_n_steps", "log_interval", "logging_steps"),
    "tracking.uri": ("mlflow_uri", "tracking_uri"),
    "seed": ("manual_seed", "random_seed", "random_state"),
}
"""Names of settings in other trainers, by setting; they are used in hints only."""
LOCATION = ("name", "path", "options", "root", "image_column", "label_column")
"""Settings of the section `data` that say where samples come from."""


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
    path = find_config(name)
    return parse_with_overrides(_read(path), str(path), overrides)


def parse_with_overrides(tree: dict[str, Any], origin: str, overrides: Iterable[str]) -> Config:
    """Validates a configuration with overrides; see `load_config` and `parse_config`."""
    overrides, original = list(overrides), copy.deepcopy(tree)
    for override in overrides:
        _apply(tree, override)
    if overrides:
        with suppress(ConfigError):
            parse_config(original, "")
            origin = "overrides"  # any error is in them; not their text, which may contain a password
    return parse_config(tree, origin)


def load_for_arrays(config: Config | Path | str | dict[str, Any]) -> Config:
    """Loads a configuration for samples that are given in Python, which replace the dataset that it names, if any.

    Args:
        config: A configuration, its path, the name of a shipped one, or nested dicts.

    Raises:
        ConfigError: The configuration is invalid.
    """
    if isinstance(config, Config):
        config = config.model_dump(mode="json")
    tree = config if isinstance(config, dict) else _read(find_config(str(config)))
    data = tree.get("data") or {}
    if not isinstance(data, dict):
        raise ConfigError(f"data must be a section (given: {data!r})")
    if data.get("name", ARRAYS) != ARRAYS:
        parse_config(tree, "config")  # settings that are left out must be valid, too
        data = {key: value for key, value in data.items() if key not in LOCATION}
    return parse_config(tree | {"data": data | {"name": ARRAYS}}, "config")


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
            new_name, setting = RENAMED_SETTINGS.get(name), find_setting(name)
            hint = f"; it was renamed to {new_name}" if new_name else f"; did you mean {setting}?" * bool(setting)
            yield f"unknown key {name}{hint}; valid keys: {', '.join(_keys(section))}"
        elif detail["type"] == "missing":
            yield f"{name} is missing; every run needs it"
        elif detail["type"] == "value_error":
            rule = detail["msg"].removeprefix("Value error, ")
            yield f"{name}: {rule}" if section else rule  # errors of a whole section name their keys
        else:
            key = next((key for key, _ in Config.settings() if f"{name}.".startswith(f"{key}.")), name)
            rule = detail["msg"][0].lower() + detail["msg"][1:]
            if new_value := RENAMED_VALUES.get(key, {}).get(str(detail["input"])):
                rule += f" ({detail['input']} was renamed to {new_value})"
            rules.setdefault(f"{key} ({detail['input']!r})", []).append(rule)
    for key_and_value, messages in rules.items():
        yield f"{key_and_value}: {', or '.join(messages)}"


def setting_names() -> list[str]:
    """Returns the names of all settings, such as `training.epochs`."""
    return [key for key, _ in Config.settings()]


def find_setting(name: str) -> str:
    """Returns the setting or section that a user may have meant by an unknown name, or an empty string.

    Args:
        name: Name of a setting as other trainers call it, without its section, or misspelled.
    """
    settings, (section, _, word) = setting_names(), name.lower().replace("-", "_").rpartition(".")
    for setting in settings:
        if setting.rpartition(".")[2] == word or word in USUAL_NAMES.get(setting, ()):
            return setting
    siblings = [each for each in settings if each.startswith(f"{section}.")] if section else list(SECTIONS)
    matches = [
        *difflib.get_close_matches(name, siblings, n=1, cutoff=0.6),
        *difflib.get_close_matches(word, [each.rpartition(".")[2] for each in settings], n=1, cutoff=0.8),
    ]
    return next((each for match in matches for each in (*siblings, *settings) if each.endswith(match)), "")


def _keys(section: list[str]) -> list[str]:
    inner: Any = Config
    for part in section:
        inner = inner.model_fields[part].annotation if part in getattr(inner, "model_fields", {}) else inner
    return list(inner.model_fields)


def _suggestion(name: str, candidates: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
