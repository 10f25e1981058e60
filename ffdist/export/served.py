"""Loader of the MLflow model: serves a network through the interface of `mlflow.pyfunc`."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffdist.export.network import ARCHITECTURE, CLASS_NAMES, load_network
from ffdist.ff.classify import total_goodness
from ffdist.ff.network import Network
from ffdist.storage.files import read_json


class ServedModel:
    """Model that MLflow calls for each request."""

    def __init__(self, network: Network, class_names: Sequence[str]) -> None:
        self._network = network
        self._class_names = class_names

    def predict(self, samples: Any, params: Any = None) -> dict[str, Any]:
        """Classifies samples.

        Args:
            samples: `[N, ...]`, in the shape of the training samples; of images, pixels from 0 to 255
                `[N, channels, height, width]`.
            params: Ignored; part of MLflow's interface.

        Returns:
            `label` `[N]`, predicted by goodness, or by the readout if goodness cannot predict; `probability` `[N, C]`;
            `goodness` `[N, C]`, or `[N, 0]` if it cannot predict; and `name` `[N]` if the classes have names.

        Raises:
            MlflowException: The samples have a wrong shape or invalid values.
        """
        prediction = self._network.predict(self._convert(samples).flatten(1))
        goodness = total_goodness(prediction.goodness, self._network.architecture.predict_from)
        tensors = {"label": prediction.label, "probability": prediction.probabilities, "goodness": goodness}
        names = {"name": np.array(self._class_names)[prediction.label.numpy()]} if self._class_names else {}
        return {key: tensor.numpy() for key, tensor in tensors.items()} | names

    def _convert(self, samples: Any) -> Tensor:
        try:
            values = np.ascontiguousarray(samples)
            if values.dtype.kind not in "biuf":
                raise ValueError(f"samples must be numbers (given: {values.dtype})")
            if values.dtype.kind in "biu" and values.dtype != np.uint8:
                values = values.astype(np.int64)  # torch lacks operations of some unsigned types
            return self._network.architecture.encoder.from_array(torch.from_numpy(values))
        except (TypeError, ValueError) as error:
            raise _invalid_request(f"{error}") from error


def _invalid_request(reason: str) -> Exception:
    """Returns an error whose response is only `reason`; MLflow's server would put all samples before it."""
    from mlflow.exceptions import MlflowException  # always installed where the model is served

    class InvalidRequest(MlflowException):
        def serialize_as_json(self) -> str:
            return json.dumps({"error_code": self.error_code, "message": reason})

    request_error: Exception = InvalidRequest.invalid_parameter_value(reason)
    return request_error


def _load_pyfunc(path: str) -> ServedModel:
    """Loads a model from its data path; MLflow requires this name."""
    return ServedModel(load_network(path), read_json(path, ARCHITECTURE).get(CLASS_NAMES, []))
