"""Layers that train on their own loss: forward pass, closed-form gradient and update of one minibatch."""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ffdist.ff.goodness import logistic_loss, normalize, sum_of_squares
from ffdist.ff.update import LAYER_UPDATE, Update

METRICS = ("loss", "goodness_positive", "goodness_negative", "pairwise_error", "active_fraction", "weight_rms")
"""What a layer reports of a minibatch, in this order."""

PEER_SMOOTHING, PEER_START = 0.9, 0.5
"""Running mean of each unit's activity: weight of the past, and where it starts."""


class Passed(NamedTuple):
    """What a layer hands on."""

    activity: Tensor
    """Normalized activities `[..., H]`, in the compute type."""
    goodness: Tensor
    """Sum of squared activities before normalization `[...]`, float32."""


class Layer(nn.Module, ABC):
    """A ReLU layer (Hinton 2022, sections 2 and 2.1); its kinds say which inputs reach which units.

    Args:
        shape: Shape of the weight, fan-in F last; one unit per row.
        update: How parameters follow the gradient.
        peer_strength: Strength of the pull of each unit's mean activity towards the mean of the layer, which revives
            dead units (released code; 0 turns it off).
        compute_dtype: Type of the matrix products. Parameters, goodness and updates stay float32.
        generator: Source of the initial weights, N(0, 1) / sqrt(F); zeros where there is none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        update: Update = LAYER_UPDATE,
        peer_strength: float = 0.03,
        compute_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.update, self.peer_strength, self.compute_dtype = update, peer_strength, compute_dtype
        units = math.prod(shape[:-1])
        self.threshold = float(units)
        start = torch.randn(shape, generator=generator) if generator else torch.zeros(shape)
        self.weight = nn.Parameter(start / math.sqrt(shape[-1]), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(units), requires_grad=False)
        self.register_buffer("weight_gradient", torch.zeros_like(self.weight))
        self.register_buffer("bias_gradient", torch.zeros_like(self.bias))
        self.register_buffer("mean_activity", torch.full_like(self.bias, PEER_START))
        self.weight_gradient: Tensor
        self.bias_gradient: Tensor
        self.mean_activity: Tensor
        self._compute_weight: Tensor
        self.register_buffer("_compute_weight", torch.empty(0), persistent=False)
        self.refresh()
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Renews the copy of the weights that the products use; due when weights were set or moved from outside."""
        self._compute_weight = self.weight.detach().to(self.compute_dtype)

    def _renew(self) -> None:
        """Brings the copy up to the weights, in place."""
        if self._compute_weight.data_ptr() != self.weight.data_ptr():
            self._compute_weight.copy_(self.weight)

    @abstractmethod
    def _inputs(self, rows: Tensor) -> Tensor:
        """Lays rows `[R, D]` out as the products want them, `[R, ...]`."""

    @abstractmethod
    def _product(self, inputs: Tensor) -> Tensor:
        """Returns the units' weighted sums `[R, H]`, in the compute type."""

    @abstractmethod
    def _gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """Returns the weight's gradient, summed over rows, from those of the total inputs `[R, H]`."""

    def _activity(self, inputs: Tensor) -> Tensor:
        return self._product(inputs).to(self.weight.dtype).add_(self.bias).relu_()

    def forward(self, rows: Tensor) -> Passed:
        """Passes rows `[..., D]` of the compute type on, at the present weights."""
        activity = self._activity(self._inputs(rows.reshape(-1, rows.shape[-1])))
        return self._pass_on(activity.reshape(*rows.shape[:-1], -1))

    def _pass_on(self, activity: Tensor) -> Passed:
        goodness = sum_of_squares(activity)
        return Passed(normalize(activity, goodness).to(self.compute_dtype), goodness)

    def train_minibatch(
        self, rows: Tensor, *, batch: int, negatives: int = 1, gain: float = 1.0, measure_weights: bool = False
    ) -> tuple[Passed, Tensor]:
        """Passes a minibatch on and makes one update, all passes at the same weights.

        The gradient of the log-likelihood with respect to the total input is `(1 - p) h` on positive and `-p h` on
        negative rows; the factor 2 of the square is in the learning rate. Where a sample has several negatives, each
        weighs its share of one. Further rows, such as the neutral ones, only pass.

        Args:
            rows: B positive, then `negatives` times B negative rows, then others `[R, D]`, in the compute type.
            batch: Number of samples B.
            negatives: Negative rows of each sample.
            gain: Factor on the learning rate.
            measure_weights: Whether to take the root mean square of the weights as well (a pass over all of them).

        Returns:
            What goes on, `[R, H]` and `[R]`, computed at the weights before the update; and METRICS `[6]`, float32.
        """
        num_trained = batch * (1 + negatives)
        inputs = self._inputs(rows)
        activity = self._activity(inputs)
        passed = self._pass_on(activity)
        positive, negative = passed.goodness[:batch], passed.goodness[batch:num_trained]
        loss, pull = logistic_loss(positive, negative, self.threshold)
        trained = activity[:num_trained]
        metrics = torch.stack(
            (
                (loss[:batch].mean() + loss[batch:].mean()) / 2,
                positive.mean(),
                negative.mean(),
                (negative.view(negatives, batch) >= positive).float().mean(),
                (trained > 0).float().mean(),
                self.weight.square().mean().sqrt() if measure_weights else loss.new_tensor(math.nan),
            )
        ).float()

        pull[batch:] /= negatives
        self.mean_activity.lerp_(trained[:batch].mean(0), 1 - PEER_SMOOTHING)
        direction = trained * pull.unsqueeze(1)
        direction[:batch] += self.peer_strength * (self.mean_activity.mean() - self.mean_activity)
        gradient = self._gradient(direction.to(self.compute_dtype), inputs[:num_trained])
        self.update.ascend(self.weight, self.weight_gradient, gradient, gain=gain, batch=batch, decay=True)
        self.update.ascend(self.bias, self.bias_gradient, direction.sum(0), gain=gain, batch=batch, decay=False)
        self._renew()
        return passed, metrics


class Dense(Layer):
    """A layer whose every unit reads the whole row.

    Args:
        inputs: Width D of a row.
        units: Number of units H; also the threshold of the goodness.
        **settings: As `Layer` takes them.
    """

    def __init__(self, inputs: int, units: int, **settings: Any) -> None:
        super().__init__((units, inputs), **settings)

    def _inputs(self, rows: Tensor) -> Tensor:
        return rows

    def _product(self, inputs: Tensor) -> Tensor:
        return torch.mm(inputs, self._compute_weight.t())

    def _gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        return torch.mm(direction.t(), inputs)
