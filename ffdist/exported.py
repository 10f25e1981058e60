"""A network as two files that need no run: its weights, and what it is made of."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ffdist.ff.classify import total_goodness
from ffdist.ff.layers import Rule
from ffdist.ff.local import Fields
from ffdist.ff.network import Architecture, Network
from ffdist.ff.update import Update

WEIGHTS, ARCHITECTURE = "network.safetensors", "network.json"
NAMES = "class_names"
"""Key beside those of the architecture; classes may have none."""


def save_network(network: Network, folder: Path, names: Sequence[str] = ()) -> None:
    """Writes a network and its classes' names into a folder that is there; what it only learned by is left out."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items() if _predicts(name)}
    (folder / WEIGHTS).write_bytes(save(tensors))  # unlike save_file, for all to read
    facts = asdict(network.architecture) | {NAMES: list(names)}
    (folder / ARCHITECTURE).write_text(json.dumps(facts, indent=2))


def read_network(folder: str | Path) -> Network:
    """Returns the network that `ffdist export` wrote into a folder.

    Raises:
        OSError: One of its files is missing.
        ValueError: One of them is damaged.
    """
    try:
        network = Network(_architecture(json.loads((Path(folder) / ARCHITECTURE).read_text())))
        missing = network.load_state_dict(load_file(Path(folder) / WEIGHTS), strict=False).missing_keys
    except (TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no network that can be read: {error}") from error
    if any(map(_predicts, missing)):
        raise ValueError(f"{folder} lacks {', '.join(filter(_predicts, missing))}")
    return network


class Served:
    """What MLflow asks, on behalf of whoever asks the model of a run."""

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        self._network = network
        self._names = names

    def predict(self, images: Any, params: Any = None) -> dict[str, Any]:
        """Returns what images show, uint8 `[N, channels, height, width]`.

        It is each one's `label` by goodness, else by the readout, and `probability` and `goodness` of every label; and
        the label's `name`, where classes have names.
        """
        found = self._network.predict(torch.as_tensor(images).to(torch.uint8).flatten(1))
        goodness = total_goodness(found.goodness, self._network.architecture.predict_from)
        told = {"label": found.label, "probability": found.probabilities, "goodness": goodness}
        named = {"name": np.array(self._names)[found.label.numpy()]} if self._names else {}
        return {key: tensor.numpy() for key, tensor in told.items()} | named


def _load_pyfunc(path: str) -> Served:
    """Reads a model; MLflow calls it by this name."""
    return Served(read_network(path), json.loads((Path(path) / ARCHITECTURE).read_text()).get(NAMES, []))


def _predicts(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def _architecture(facts: dict[str, Any]) -> Architecture:
    rule, layers = facts["rule"], facts["layers"]
    return Architecture(
        **{key: value for key, value in facts.items() if key != NAMES}
        | {
            "shape": tuple(facts["shape"]),
            "layers": tuple(layer if isinstance(layer, int) else Fields(**layer) for layer in layers),
            "thresholds": tuple(facts["thresholds"]),
            "rule": Rule(**rule | {"update": Update(**rule["update"])}),
            "readout_update": Update(**facts["readout_update"]),
        }
    )
