"""Convolutional layers.

Shapes: `R` rows, the first `B` of them positive, `C` channels, `Y` and `X` sides of a map. Maps are channels-last.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffdist.ff.forms import Form
from ffdist.ff.layers import Layer
from ffdist.ff.specs import Conv

MAX_GROUPS = 32
"""Largest number of groups of a group norm."""
EPSILON = 1e-5
"""Added to variances, as in torch."""
RUNNING_MOMENTUM = 0.1
"""Weight of a minibatch in the running means and variances, as in torch."""


class _PositiveBatchNorm(torch.autograd.Function):
    """A batch norm of all rows by the means and variances of the first rows, with its exact gradient.

    It is a function of its own because slices and elementwise operations take several times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, batch: int, *parameters: Tensor) -> Tensor:
        """Returns the normalized maps `[R, C, Y, X]`, and updates the running means.

        Args:
            ctx: Keeps values for the gradient.
            maps: Maps `[R, C, Y, X]`, of which the first rows determine the means and variances.
            batch: Number of these rows.
            parameters: Running means and variances, factors and biases of channels `[C]`.
        """
        running_mean, running_variance, factor, bias = parameters
        mean, variance = torch.batch_norm_update_stats(maps[:batch], running_mean, running_variance, RUNNING_MOMENTUM)
        ctx.batch = batch
        ctx.save_for_backward(maps, mean, variance, factor)
        return F.batch_norm(maps, mean, variance, factor, bias, eps=EPSILON)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the arguments of `forward`; None for those that have none."""
        maps, mean, variance, factor = ctx.saved_tensors
        # First as if means and variances were constants, and then through them, to the first rows.
        grad_maps, grad_factor, grad_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, maps, factor, mean, variance, None, None, False, EPSILON, [True, True, True]
        )
        positive = maps[: ctx.batch]
        scale = torch.rsqrt(variance + EPSILON)
        share = factor * scale / positive[:, 0].numel()
        slope = scale * share * grad_factor
        constant = share * grad_bias - mean * slope
        grad_maps[: ctx.batch].addcmul_(positive, slope[:, None, None], value=-1).sub_(constant[:, None, None])
        return grad_maps, None, None, None, grad_factor, grad_bias


class ConvLayer(Layer):
    """A convolution, a norm and an activation; the gradient is computed by autograd, within the layer.

    The weight is `[C, inputs, kernel, kernel]`; shared values, such as the label, are constant planes after the input
    channels. The convolution is in the compute type, and everything else in float32.

    Args:
        spec: The convolution.
        form: Form of the input.
        generator: Source of the initial weights, N(0, 2 / fan-in); zeros without it.
        **settings: See `Layer`.
    """

    def __init__(self, spec: Conv, form: Form, *, generator: torch.Generator | None = None, **settings: Any) -> None:
        super().__init__(spec.activation_form(form), **settings)
        self._spec, self._form, self._map = spec, form, spec.activation_form(form)
        shape = (spec.channels, form.shape[0] + form.shared, spec.kernel, spec.kernel)
        scale = math.sqrt(2 / spec.fan_in(form))
        initial = torch.randn(shape, generator=generator) * scale if generator else torch.zeros(shape)
        self.weight = nn.Parameter(initial, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(spec.channels), requires_grad=False)
        if spec.norm != "none":
            self.factor = nn.Parameter(torch.ones(spec.channels), requires_grad=False)
        if spec.norm == "batch":
            self.register_buffer("running_mean", torch.zeros(spec.channels))
            self.register_buffer("running_var", torch.ones(spec.channels))

    def arrange(self, rows: Tensor) -> Tensor:
        """Returns the input maps `[R, C, Y, X]` of rows `[R, D]`."""
        maps = self._form.values(rows)
        if self._form.shared:
            planes = self._form.shared_values(rows)[:, :, None, None].expand(-1, -1, *maps.shape[2:])
            maps = torch.cat((maps, planes), 1)
        return maps.contiguous(memory_format=torch.channels_last)

    def compute(self, inputs: Tensor) -> Tensor:
        """Returns the activations `[R, H]`; a batch norm uses the running means."""
        maps = self._convolve(inputs)
        if self._spec.norm == "batch":
            maps = F.batch_norm(maps, *self._running, self.factor, self.bias)
        return self._activate(maps)

    def compute_for_training(self, inputs: Tensor, batch: int, noise: Tensor | None) -> Tensor:
        """Returns the activations, with their graph; a batch norm uses the statistics of the positive rows.

        The gradient flows through these statistics for all rows. If it did so for the positive rows only, the negative
        ones would mostly change the means and scales of channels, which the norm removes.
        """
        self.requires_grad_()
        with torch.enable_grad():
            maps = self._convolve(inputs)
            if self._spec.norm == "batch":
                statistics = *self._running, self.factor, self.bias
                if batch == len(maps):
                    maps = F.batch_norm(maps, *statistics, training=True, momentum=RUNNING_MOMENTUM)
                else:
                    maps = _PositiveBatchNorm.apply(maps, batch, *statistics)
            return self._activate(maps)

    @property
    def _running(self) -> tuple[Tensor, Tensor]:
        return self.get_buffer("running_mean"), self.get_buffer("running_var")

    def _convolve(self, inputs: Tensor) -> Tensor:
        weight = self.weight.to(inputs.dtype, memory_format=torch.channels_last)
        maps = F.conv2d(inputs, weight, stride=self._spec.stride, padding=self._spec.border)
        return maps.to(self.weight.dtype)

    def _activate(self, maps: Tensor) -> Tensor:
        """Returns rows `[R, H]` of maps before or after their batch norm."""
        if self._spec.norm == "group":
            maps = F.group_norm(maps, math.gcd(MAX_GROUPS, self._spec.channels), self.factor, self.bias)
        elif self._spec.norm == "none":
            maps = maps + self.bias[:, None, None]
        maps = maps.relu() if self._spec.activation == "relu" else F.leaky_relu(maps)
        return maps.permute(0, 2, 3, 1).flatten(1)

    def pass_on(self, activations: Tensor, noise: Tensor | None) -> Tensor:
        """Returns the activations `[..., H]` after pooling and dropout `[..., H']`."""
        if self._spec.pool == "none" and noise is None:
            return activations
        maps = self._map.values(activations.reshape(-1, activations.shape[-1]))
        if self._spec.pool != "none":
            maps = F.max_pool2d(maps, 2) if self._spec.pool == "max" else F.avg_pool2d(maps, 2)
        if noise is not None:  # the same for all passes of a sample
            maps = maps * noise.repeat(len(maps) // len(noise), 1)[:, :, None, None]
        return maps.permute(0, 2, 3, 1).reshape(*activations.shape[:-1], -1)

    @property
    def draws(self) -> bool:
        """Whether there is dropout."""
        return self._spec.dropout > 0

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draws the factor of each channel of a sample `[B, C]`: 0, or the reciprocal of the probability to keep it."""
        kept = torch.rand(batch, self._spec.channels, generator=generator) >= self._spec.dropout
        return kept / (1 - self._spec.dropout)
