"""Local receptive fields without weight sharing (Hinton 2022, sections 3.2 and 4)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffdist.ff.layers import Layer

BAND_UNITS = 32
"""With fewer units a place, a product for each place has so few columns that one for each row of places is faster."""


@dataclass(frozen=True)
class Map:
    """How a row lies in the plane: `height * width` places of `depth` values each."""

    height: int
    width: int
    depth: int
    channels_first: bool = False
    """Whether one value of every place follows another (images), or all values of a place stand together (layers)."""

    @property
    def values(self) -> int:
        """Width of the row."""
        return self.height * self.width * self.depth


@dataclass(frozen=True)
class Fields:
    """A square grid of places, each with units of its own that read one square field of the map below.

    The grid of fields lies centred on the map; what a field has beyond the border is left out.
    """

    grid: int
    """Places in each direction."""
    stride: int
    """Values of the map from one field to the next."""
    field: int
    """Side of a field, in values of the map."""
    units: int
    """Units of each place."""

    def starts(self, size: int) -> list[int]:
        """Returns where each field begins along a side of the map, below 0 where it begins beyond the border."""
        return [(size - self.covered) // 2 + place * self.stride for place in range(self.grid)]

    def fit(self, below: Map) -> bool:
        """Says whether every field has a part of the map in it."""
        ends = 0, (self.grid - 1) * self.stride  # the fields between them fit if these do, and may be very many
        return all(
            start < size and start + self.field > 0
            for size in (below.height, below.width)
            for start in ((size - self.covered) // 2 + end for end in ends)
        )

    def above(self) -> Map:
        """Returns the map that the layer makes."""
        return Map(self.grid, self.grid, self.units)

    def band_weights(self, below: Map, shared: int) -> int:
        """Returns the weights of a layer that computes band by band, with zeros between the fields; 0 of others."""
        line = self.covered * below.depth + shared
        return self.grid**2 * self.units * self.field * line if self.units < BAND_UNITS else 0

    @property
    def covered(self) -> int:
        """Side of the square that all fields together cover, in values of the map."""
        return (self.grid - 1) * self.stride + self.field


class Local(Layer):
    """A layer whose units each read one field of the map below, and values that every field sees.

    A row it makes holds place after place, row by row, and in each place unit after unit. The weight is
    `[places, units, field * field * depth + shared]`, a field's values in the order of its rows, columns and depth.

    Args:
        below: The map that it reads.
        fields: Which fields, and how many units each.
        shared: Values behind the map in a row that reach every unit, such as a label.
        **settings: As `Layer` takes them.
    """

    def __init__(self, below: Map, fields: Fields, *, shared: int = 0, **settings: Any) -> None:
        self._below, self._fields, self._shared = below, fields, shared
        self._by_bands = fields.units < BAND_UNITS
        self._line = fields.covered * below.depth + shared
        super().__init__((fields.grid**2, fields.units, fields.field**2 * below.depth + shared), **settings)
        # Weights beyond the border read zeros, so that a start at zero keeps them there.
        self.weight.mul_(self._windows(torch.ones(1, below.values + shared))[0].unsqueeze(1))
        self.refresh()

    def _inputs(self, rows: Tensor) -> Tensor:
        return self._bands(rows) if self._by_bands else self._windows(rows)

    def _bands(self, rows: Tensor) -> Tensor:
        """Returns the lines that each row of places reads `[R, grid, field * line]`, without copying them."""
        fields, shared = self._fields, rows[:, self._below.values :]
        lines = torch.cat((self._covered(rows).flatten(2), shared.unsqueeze(1).expand(-1, fields.covered, -1)), 2)
        return lines.flatten(1).unfold(1, fields.field * self._line, fields.stride * self._line)

    def _windows(self, rows: Tensor) -> Tensor:
        """Returns the field that each place reads `[R, places, fan-in]`."""
        fields, shared = self._fields, rows[:, self._below.values :]
        windows = self._covered(rows).unfold(1, fields.field, fields.stride).unfold(2, fields.field, fields.stride)
        inputs = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)
        return torch.cat((inputs, shared.unsqueeze(1).expand(-1, fields.grid**2, -1)), 2) if self._shared else inputs

    def _covered(self, rows: Tensor) -> Tensor:
        """Returns what the fields cover of the map `[R, covered, covered, depth]`, 0 beyond its border."""
        below, fields = self._below, self._fields
        shape = (
            (below.depth, below.height, below.width)
            if below.channels_first
            else (below.height, below.width, below.depth)
        )
        plane = rows[:, : below.values].view(-1, *shape)
        if below.channels_first:
            plane = plane.permute(0, 2, 3, 1)
        edges = []  # how much is added on each side; negative where it is cut off
        for size in (below.width, below.height):
            before = -fields.starts(size)[0]
            edges += [before, fields.covered - size - before]
        return F.pad(plane, (0, 0, *edges)) if any(edges) else plane

    def _columns(self) -> Tensor:
        """Returns where in a band's lines each column of places finds its inputs `[grid, fan-in]`."""
        fields, depth = self._fields, self._below.depth
        line = torch.arange(fields.field).unsqueeze(1) * self._line
        field = (line + torch.arange(fields.field * depth)).flatten()
        shared = fields.covered * depth + torch.arange(self._shared)
        starts = torch.arange(fields.grid).unsqueeze(1) * fields.stride * depth
        return torch.cat((starts + field, shared.expand(fields.grid, -1)), 1)

    def refresh(self) -> None:
        """Renews what the products use; due when weights were set or moved from outside."""
        super().refresh()
        if self._by_bands:
            fields = self._fields
            columns = self._columns().to(self.weight.device)
            self._index = columns.unsqueeze(1).expand(fields.grid, fields.grid, fields.units, -1)
            band = (fields.grid, fields.grid, fields.units, fields.field * self._line)
            self._compute_weight = self._compute_weight.new_zeros(band)
            self._renew()

    @property
    def _copy(self) -> Tensor | None:
        return None if self._by_bands else super()._copy

    def _renew(self) -> None:
        if self._by_bands:
            weight = self.weight.to(self.compute_dtype).view(*self._index.shape)
            self._compute_weight.scatter_(3, self._index, weight)

    def _product(self, inputs: Tensor) -> Tensor:
        weight = self._compute_weight.flatten(1, -2)  # of a band, or as it is
        product = torch.bmm(inputs.transpose(0, 1), weight.transpose(1, 2))
        return product.transpose(0, 1).flatten(1)

    def _gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        # Block after block in memory: turning blocks that lie across each other would cost more than the product.
        by_block = direction.view(len(inputs), inputs.shape[1], -1).transpose(0, 1).contiguous()
        gradient = torch.bmm(by_block.mT, inputs.transpose(0, 1))
        if self._by_bands:
            gradient = gradient.view(self._compute_weight.shape).gather(3, self._index)
        return gradient.view(self.weight.shape)
