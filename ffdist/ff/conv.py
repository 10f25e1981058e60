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
RUNNING_MOMENTUM = 0.1
"""Weight of a minibatch in the running means and variances, as in torch."""


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

    def prepare(self, rows: Tensor) -> Tensor:
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

        The gradient flows through these statistics for the positive rows only.
        """
        self.requires_grad_()
        with torch.enable_grad():
            maps = self._convolve(inputs)
            if self._spec.norm == "batch":
                others = maps[batch:]
                positive = maps[:batch] if len(others) else maps  # the gradient of a slice would be in another order
                statistics = *self._running, self.factor, self.bias
                maps = F.batch_norm(positive, *statistics, training=True, momentum=RUNNING_MOMENTUM)
                if len(others):
                    variance, mean = torch.var_mean(positive.detach(), (0, 2, 3), correction=0)
                    maps = torch.cat((maps, F.batch_norm(others, mean, variance, self.factor, self.bias)))
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
