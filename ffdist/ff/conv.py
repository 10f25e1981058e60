"""Convolutional layers.

Shapes: `R` rows, the first `B` of them positive, `C` channels, `Y` and `X` sides of a map. Maps are channels-last.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffdist.ff import kernels
from ffdist.ff.forms import Form
from ffdist.ff.layers import OBJECTIVE, Layer, Minibatch, Output
from ffdist.ff.objectives import Classifier
from ffdist.ff.specs import Conv

MAX_GROUPS = 32
"""Largest number of groups of a group norm."""
MAX_POSITIONS_OF_COLUMNS = 64
"""Largest number of positions of maps whose kernels learn by a product with columns, copies of what each position
reads. On CPUs, this is faster than torch's gradient of a convolution for such maps, and slower for larger ones."""
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
        return self._products(inputs).to(self.weight.dtype)

    def _products(self, inputs: Tensor) -> Tensor:
        """Returns the maps before their norm, of the compute type."""
        weight = self.weight.to(inputs.dtype, memory_format=torch.channels_last)
        return F.conv2d(inputs, weight, stride=self._spec.stride, padding=self._spec.border)

    def _weight_gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """Returns the gradient of the weight, from that of the maps before their norm `[R, Y, X, C]`."""
        spec, (rows, height, width, channels) = self._spec, direction.shape
        if height * width <= MAX_POSITIONS_OF_COLUMNS:
            padded = F.pad(inputs.permute(0, 2, 3, 1), (0, 0, *[spec.border] * 4))
            windows = padded.unfold(1, spec.kernel, spec.stride).unfold(2, spec.kernel, spec.stride)
            columns = windows.permute(0, 1, 2, 4, 5, 3).reshape(rows * height * width, -1)
            gradient = direction.view(-1, channels).t() @ columns
            return gradient.view(channels, spec.kernel, spec.kernel, -1).permute(0, 3, 1, 2)
        weight, constants = self.weight.to(inputs.dtype), ([spec.stride] * 2, [spec.border] * 2, [1, 1])
        of_weight: Tensor
        _, of_weight, _ = torch.ops.aten.convolution_backward(
            direction.permute(0, 3, 1, 2), inputs, weight, None, *constants, False, [0, 0], 1, [False, True, False]
        )
        return of_weight

    @torch.no_grad()
    def train_minibatch(
        self, minibatch: Minibatch, *, lr_scale: float | None = 1.0, measure: bool = False
    ) -> tuple[Output, Tensor]:
        """Computes the output for a minibatch, and then learns from it; see `Layer`."""
        if lr_scale is None or not self._is_fused:
            return super().train_minibatch(minibatch, lr_scale=lr_scale, measure=measure)
        objective, labels = self.objective, minibatch.labels
        assert isinstance(objective, Classifier), "others have no kernels"
        assert labels is not None, "it needs labels"
        inputs = self.prepare(minibatch.rows)
        maps = self._products(inputs).permute(0, 2, 3, 1).contiguous()
        mean, variance = kernels.moments(maps)
        self._update_running(mean, variance, maps[..., 0].numel())
        rate = torch.rsqrt(variance + EPSILON)
        scale = (self.factor * rate).float()
        norm = kernels.Normalization(mean.float(), scale, self.bias - (mean * scale).float())
        form, pooled = self._map, objective.pooled
        side, counts = form.window(pooled), torch.tensor(form.window_sizes(pooled)).unsqueeze(-1)
        passed, sums, squares = kernels.activate_maps(
            maps, norm, minibatch.noise, pool=self._spec.pool, side=side, windows=pooled.shape[1:]
        )
        values, squares = (pooled.rows((each / counts).permute(0, 3, 1, 2)) for each in (sums, squares))
        loss = objective.pooled_loss(values, squares, labels)
        output = Output(passed.flatten(1).unsqueeze(0), loss.scores.unsqueeze(0))
        activations = (maps * scale + norm.shift).relu() if measure else maps
        metrics = self._metric_values(loss.metrics, activations, measure)
        slope, constant = (
            (pooled.values(gradient).permute(0, 2, 3, 1) / counts).contiguous()
            for gradient in (2 * loss.of_squares, loss.of_values)
        )
        direction, factor, bias = kernels.backward_maps(maps, norm, slope, constant, side=side, rate=rate)
        gradients = {"weight": self._weight_gradient(direction, inputs), "bias": bias}
        gradients |= {"factor": factor, **{f"{OBJECTIVE}{name}": each for name, each in loss.parameters.items()}}
        self.update_parameters(gradients, lr_scale)
        return output, metrics

    @property
    def _is_fused(self) -> bool:
        """Whether kernels train this layer; otherwise, torch's operations do."""
        rule, spec, weight = self.rule, self._spec, self.weight
        is_plain = type(self) is ConvLayer and spec.norm == "batch" and spec.activation == "relu"
        is_pooled = isinstance(self.objective, Classifier) and self.objective.is_pooled
        is_single = rule.updates_per_minibatch == 1 and not rule.peer_strength
        is_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        return rule.executor == "fused" and is_plain and is_pooled and is_single and is_on_cpu

    def _update_running(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Updates the running means and variances by those of a minibatch, of so many positions."""
        running_mean, running_variance = self._running
        running_mean.lerp_(mean.float(), RUNNING_MOMENTUM)
        running_variance.lerp_((variance * (count / (count - 1))).float(), RUNNING_MOMENTUM)

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
