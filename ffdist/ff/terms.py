"""Losses of a layer that are added to its objective, on the activations of the positive rows.

Shapes: `B` samples of a minibatch, `H` units, `F` features, `C` classes.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffdist.ff.forms import Form

KERNEL = 3
"""Side length of the convolution of `Similarity`."""
PROJECTED, TEMPERATURE = 128, 0.1
"""Number of values in which `Contrast` compares samples, and the temperature of its softmax (Khosla et al. 2020)."""


class Term(nn.Module, ABC):
    """A loss that is added to an objective. Its parameters belong to the layer.

    Args:
        form: Form of the layer's activations.
        classes: Number of classes C.
        pooled_features: Largest number of features of a map after average pooling.
        compute_dtype: Type of convolutions; everything else is float32.
        generator: Source of the initial weights; zeros without it.
    """

    def __init__(
        self,
        form: Form,
        classes: int,
        *,
        pooled_features: int,
        compute_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.form, self.classes, self.compute_dtype = form, classes, compute_dtype
        self.pooled = form.pooled(pooled_features)
        shape = self.shape()
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        initial = torch.randn(shape, generator=generator) * scale if generator else torch.zeros(shape)
        self.weight = nn.Parameter(initial, requires_grad=False)

    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the weight."""

    @abstractmethod
    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss, a scalar, from activations `[B, H]` and true labels `[B]`."""


class Similarity(Term):
    """The samples of a minibatch should be similar if their labels are equal (Nokland and Eidnes 2019, `sim`).

    The mean square of the differences between two `[B, B]` matrices of cosines: of the samples, and of their one-hot
    labels. A map passes through a convolution of the loss, and each channel is represented by its standard deviation
    over all places; a vector passes through a linear map.
    """

    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the kernels, or of the linear map."""
        channels = self.form.shape[0]
        return (channels, channels, KERNEL, KERNEL) if self.form.is_map else (self.form.size, self.form.size)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss."""
        weight = self.weight.to(self.compute_dtype)
        if self.form.is_map:
            maps = self.form.values(activations).to(self.compute_dtype)
            maps = F.conv2d(maps, weight.contiguous(memory_format=torch.channels_last), padding=KERNEL // 2)
            values = maps.to(activations.dtype).flatten(2).std(2, correction=0)
        else:
            values = F.linear(activations.to(self.compute_dtype), weight).to(activations.dtype)
        targets = _cosines(F.one_hot(labels, self.classes).to(values.dtype))
        difference: Tensor = _cosines(values) - targets
        return difference.square().mean()


def _cosines(values: Tensor) -> Tensor:
    """Returns the cosines between the rows of values `[B, F]`, each minus its own mean, `[B, B]`."""
    centered = values - values.mean(1, keepdim=True)
    scaled = centered / (torch.linalg.vector_norm(centered, dim=1, keepdim=True) + 1e-8)
    cosines: Tensor = scaled @ scaled.t()
    return cosines


class Contrast(Term):
    """A sample should be most similar to those with its label (Khosla et al. 2020, supervised contrastive loss).

    The average-pooled activations pass through a linear map of the loss. Samples whose label no other one in the
    minibatch has do not count.
    """

    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the linear map."""
        return PROJECTED, self.pooled.size

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss."""
        return self.loss_of_pooled(self.form.pool(activations, self.pooled), labels)

    def loss_of_pooled(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss from average-pooled activations `[B, F]`."""
        projected = F.normalize(F.linear(pooled, self.weight), dim=1)
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        logits = (projected @ projected.t() / TEMPERATURE).masked_fill(itself, -torch.inf)
        is_same = (labels.unsqueeze(1) == labels) & ~itself
        log_probability = logits.log_softmax(1).masked_fill(~is_same, 0)
        num_same = is_same.sum(1)
        by_sample = -log_probability.sum(1) / num_same.clamp(min=1)
        loss: Tensor = by_sample.sum() / (num_same > 0).sum().clamp(min=1)
        return loss


TERMS: dict[str, type[Term]] = {"similarity": Similarity, "contrast": Contrast}
"""Losses that are added to an objective, by the setting of their weight in the section `training`."""
