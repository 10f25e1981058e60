"""Saves a network as two files, weights and architecture, and loads it without its run."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ffdist.ff.architecture import Architecture
from ffdist.ff.encoders import encoder_entry, parse_encoder
from ffdist.ff.network import Network
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update, is_for_inference
from ffdist.ff.specs import layer_entry
from ffdist.storage.files import file_in, read_json

WEIGHTS, ARCHITECTURE = "network.safetensors", "network.json"
VALID_TYPES = {float: (int, float), NoneType: (int, tuple, NoneType)}
"""Types that a value in the architecture file may have, by the type of its default, if it may have others."""


class Names(NamedTuple):
    """Names in the data that a network was trained on. The architecture file has them under the same keys."""

    class_names: Sequence[str] = ()
    """Names of the classes, by label; empty if they have none."""
    features: Sequence[str] = ()
    """Names of the columns of a table, in the order of a sample's values; empty for images and if they have none."""


def save_network(network: Network, folder: Path, names: Names) -> None:
    """Writes a network and its names into an existing folder, without the tensors that only training uses."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items() if is_for_inference(name)}
    weights = file_in(folder, WEIGHTS)
    save_file(tensors, weights)
    weights.chmod(folder.stat().st_mode & 0o666)  # safetensors makes the file private
    architecture = network.architecture
    values = asdict(architecture) | {
        "encoder": encoder_entry(architecture.encoder),
        "layers": [layer_entry(layer) for layer in architecture.layers],
    }
    for name in ("may_import", "executor"):  # only of use for training
        values["rule"].pop(name)
    values |= {key: list(value) for key, value in names._asdict().items()}
    file_in(folder, ARCHITECTURE).write_text(json.dumps(values, indent=2))


def load_network(folder: str | Path) -> Network:
    """Loads a network from a folder that `save_network` or `ffdist export` wrote.

    Raises:
        OSError: One of its files is missing.
        ValueError: One of its files is damaged.
    """
    try:
        architecture, weights = _parse_architecture(read_json(folder, ARCHITECTURE)), file_in(folder, WEIGHTS)
        min_bytes, num_bytes = 4 * sum(architecture.num_parameters), weights.stat().st_size
        if min_bytes > num_bytes:  # before memory is allocated
            raise ValueError(
                f"{weights} is too small for its architecture (bytes: {num_bytes:,}, needed: {min_bytes:,})"
            )
        # Cloned, because the tensors map the file, which may be overwritten.
        tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
        return Network.for_inference(architecture, tensors)
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no network that can be read ({error})") from error


def load_names(folder: str | Path) -> Names:
    """Returns the names in a folder that `save_network` wrote.

    Raises:
        OSError: The file is missing.
        ValueError: It is damaged.
    """
    values = read_json(folder, ARCHITECTURE)
    if not isinstance(values, dict):
        raise ValueError(f"{ARCHITECTURE} is not a JSON object")
    names = Names(*(values.get(key, []) for key in Names._fields))
    for key, value in names._asdict().items():
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{key} must be a list of names")
    return names


def _parse_architecture(values: dict[str, Any]) -> Architecture:
    rule = values["rule"]
    architecture = Architecture(
        **{key: value for key, value in values.items() if key not in Names._fields}
        | {
            "encoder": parse_encoder(values["encoder"]),
            "layers": tuple(values["layers"]),
            "thresholds": tuple(values["thresholds"]),
            "chosen_layers": tuple(values.get("chosen_layers") or ()) or None,
            "untrained": tuple(values.get("untrained", ())),
            "rule": Rule(**rule | {"update": Update(**rule["update"]), "may_import": False}),
            "readout_update": Update(**values["readout_update"]),
        }
    )
    for section in (architecture, architecture.rule):
        for field in fields(section):
            value, default = getattr(section, field.name), field.default
            valid = VALID_TYPES.get(type(default), type(default))
            if default is not MISSING and not isinstance(value, valid):
                raise ValueError(f"{field.name} must be of type {type(default).__name__} (given: {str(value)[:99]!r})")
    return architecture
