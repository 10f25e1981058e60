"""The base of ReLU layers, whose gradient is computed in closed form (Hinton 2022, sections 2 and 2.1)."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ffdist.ff.forms import Form
from ffdist.ff.labels import LabeledRows, Rows
from ffdist.ff.layers import Layer


def _refresh(layer: "ReluLayer", _: Any) -> None:
    layer.refresh()


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
        """Returns the units' weighted sums `[R, H]`, in the compute type."""

    @abstractmethod
    def _weight_gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """Returns the gradient of the weight, summed over rows, from that of the weighted sums `[R, H]`."""

    def prepare(self, rows: Rows) -> Rows:
        """Arranges rows `[..., D]`, `[R, ...]`. Of rows that show labels, it arranges the samples, `[..., ...]`."""
        if not isinstance(rows, LabeledRows):
            return self.arrange(rows.reshape(-1, rows.shape[-1]))
        samples = self.arrange(rows.samples.reshape(-1, rows.samples.shape[-1]))
        return replace(rows, samples=_unflatten(samples, rows.samples.shape[:-1]))

    def compute(self, inputs: Rows) -> Tensor:
        """Returns the activations `[R, H]`."""
        self._refresh_if_changed()
        if not isinstance(inputs, LabeledRows):
            return self._product(inputs).to(self.weight.dtype).add_(self.bias).relu_()
        leading = inputs.samples.shape[: inputs.factors.dim()]
        of_samples = self._product(inputs.samples.flatten(0, len(leading) - 1)).to(self.weight.dtype)
        factors = inputs.factors.unsqueeze(-1).to(self.weight.dtype)
        labels = (inputs.labels * factors).flatten(0, -2)
        sums = torch.addmm(self.bias, labels, self.weight.flatten(0, -2)[:, inputs.place].t())
        by_row = sums.view(*inputs.factors.shape, -1)
        return by_row.addcmul_(_unflatten(of_samples, leading), factors).relu_().flatten(0, -2)

    def compute_for_training(self, inputs: Rows, batch: int, noise: Tensor | None) -> Tensor:
        """Returns the activations `[R, H]`; the closed form needs nothing else."""
        return self.compute(inputs)

    def gradients(self, direction: Tensor, inputs: Rows, activations: Tensor, passes: slice) -> Mapping[str, Tensor]:
        """Returns the gradients of weight and bias."""
        by_row, batch = direction.flatten(0, 1), direction.shape[1]
        bias = by_row.sum(0)
        if not isinstance(inputs, LabeledRows):
            rows = inputs[passes.start * batch : passes.stop * batch]
            return {"weight": self._weight_gradient(by_row.to(self.compute_dtype), rows), "bias": bias}
        inputs = inputs[passes]
        scaled = direction * inputs.factors.unsqueeze(-1)
        is_shared = inputs.samples.shape[0] == 1
        of_samples = (scaled.sum(0) if is_shared else scaled.flatten(0, 1)).to(self.compute_dtype)
        weight = self._weight_gradient(of_samples, inputs.samples.flatten(0, 1))
        labels = inputs.labels.expand(*inputs.factors.shape, -1).flatten(0, 1).to(scaled.dtype)
        weight.flatten(0, -2)[:, inputs.place] = (scaled.flatten(0, 1).t() @ labels).to(weight.dtype)
        return {"weight": weight, "bias": bias}

    def update_parameters(self, gradients: Mapping[str, Tensor], lr_scale: float) -> None:
        """Makes one update, also of the copy of the weights."""
        self.ascend(gradients, lr_scale=lr_scale, copies={"weight": self._copy})
        self._update_copy()
        self._copied_version = self._weight_version
