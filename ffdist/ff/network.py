"""The whole network: what it is made of, and how it predicts, with torch alone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ffdist.ff import MAX_CLASSES
from ffdist.ff.classify import total_goodness
from ffdist.ff.goodness import NORMALIZATIONS, squared_length
from ffdist.ff.keyed import generator
from ffdist.ff.labels import LABELS, neutral, one_hot
from ffdist.ff.layers import RELEASE, Dense, Layer, Rule
from ffdist.ff.local import Fields, Local, Map
from ffdist.ff.optimizers import READOUT_UPDATE, Update
from ffdist.ff.readout import Readout

ROWS = 4000
"""Rows that pass through the layers together when it predicts."""


@dataclass(frozen=True)
class Architecture:
    """What decides a network's layers, their start and their learning; enough to build any part of it anywhere."""

    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    classes: int
    """Number of classes C."""
    layers: tuple[int | Fields, ...]
    """Each hidden layer, lowest first: the units of a dense one, or the fields of a local one."""
    label: str = "overwrite"
    """How the input shows the label, a key of `LABELS`, or `none`."""
    label_scale: float = 1.0
    """Value that stands for the label, as pixels count from 0 to 1."""
    subtract_mean: bool = False
    """Whether to subtract each image's own mean."""
    predict_from: int = 2
    """First layer, counted from 1, that goodness and readout look at when they predict."""
    seed: int = 0
    """Key of the initial weights."""
    rule: Rule = RELEASE
    """How the layers learn."""
    learned_goodness: bool = True
    """Whether they learned by goodness; after backpropagation it says nothing, and only the readout predicts."""
    thresholds: tuple[float | None, ...] = ()
    """Of each layer's goodness, None for the number of its units; empty where that is all layers'."""
    readout_update: Update = READOUT_UPDATE
    precision: str = "float32"
    """Type of the layers' matrix products, `float32` or `bfloat16`."""
    untrained: tuple[int, ...] = ()
    """Classes without training samples, whose labels are never tried."""

    def __post_init__(self) -> None:
        """Holds what must fit together to its rule.

        Raises:
            ValueError: There is no layer, none is left to predict from, a local one has nothing to read, a label cannot
                be shown, or there are too many classes.
        """
        if not self.layers:
            raise ValueError("layers must name at least one layer (layers: ())")
        is_local = [isinstance(layer, Fields) for layer in self.layers]
        if self.label == "everywhere" and not is_local[0]:
            raise ValueError("label=everywhere shows the label to each field, and the first layer has none; append it")
        if self.label not in ("everywhere", "none") and is_local[0]:
            raise ValueError(f"label={self.label} puts the label where few fields look; set it to everywhere")
        for number, layer in enumerate(self.layers, 1):
            if not isinstance(layer, Fields):
                continue
            below = self.map_below(number - 1)
            if below is None:
                raise ValueError(
                    f"layer {number} has local fields and no plane to look at, because a dense layer is below"
                )
            if not layer.fit(below):
                raise ValueError(
                    f"layer {number} has fields that lie wholly beyond the {below.height} x {below.width} map below "
                    f"(grid: {layer.grid}, stride: {layer.stride}, field: {layer.field})"
                )
        if not 1 <= self.predict_from <= len(self.layers):
            raise ValueError(
                f"predict_from must be one of the layers, 1 to {len(self.layers)} (predict_from: {self.predict_from})"
            )
        if self.label not in (*LABELS, "none"):
            raise ValueError(f"label must be one of {', '.join(LABELS)}, none (label: {self.label})")
        if not 1 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"classes must be from 1 to {MAX_CLASSES} (classes: {self.classes})")
        if not set(self.untrained) < set(range(self.classes)):
            raise ValueError(f"untrained must be some of the {self.classes} classes (untrained: {self.untrained})")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16 (precision: {self.precision})")
        if len(self.thresholds) not in (0, len(self.layers)):
            raise ValueError(
                f"all of the {len(self.layers)} layers have a threshold, or none (given: {self.thresholds})"
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which products are made and activities travel."""
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    @property
    def pixels(self) -> int:
        """Values of one image D, all channels."""
        return math.prod(self.shape)

    @property
    def labels_shown(self) -> bool:
        """Whether the input shows a label."""
        return self.label != "none"

    @property
    def goodness_predicts(self) -> bool:
        """Whether every label is tried, and the one with the most goodness predicted."""
        return self.labels_shown and self.learned_goodness

    @property
    def tried(self) -> list[int]:
        """Labels that are tried when it predicts by goodness, T of the C classes."""
        return [label for label in range(self.classes) if label not in self.untrained]

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the input rows, then of each layer's output."""
        shown = self.classes if self.label in ("append", "everywhere") else 0
        return (
            self.pixels + shown,
            *(layer.above().values if isinstance(layer, Fields) else layer for layer in self.layers),
        )

    @property
    def weights(self) -> tuple[int, ...]:
        """Number of weights of each layer."""
        return tuple(units * self.fan_in(index) for index, units in enumerate(self.widths[1:]))

    @property
    def state_bytes(self) -> tuple[int, ...]:
        """Bytes of the parameters and optimizer state of each layer, and then of the readout."""
        units, readout = self.widths[1:], self.classes * (1 + sum(self.widths[self.predict_from :]))
        values = [
            self.rule.update.num_values(weights + count) + count  # with each unit's mean activity
            for weights, count in zip(self.weights, units, strict=True)
        ]
        return tuple(torch.float32.itemsize * each for each in (*values, self.readout_update.num_values(readout)))

    @property
    def copy_bytes(self) -> tuple[int, ...]:
        """Bytes of the copy of the weights that each layer computes with, where it is one."""
        copies = []
        for index, layer in enumerate(self.layers):
            below, size = self.map_below(index), self.weights[index] * (self.compute_dtype != torch.float32)
            if isinstance(layer, Fields) and below:
                size = layer.band_weights(below, self.widths[index] - below.values) or size
            copies.append(size * self.compute_dtype.itemsize)
        return tuple(copies)

    def fan_in(self, index: int) -> int:
        """Returns how many values each unit of layer `index`, counted from 0, reads."""
        layer, below = self.layers[index], self.map_below(index)
        if isinstance(layer, Fields) and below:
            return layer.field**2 * below.depth + self.widths[index] - below.values
        return self.widths[index]

    def map_below(self, index: int) -> Map | None:
        """Returns how layer `index`, counted from 0, sees what it reads; None above a dense layer."""
        if index == 0:
            channels, height, width = self.shape
            return Map(height, width, channels, channels_first=True)
        below = self.layers[index - 1]
        return below.above() if isinstance(below, Fields) else None

    def layer(self, index: int) -> Layer:
        """Builds hidden layer `index`, counted from 0, with its initial weights."""
        has_values = torch.get_default_device().type != "meta"  # arithmetic there would import torch's compiler
        settings = {
            "rule": self.rule,
            "threshold": self.thresholds[index] if self.thresholds else None,
            "compute_dtype": self.compute_dtype,
            "generator": generator(self.seed, "layer", index) if has_values else None,
        }
        layer, below = self.layers[index], self.map_below(index)
        if isinstance(layer, Fields):
            assert below, "holds since __post_init__"
            return Local(below, layer, shared=self.widths[index] - below.values, **settings)
        return Dense(self.widths[index], layer, **settings)

    def readout(self) -> Readout:
        """Builds the readout, with its initial zeros."""
        return Readout(sum(self.widths[self.predict_from :]), self.classes, update=self.readout_update)

    def rows(self, images: Tensor, values: Tensor | None) -> Tensor:
        """Turns images and label values into input rows.

        Args:
            images: `[..., D]`, uint8, 0 to 255.
            values: `[..., C]`, float32, 1 for the label; None where none is shown.

        Returns:
            Normalized rows `[..., D']`, in the compute type.
        """
        rows = images.to(torch.float32) / 255
        if self.subtract_mean:  # of whole numbers, whose sum is the same in any order
            rows = rows - images.sum(-1, keepdim=True) / (255 * self.pixels)
        if values is not None:
            rows = LABELS[self.label](rows, values * self.label_scale)
        return NORMALIZATIONS[self.rule.normalization](rows, squared_length(rows)).to(self.compute_dtype)

    def claiming_rows(self, images: Tensor) -> Tensor:
        """Turns images `[N, D]` into rows with every label that is tried, in their order `[N, T, D']`."""
        labels = torch.tensor(self.tried, device=images.device).expand(len(images), -1)
        return self.rows(images.unsqueeze(1), one_hot(labels, self.classes))

    def by_class(self, goodness: Tensor) -> Tensor:
        """Returns the goodness of every class `[..., C]` from that of the labels tried `[..., T]`; of others -inf."""
        if not self.untrained or not goodness.shape[-1]:
            return goodness
        every = goodness.new_full((*goodness.shape[:-1], self.classes), -torch.inf)
        every[..., self.tried] = goodness
        return every

    def neutral_rows(self, images: Tensor) -> Tensor:
        """Turns images `[..., D]` into the rows that the readout's pass reads: with the neutral label, or none."""
        return self.rows(images, neutral(images, self.classes) if self.labels_shown else None)


class Prediction(NamedTuple):
    """What the network makes of images."""

    probabilities: Tensor
    """The readout's, from one neutral pass `[B, C]`."""
    goodness: Tensor
    """Each layer's goodness for every label `[L, B, C]`, -inf for one that is not tried; `[L, B, 0]` where it does not
    predict."""
    label: Tensor
    """The label of the greatest goodness, summed over the predicting layers; else the readout's `[B]`."""


class Network(nn.Module):
    """Layers and readout in one module, for use after training.

    Args:
        architecture: What to build.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.layers = nn.ModuleList(architecture.layer(index) for index in range(len(architecture.layers)))
        self.readout = architecture.readout()

    @classmethod
    def for_inference(cls, architecture: Architecture, tensors: Mapping[str, Tensor]) -> "Network":
        """Builds a network that cannot be trained around weights, which are not copied.

        It draws no initial weights and has no optimizer state, so that it takes little memory beside the weights.

        Args:
            architecture: What to build.
            tensors: `layers.0.weight`, `layers.0.bias`, ..., `readout.bias`; others are ignored.

        Raises:
            KeyError: One is missing.
            RuntimeError: One has another shape.
        """
        with torch.device("meta"):
            network = cls(architecture)
        weights = {name: tensors[name] for name, _ in network.named_parameters()}
        network.load_state_dict(weights, strict=False, assign=True)
        for module in network.modules():
            for name in [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]:
                delattr(module, name)
        return network

    def read(self, rows: Tensor) -> list[Tensor]:
        """Returns what the readout reads of neutral rows `[B, D]`, each layer's normalized activities `[B, H]`."""
        activities = []
        for layer in self.layers:
            rows = layer(rows).activity
            activities.append(rows)
        return activities[self.architecture.predict_from - 1 :]

    def goodness(self, rows: Tensor) -> Tensor:
        """Returns each layer's goodness for rows `[..., D']`, `[L, ...]`."""
        goodness_of_layers = []
        for layer in self.layers:
            rows, goodness = layer(rows)
            goodness_of_layers.append(goodness)
        return torch.stack(goodness_of_layers)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the readout's logits `[B, C]` for uint8 images `[B, D]`, from one pass without a claim."""
        logits: Tensor = self.readout(self.read(self.architecture.neutral_rows(images)))
        return logits

    def predict(self, images: Tensor, watched: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter) -> Prediction:
        """Predicts what images show, in both ways: one neutral pass for the readout, and one pass a label for goodness.

        Args:
            images: uint8 `[B, D]`; they are taken some at a time.
            watched: Takes the parts and yields them, such as to show how far it is.
        """
        parts = torch.split(images, max(1, ROWS // len(self.architecture.tried)))
        probabilities, goodness, label = zip(*map(self._predict, watched(parts)), strict=True)
        return Prediction(torch.cat(probabilities), torch.cat(goodness, 1), torch.cat(label))

    def _predict(self, images: Tensor) -> Prediction:
        architecture = self.architecture
        probabilities = self(images).softmax(-1)
        if not architecture.goodness_predicts:
            none = probabilities.new_empty(len(self.layers), len(images), 0)
            return Prediction(probabilities, none, probabilities.argmax(-1))
        by_layer = architecture.by_class(self.goodness(architecture.claiming_rows(images)))
        return Prediction(probabilities, by_layer, total_goodness(by_layer, architecture.predict_from).argmax(-1))
