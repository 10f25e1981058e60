"""What an MLflow model of a network does with images. MLflow copies this file into the model, and runs it there."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class Served(PythonModel):
    """Takes images, uint8 `[N, channels, height, width]`, for what they show."""

    def load_context(self, context: Any) -> None:
        """Reads the network."""
        from ffdist.exported import read_network  # the model's own copy

        self._network = read_network(Path(context.artifacts["network"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        """Returns each image's `label` by goodness, else by the readout, and `probability` and `goodness` of each."""
        images = torch.from_numpy(np.array(model_input, dtype=np.uint8)).flatten(1)
        found = self._network.predict(images)
        goodness = found.goodness[self._network.architecture.predict_from - 1 :].sum(0)
        return {
            "label": found.label.numpy(),
            "probability": found.probabilities.numpy(),
            "goodness": goodness.numpy(),
        }


set_model(Served())
