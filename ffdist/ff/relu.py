"""The base of ReLU layers, whose gradient is computed in closed form (Hinton 2022, sections 2 and 2.1).

Shapes: `R` rows, `D` inputs, `H` units in `F` blocks of `U` units.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ffdist.ff import kernels
from ffdist.ff.forms import Form
from ffdist.ff.labels import LabeledRows, Rows
from ffdist.ff.layers import Layer, Minibatch, Output
from ffdist.ff.objectives import GoodnessObjective, Loss
from ffdist.ff.optimizers import buffer_name


def _refresh(layer: "ReluLayer", _: Any) -> None:
    layer.refresh()


def _by_row(blocks: Tensor) -> Tensor:
    """Returns blocks of units `[F, R, U]` as rows `[R, H]`."""
    return blocks.transpose(0, 1).flatten(1)


def _unflatten(tensor: Tensor, leading: Sequence[int]) -> Tensor:
    unflattened: Tensor = tensor.unflatten(0, leading)  # type: ignore[no-untyped-call]
    return unflattened


class ReluLayer(Layer):
    """A ReLU layer. Its kinds determine which inputs each unit reads.

    Args:
        form: Form of the output.
        shape: Shape of the weight, with the number of inputs of a unit last.
        generator: Source of the initial weights, N(0, 1) divided by the square root of the number of inputs of a unit;
            zeros without it.
        **settings: See `Layer`.
    """

    is_relu = True
    has_kernels: ClassVar[bool] = False
    """Whether kernels can train this very class; subclasses do not inherit it."""

    def __init__(
        self, form: Form, shape: tuple[int, ...], *, generator: torch.Generator | None = None, **settings: Any
    ) -> None:
        super().__init__(form, **settings)
        initial = torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) if generator else torch.zeros(shape)
        self.weight = nn.Parameter(initial, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(form.size), requires_grad=False)
        self._compute_weight: Tensor
        self.register_buffer("_compute_weight", torch.empty(0), persistent=False)
        self.refresh()
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Updates the copy of the weights that the products use.

        This happens automatically after in-place changes and `.to(...)`. Call it after changes that autograd does not
        see, such as `weight.data.mul_(2)`. Gradients flow through the copy if the weights require them.
        """
        self._compute_weight = self.weight.to(self.compute_dtype).view_as(self.weight)
        self._copied_version = self._weight_version

    @property
    def _weight_version(self) -> tuple[int, int]:
        """Identifies the values of the weights; differs after in-place changes, moves and copies of the module."""
        return self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version

    def _refresh_if_changed(self) -> None:
        # Tracing replaces weights by symbols, and would record the copy as part of the network.
        if not torch.compiler.is_compiling() and self._copied_version != self._weight_version:
            self.refresh()

    @property
    def _copy(self) -> Tensor | None:
        """The copy of the weights, if there is one and it has the same shape."""
        return None if self._compute_weight.data_ptr() == self.weight.data_ptr() else self._compute_weight

    def _update_copy(self) -> None:
        """Updates a copy of another shape, in place."""

    @abstractmethod
    def _product(self, inputs: Tensor) -> Tensor:
        """Returns the units' weighted sums in blocks of units that read the same inputs `[F, R, U]`."""

    @abstractmethod
    def _weight_gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """Returns the gradient of the weight, summed over rows, from that of the weighted sums `[F, R, U]`."""

    def prepare(self, rows: Rows) -> Rows:
        """Arranges rows `[..., D]`, `[R, ...]`. Of rows that show labels, it arranges the samples, `[..., ...]`."""
        if not isinstance(rows, LabeledRows):
            return self.arrange(rows.reshape(-1, rows.shape[-1]))
        samples = self.arrange(rows.samples.to(self.compute_dtype).reshape(-1, rows.samples.shape[-1]))
        return replace(rows, samples=_unflatten(samples, rows.samples.shape[:-1]))

    def compute(self, inputs: Rows) -> Tensor:
        """Returns the activations `[R, H]`."""
        self._refresh_if_changed()
        if isinstance(inputs, LabeledRows):
            return self._labeled_sums(inputs).relu_()
        return _by_row(self._product(inputs)).to(self.weight.dtype).add_(self.bias).relu_()

    def _labeled_sums(self, inputs: LabeledRows) -> Tensor:
        """Returns the units' weighted sums, with their bias `[R, H]`, float32."""
        leading = inputs.samples.shape[: inputs.factors.dim()]
        of_samples = _by_row(self._product(inputs.samples.flatten(0, len(leading) - 1))).to(self.weight.dtype)
        factors = inputs.factors.unsqueeze(-1).to(self.weight.dtype)
        labels = (inputs.labels * factors).flatten(0, -2)
        sums = torch.addmm(self.bias, labels, self.weight.flatten(0, -2)[:, inputs.place].t())
        by_row = sums.view(*inputs.factors.shape, -1)
        return by_row.addcmul_(_unflatten(of_samples, leading), factors).flatten(0, -2)

    def compute_for_training(self, inputs: Rows, batch: int, noise: Tensor | None) -> Tensor:
        """Returns the activations `[R, H]`; the closed form needs nothing else."""
        return self.compute(inputs)

    def gradients(self, direction: Tensor, inputs: Rows, activations: Tensor, passes: slice) -> Mapping[str, Tensor]:
        """Returns the gradients of weight and bias."""
        by_row, batch = direction.flatten(0, 1), direction.shape[1]
        bias = by_row.sum(0)
        if not isinstance(inputs, LabeledRows):
            rows = inputs[passes.start * batch : passes.stop * batch]
            return {"weight": self._weight_gradient(self._by_block(by_row), rows), "bias": bias}
        inputs = inputs[passes]
        scaled = direction * inputs.factors.unsqueeze(-1)
        is_shared = inputs.samples.shape[0] == 1
        of_samples = self._by_block(scaled.sum(0) if is_shared else scaled.flatten(0, 1))
        weight = self._weight_gradient(of_samples, inputs.samples.flatten(0, 1))
        labels = inputs.labels.expand(*inputs.factors.shape, -1).flatten(0, 1).to(scaled.dtype)
        weight.flatten(0, -2)[:, inputs.place] = (scaled.flatten(0, 1).t() @ labels).to(weight.dtype)
        return {"weight": weight, "bias": bias}

    def _by_block(self, direction: Tensor) -> Tensor:
        """Returns a direction `[R, H]` in blocks `[F, R, U]`, of the compute type.

        They are contiguous, because transposing interleaved blocks would take longer than the product.
        """
        by_block = direction.to(self.compute_dtype).view(len(direction), self._num_blocks, -1)
        return by_block.transpose(0, 1).contiguous()

    @property
    def _num_blocks(self) -> int:
        """Number of blocks of units that read the same inputs F."""
        return 1

    @torch.no_grad()
    def train_minibatch(
        self, minibatch: Minibatch, *, lr_scale: float | None = 1.0, measure: bool = False
    ) -> tuple[Output, Tensor]:
        """Computes the output for a minibatch, and then learns from it; see `Layer`."""
        if lr_scale is None or not self._is_fused:
            return super().train_minibatch(minibatch, lr_scale=lr_scale, measure=measure)
        (num_passes, batch), num_trained = minibatch.rows.shape[:2], minibatch.passes.num_trained
        inputs = self.prepare(minibatch.rows)
        self._refresh_if_changed()
        if isinstance(inputs, LabeledRows):
            sums, bias = self._labeled_sums(inputs).unsqueeze(0), torch.zeros_like(self.bias)
        else:
            sums, bias = self._product(inputs), self.bias
        normalization = self.rule.normalization
        activated = kernels.activate(sums, bias, batch, normalization=normalization, dtype=self.compute_dtype)
        passed = activated.passed.view(num_passes, batch, -1)
        output = Output(passed, self.objective.scores(passed, activated.squares.view(num_passes, batch)))
        loss = self.objective.loss_of(passed[:num_trained], output.scores[:num_trained], minibatch.labels)
        metrics = self._metric_values(loss.metrics, passed[:num_trained], measure)
        self._learn_fused(inputs, activated, loss, lr_scale)
        return output, metrics

    @property
    def _is_fused(self) -> bool:
        """Whether kernels train this layer; otherwise, torch's operations do."""
        rule, weight = self.rule, self.weight
        is_simple = rule.update.optimizer == "hinton" and rule.update.clip_norm is None and not rule.terms
        is_single = not rule.alternating and rule.updates_per_minibatch == 1
        # Subclasses of the user may compute something else.
        is_plain = vars(type(self)).get("has_kernels", False) and type(self.objective) is GoodnessObjective
        is_linear = isinstance(self.objective, GoodnessObjective) and self.objective.is_linear
        is_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        return rule.executor == "fused" and is_simple and is_single and is_plain and is_linear and is_on_cpu

    def _learn_fused(self, inputs: Rows, activated: kernels.Activated, loss: Loss, lr_scale: float) -> None:
        """Makes the update of a minibatch, as `_learn` does."""
        assert loss.pull is not None, "the direction is linear"
        (num_trained, batch), peers = loss.pull.shape, torch.zeros_like(self.bias)
        if self.rule.peer_strength:
            peers = self._peer_direction(activated.totals / batch, batch)
        count, is_labeled = num_trained * batch, isinstance(inputs, LabeledRows)
        direction, bias = kernels.backward(
            activated.passed[:count],
            loss.pull.flatten() / activated.factors[:count],
            peers,
            batch,
            blocks=1 if is_labeled else self._num_blocks,
            dtype=torch.float32 if is_labeled else self.compute_dtype,
        )
        gradients: Mapping[str, Tensor]
        if isinstance(inputs, LabeledRows):
            gradients = self.gradients(direction.view(num_trained, batch, -1), inputs, direction, slice(0, num_trained))
        else:
            gradients = {"weight": self._weight_gradient(direction, inputs[:count]), "bias": bias}
        for name, gradient in gradients.items():
            parameter, update = self.get_parameter(name), self.rule.update
            kernels.update(
                parameter,
                self.optimizer.get_buffer(buffer_name(name, "gradient")),
                gradient.contiguous(),
                self._copy if name == "weight" else None,
                momentum=update.momentum,
                learning_rate=lr_scale * update.learning_rate,
                weight_decay=update.weight_decay if parameter.dim() > 1 else 0.0,
            )
            torch.autograd.graph.increment_version(parameter)
        self._update_copy()
        self._copied_version = self._weight_version

    def update_parameters(self, gradients: Mapping[str, Tensor], lr_scale: float) -> None:
        """Makes one update, also of the copy of the weights."""
        self.ascend(gradients, lr_scale=lr_scale, copies={"weight": self._copy})
        self._update_copy()
        self._copied_version = self._weight_version
