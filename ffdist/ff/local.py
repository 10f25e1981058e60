"""Layers of local receptive fields without weight sharing (Hinton 2022, sections 3.2 and 4)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffdist.ff.forms import Form
from ffdist.ff.relu import ReluLayer
from ffdist.ff.specs import Local


class LocalLayer(ReluLayer):
    """A layer whose units each read one field of the input map, and the shared values.

    An output row holds field after field, row by row, with the units of a field next to each other. The weight is
    `[fields, units, field * field * channels + shared]`, where a field's values are ordered by row, column and channel.

    Args:
        spec: The fields.
        form: Form of the input.
        **settings: See `ReluLayer`.
    """

    has_kernels = True

    def __init__(self, spec: Local, form: Form, **settings: Any) -> None:
        self._spec, self._form = spec, form
        self._line = spec.line_width(form)
        super().__init__(spec.output_form(form), (spec.grid**2, spec.units, spec.fan_in(form)), **settings)
        # Weights beyond the border read zeros, so they stay zero if they are zero initially.
        self.weight.mul_(self._windows(torch.ones(1, form.width))[0].unsqueeze(1))
        self.refresh()

    def arrange(self, rows: Tensor) -> Tensor:
        """Returns the inputs of each band or field, from rows `[R, D]`."""
        return self._bands(rows) if self._spec.uses_bands else self._windows(rows)

    def _bands(self, rows: Tensor) -> Tensor:
        """Returns the lines that each row of fields reads `[R, grid, field * line]`, as a view."""
        spec, shared = self._spec, self._form.shared_values(rows)
        lines = torch.cat((self._covered(rows).flatten(2), shared.unsqueeze(1).expand(-1, spec.covered, -1)), 2)
        return lines.flatten(1).unfold(1, spec.field * self._line, spec.stride * self._line)

    def _windows(self, rows: Tensor) -> Tensor:
        """Returns the inputs of each field `[R, fields, fan-in]`."""
        spec, shared = self._spec, self._form.shared_values(rows)
        windows = self._covered(rows).unfold(1, spec.field, spec.stride).unfold(2, spec.field, spec.stride)
        inputs = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)
        if not self._form.shared:
            return inputs
        return torch.cat((inputs, shared.unsqueeze(1).expand(-1, spec.grid**2, -1)), 2)

    def _covered(self, rows: Tensor) -> Tensor:
        """Returns the covered square of the map `[R, covered, covered, channels]`, with 0 beyond the border."""
        spec, plane = self._spec, self._form.values(rows).permute(0, 2, 3, 1)
        padding = []  # of both ends of each side; negative if it is cropped
        for size in (plane.shape[2], plane.shape[1]):
            before = -spec.starts(size)[0]
            padding += [before, spec.covered - size - before]
        return F.pad(plane, (0, 0, *padding)) if any(padding) else plane

    def _columns(self) -> Tensor:
        """Returns the positions of the inputs of each column of fields within the lines of a band `[grid, fan-in]`."""
        spec, channels = self._spec, self._form.shape[0]
        line = torch.arange(spec.field).unsqueeze(1) * self._line
        field = (line + torch.arange(spec.field * channels)).flatten()
        shared = spec.covered * channels + torch.arange(self._form.shared)
        starts = torch.arange(spec.grid).unsqueeze(1) * spec.stride * channels
        return torch.cat((starts + field, shared.expand(spec.grid, -1)), 1)

    def refresh(self) -> None:
        """Updates the copy of the weights that the products use."""
        super().refresh()
        if self._spec.uses_bands:
            spec = self._spec
            columns = self._columns().to(self.weight.device)
            self._index = columns.unsqueeze(1).expand(spec.grid, spec.grid, spec.units, -1)
            band = (spec.grid, spec.grid, spec.units, spec.field * self._line)
            self._compute_weight = self._compute_weight.new_zeros(band)
            self._update_copy()

    @property
    def _copy(self) -> Tensor | None:
        return None if self._spec.uses_bands else super()._copy

    def _update_copy(self) -> None:
        if self._spec.uses_bands:
            weight = self.weight.to(self.compute_dtype).view(*self._index.shape)
            self._compute_weight.scatter_(3, self._index, weight)

    @property
    def _num_blocks(self) -> int:
        return self._spec.grid if self._spec.uses_bands else self._spec.grid**2

    def _product(self, inputs: Tensor) -> Tensor:
        weight = self._compute_weight.flatten(1, -2)
        return torch.bmm(inputs.transpose(0, 1), weight.transpose(1, 2))

    def _weight_gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        gradient = torch.bmm(direction.mT, inputs.transpose(0, 1))
        if self._spec.uses_bands:
            gradient = gradient.view(self._compute_weight.shape).gather(3, self._index)
        return gradient.view(self.weight.shape)
