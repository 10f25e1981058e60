"""Layers that train on their own loss: forward pass, closed-form gradient and update of one minibatch."""

import math
from typing import NamedTuple

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


class Dense(nn.Module):
    """A fully connected ReLU layer (Hinton 2022, sections 2 and 2.1).

    Args:
        inputs: Width D of a row.
        units: Number of units H; also the threshold of the goodness.
        update: How parameters follow the gradient.
        peer_strength: Strength of the pull of each unit's mean activity towards the mean of the layer, which revives
            dead units (released code; 0 turns it off).
        compute_dtype: Type of the matrix products. Parameters, goodness and updates stay float32.
        generator: Source of the initial weights, N(0, 1) / sqrt(D); zeros where there is none.
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        *,
        update: Update = LAYER_UPDATE,
        peer_strength: float = 0.03,
        compute_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.update, self.peer_strength, self.compute_dtype = update, peer_strength, compute_dtype
        self.threshold = float(units)
        start = torch.randn(units, inputs, generator=generator) if generator else torch.zeros(units, inputs)
        self.weight = nn.Parameter(start / math.sqrt(inputs), requires_grad=False)
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

    def activity(self, rows: Tensor) -> Tensor:
        """Returns activities before normalization `[R, D] -> [R, H]`, float32 or wider."""
        product = torch.mm(rows, self._compute_weight.t())
        return product.to(self.weight.dtype).add_(self.bias).relu_()

    def forward(self, rows: Tensor) -> Passed:
        """Passes rows `[..., D]` of the compute type on, at the present weights."""
        activity = self.activity(rows.reshape(-1, rows.shape[-1])).reshape(*rows.shape[:-1], -1)
        return self._pass_on(activity)

    def _pass_on(self, activity: Tensor) -> Passed:
        goodness = sum_of_squares(activity)
        return Passed(normalize(activity, goodness).to(self.compute_dtype), goodness)

    def train_minibatch(
        self, rows: Tensor, *, gain: float = 1.0, measure_weights: bool = False
    ) -> tuple[Passed, Tensor]:
        """Passes a minibatch on and makes one update, both passes at the same weights.

        The gradient of the log-likelihood with respect to the total input is `(1 - p) h` on positive and `-p h` on
        negative rows; the factor 2 of the square is in the learning rate. The neutral rows only pass.

        Args:
            rows: Positive, negative and neutral rows `[3B, D]`, in the compute type.
            gain: Factor on the learning rate.
            measure_weights: Whether to take the root mean square of the weights as well (a pass over all of them).

        Returns:
            What goes on, `[3B, H]` and `[3B]`, computed at the weights before the update; and METRICS `[6]`, float32.
        """
        batch = len(rows) // 3
        activity = self.activity(rows)
        passed = self._pass_on(activity)
        goodness = passed.goodness
        positive, negative = goodness[:batch], goodness[batch : 2 * batch]
        loss, pull = logistic_loss(positive, negative, self.threshold)
        trained = activity[: 2 * batch]
        metrics = torch.stack(
            (
                loss.mean(),
                positive.mean(),
                negative.mean(),
                (negative >= positive).float().mean(),
                (trained > 0).float().mean(),
                self.weight.square().mean().sqrt() if measure_weights else goodness.new_tensor(math.nan),
            )
        ).float()

        self.mean_activity.lerp_(trained[:batch].mean(0), 1 - PEER_SMOOTHING)
        direction = trained * pull.unsqueeze(1)
        direction[:batch] += self.peer_strength * (self.mean_activity.mean() - self.mean_activity)
        gradient = torch.mm(direction.to(self.compute_dtype).t(), rows[: 2 * batch])
        self.update.ascend(self.weight, self.weight_gradient, gradient, gain=gain, batch=batch, decay=True)
        self.update.ascend(self.bias, self.bias_gradient, direction.sum(0), gain=gain, batch=batch, decay=False)
        if self._compute_weight.data_ptr() != self.weight.data_ptr():
            self._compute_weight.copy_(self.weight)
        return passed, metrics
