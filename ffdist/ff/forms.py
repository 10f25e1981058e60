"""The shape of a sample between layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Form:
    """Shape of one sample between layers.

    A row holds the values of a sample, followed by the values that every unit reads, such as a label.
    """

    shape: tuple[int, ...]
    """`(H,)`, or `(C, Y, X)` for a map with channels, or `(T, H)` for steps."""
    shared: int = 0
    """Number of values at the end of a row that every unit reads."""
    channels_last: bool = False
    """Whether a row stores a map as `(Y, X, C)`. Images are stored as `(C, Y, X)`."""

    @property
    def size(self) -> int:
        """Number of values of a sample, without the shared ones."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Number of values of a row D."""
        return self.size + self.shared

    @property
    def is_map(self) -> bool:
        """Whether it is a map with channels."""
        return len(self.shape) == 3

    def pooled(self, most: int) -> Form:
        """Returns the form of maps that are average-pooled to at most `most` values; that of vectors is the same.

        The windows are the smallest squares that give so few values; the last ones of a row or column may be smaller.
        Channels are kept, even if they are more.
        """
        if not self.is_map:
            return Form(self.shape)
        channels, height, width = self.shape
        if self.size <= most:
            return Form(self.shape, channels_last=self.channels_last)  # nothing is pooled
        sides = range(2, max(height, width))
        forms = (Form((channels, -(-height // side), -(-width // side))) for side in sides)
        return next((form for form in forms if form.size <= most), Form((channels, 1, 1)))

    def window(self, to: Form) -> int:
        """Returns the side length of the windows that `pool` averages over."""
        return next(d for d in count(1) if to.shape[1:] == (-(-self.shape[1] // d), -(-self.shape[2] // d)))

    def window_sizes(self, to: Form) -> list[list[int]]:
        """Returns the number of positions of each window `[Y', X']`."""
        side = self.window(to)
        rows, columns = ([min(side, size - start) for start in range(0, size, side)] for size in self.shape[1:])
        return [[row * column for column in columns] for row in rows]

    def pool(self, rows: Tensor, to: Form) -> Tensor:
        """Average-pools rows without shared values `[..., D]` to a form of `pooled`, `[..., D']`, float32 or wider."""
        rows = rows.float() if rows.dtype.itemsize < FLOAT32_BYTES else rows
        if self.shape == to.shape:
            return rows
        from torch.nn.functional import avg_pool2d

        maps = self.values(rows.flatten(0, -2))
        maps = avg_pool2d(maps, self.window(to), ceil_mode=True)  # the last windows may be smaller
        return maps.flatten(1).view(*rows.shape[:-1], to.size)

    def unpool(self, gradient: Tensor, to: Form) -> Tensor:
        """Returns the gradient with respect to rows `[B, D]`, from that with respect to the result of `pool`."""
        if self.shape == to.shape:
            return gradient
        (channels, height, width), side = self.shape, self.window(to)
        scaled = to.values(gradient) / gradient.new_tensor(self.window_sizes(to))
        by_position = scaled.permute(0, 2, 3, 1)[:, :, None, :, None]  # [B, y, 1, x, 1, C]
        spread = by_position.expand(-1, -1, side, -1, side, -1).reshape(
            -1, to.shape[1] * side, to.shape[2] * side, channels
        )
        return self.rows(spread[:, :height, :width].permute(0, 3, 1, 2))

    def values(self, rows: Tensor) -> Tensor:
        """Returns the values of rows `[N, D]` in their shape, as a view `[N, *shape]`."""
        values = rows[:, : self.size]
        if self.channels_last:
            channels, height, width = self.shape
            return values.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return values.view(-1, *self.shape)

    def rows(self, values: Tensor) -> Tensor:
        """Returns rows without shared values `[N, size]`, from values in their shape `[N, *shape]`."""
        return (values.permute(0, 2, 3, 1) if self.channels_last else values).flatten(1)

    def shared_values(self, rows: Tensor) -> Tensor:
        """Returns the shared values of rows `[N, D]`, as a view `[N, shared]`."""
        return rows[:, self.size :]
