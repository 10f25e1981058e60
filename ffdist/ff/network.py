"""The whole network: what it is made of, and how it predicts, with torch alone."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ffdist.ff.classify import goodness_prediction
from ffdist.ff.goodness import normalize
from ffdist.ff.keyed import generator
from ffdist.ff.labels import LABELS, neutral, one_hot
from ffdist.ff.layers import Dense
from ffdist.ff.readout import Readout
from ffdist.ff.update import LAYER_UPDATE, READOUT_UPDATE, Update


@dataclass(frozen=True)
class Architecture:
    """What decides a network's layers, their start and their learning; enough to build any part of it anywhere."""

    pixels: int
    """Values of one image D, all channels."""
    classes: int
    """Number of classes C."""
    units: tuple[int, ...]
    """Units of each hidden layer, lowest first."""
    label: str = "overwrite"
    """How the input shows the label, a key of `LABELS`."""
    predict_from: int = 2
    """First layer, counted from 1, that goodness and readout look at when they predict."""
    seed: int = 0
    """Key of the initial weights."""
    update: Update = LAYER_UPDATE
    peer_strength: float = 0.03
    readout_update: Update = READOUT_UPDATE
    precision: str = "float32"
    """Type of the layers' matrix products, `float32` or `bfloat16`."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which products are made and activities travel."""
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the input rows, then of each layer's output."""
        return (self.pixels + (self.classes if self.label == "append" else 0), *self.units)

    def layer(self, index: int) -> Dense:
        """Builds hidden layer `index`, counted from 0, with its initial weights."""
        return Dense(
            self.widths[index],
            self.units[index],
            update=self.update,
            peer_strength=self.peer_strength,
            compute_dtype=self.compute_dtype,
            generator=generator(self.seed, "layer", index),
        )

    def readout(self) -> Readout:
        """Builds the readout, with its initial zeros."""
        return Readout(sum(self.units[self.predict_from - 1 :]), self.classes, update=self.readout_update)

    def rows(self, images: Tensor, values: Tensor) -> Tensor:
        """Turns images and label values into input rows.

        Args:
            images: `[..., D]`, uint8, 0 to 255.
            values: `[..., C]`, float32.

        Returns:
            Normalized rows `[..., D']`, in the compute type.
        """
        return normalize(LABELS[self.label](images.to(torch.float32) / 255, values)).to(self.compute_dtype)


class Prediction(NamedTuple):
    """What the network makes of images."""

    probabilities: Tensor
    """The readout's, from one neutral pass `[B, C]`."""
    goodness: Tensor
    """Each layer's goodness for every label tried `[L, B, C]`."""
    label: Tensor
    """The label of the greatest goodness, summed over the predicting layers `[B]`."""


class Network(nn.Module):
    """Layers and readout in one module, for use after training.

    Args:
        architecture: What to build.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.layers = nn.ModuleList(architecture.layer(index) for index in range(len(architecture.units)))
        self.readout = architecture.readout()

    def forward(self, images: Tensor) -> Tensor:
        """Returns the readout's logits `[B, C]` for uint8 images `[B, D]`, from one pass with the neutral label."""
        architecture = self.architecture
        rows = architecture.rows(images, neutral(images.shape[:-1], architecture.classes))
        activities = []
        for layer in self.layers:
            rows = layer(rows).activity
            activities.append(rows)
        logits: Tensor = self.readout(activities[architecture.predict_from - 1 :])
        return logits

    def predict(self, images: Tensor) -> Prediction:
        """Predicts in both ways: one neutral pass for the readout, and one pass a label for goodness."""
        architecture = self.architecture
        labels = torch.arange(architecture.classes).expand(len(images), -1)
        rows = architecture.rows(images.unsqueeze(1), one_hot(labels, architecture.classes))
        goodness = []
        for layer in self.layers:
            rows, layer_goodness = layer(rows)
            goodness.append(layer_goodness)
        by_layer = torch.stack(goodness)
        return Prediction(
            self(images).softmax(-1), by_layer, goodness_prediction(by_layer[architecture.predict_from - 1 :])
        )
