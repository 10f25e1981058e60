"""A network as two files that need no run: its weights, and what it is made of."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ffdist.ff.classify import total_goodness
from ffdist.ff.layers import Rule
from ffdist.ff.local import Fields
from ffdist.ff.network import Architecture, Network
from ffdist.ff.update import Update
from ffdist.files import file_in, read_json

WEIGHTS, ARCHITECTURE = "network.safetensors", "network.json"
NAMES = "class_names"
"""Key beside those of the architecture; classes may have none."""


def save_network(network: Network, folder: Path, names: Sequence[str] = ()) -> None:
    """Writes a network and its classes' names into a folder that is there; what it only learned by is left out."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items() if _predicts(name)}
    weights = file_in(folder, WEIGHTS)
    save_file(tensors, weights)
    weights.chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody else read it
    facts = asdict(network.architecture) | {NAMES: list(names)}
    file_in(folder, ARCHITECTURE).write_text(json.dumps(facts, indent=2))


def read_network(folder: str | Path) -> Network:
    """Returns the network that `ffdist export` wrote into a folder.

    Raises:
        OSError: One of its files is missing.
        ValueError: One of them is damaged.
    """
    try:
        architecture, weights = _architecture(read_json(folder, ARCHITECTURE)), file_in(folder, WEIGHTS)
        needed, found = 4 * sum(architecture.weights), weights.stat().st_size
        if needed > found:  # before memory is allocated for them
            raise ValueError(f"{weights} is too small for its architecture (bytes: {found:,}, needed: {needed:,})")
        # Cloned, because these are views of the file, which may be overwritten.
        tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
        return Network.for_inference(architecture, tensors)
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no network that can be read: {error}") from error


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
        found = self._network.predict(self._checked(images).flatten(1))
        goodness = total_goodness(found.goodness, self._network.architecture.predict_from)
        told = {"label": found.label, "probability": found.probabilities, "goodness": goodness}
        named = {"name": np.array(self._names)[found.label.numpy()]} if self._names else {}
        return {key: tensor.numpy() for key, tensor in told.items()} | named

    def _checked(self, images: Any) -> Tensor:
        """Returns images as uint8, if they can be that without a change."""
        values, shape = np.asarray(images), list(self._network.architecture.shape)
        try:
            if list(values.shape[1:]) != shape or not len(values):
                raise ValueError(f"images must have the shape [N, {str(shape)[1:]} (given: {list(values.shape)})")
            if values.dtype == np.uint8:
                return torch.from_numpy(values)
            wrong = values[~((values >= 0) & (values <= 255) & (values % 1 == 0))]
            if wrong.size:
                raise ValueError(f"pixels must be whole numbers from 0 to 255 (given: {wrong.flat[0]})")
            if values.dtype.kind == "f" and values.max() == 1:
                raise ValueError("pixels must be whole numbers from 0 to 255, not 0.0 to 1.0")
        except (TypeError, ValueError) as error:
            raise _refusal(f"{error}") from error
        return torch.from_numpy(values.astype(np.uint8))


def _refusal(reason: str) -> Exception:
    """Returns an error whose text reaches who asked: MLflow's server would put all of the images before it."""
    from mlflow.exceptions import MlflowException  # which is there wherever this is called

    class Refusal(MlflowException):
        def serialize_as_json(self) -> str:
            return json.dumps({"error_code": self.error_code, "message": reason})

    refusal: Exception = Refusal.invalid_parameter_value(reason)
    return refusal


def _load_pyfunc(path: str) -> Served:
    """Reads a model; MLflow calls it by this name."""
    return Served(read_network(path), read_json(path, ARCHITECTURE).get(NAMES, []))


def _predicts(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def _architecture(facts: dict[str, Any]) -> Architecture:
    rule, layers = facts["rule"], facts["layers"]
    architecture = Architecture(
        **{key: value for key, value in facts.items() if key != NAMES}
        | {
            "shape": tuple(facts["shape"]),
            "layers": tuple(layer if isinstance(layer, int) else Fields(**layer) for layer in layers),
            "thresholds": tuple(facts["thresholds"]),
            "untrained": tuple(facts.get("untrained", ())),
            "rule": Rule(**rule | {"update": Update(**rule["update"])}),
            "readout_update": Update(**facts["readout_update"]),
        }
    )
    for part in (architecture, architecture.rule):
        for field in fields(part):
            value, default = getattr(part, field.name), field.default
            right = (int, float) if isinstance(default, float) else type(default)
            if default is not MISSING and not isinstance(value, right):
                raise ValueError(f"{field.name} must be of type {type(default).__name__} (given: {str(value)[:99]!r})")
    return architecture
