"""The shape of a sample between layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
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

        Both sides of a map are divided by the same number, and rounded up. Channels are kept, even if they are more.
        """
        if not self.is_map:
            return Form(self.shape)
        channels, height, width = self.shape
        divisors = (d for d in range(1, max(height, width)) if channels * -(-height // d) * -(-width // d) <= most)
        divisor = next(divisors, max(height, width))
        return Form((channels, -(-height // divisor), -(-width // divisor)))

    def pool(self, rows: Tensor, to: Form) -> Tensor:
        """Average-pools rows without shared values `[..., D]` to a form of `pooled`, `[..., D']`, float32 or wider."""
        rows = rows.float() if rows.dtype.itemsize < FLOAT32_BYTES else rows
        if self.shape == to.shape:
            return rows
        from torch.nn.functional import adaptive_avg_pool2d

        _, height, width = to.shape
        maps = adaptive_avg_pool2d(self.values(rows.flatten(0, -2)), (height, width))
        return maps.flatten(1).view(*rows.shape[:-1], to.size)

    def values(self, rows: Tensor) -> Tensor:
        """Returns the values of rows `[N, D]` in their shape, as a view `[N, *shape]`."""
        values = rows[:, : self.size]
        if self.channels_last:
            channels, height, width = self.shape
            return values.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return values.view(-1, *self.shape)

    def shared_values(self, rows: Tensor) -> Tensor:
        """Returns the shared values of rows `[N, D]`, as a view `[N, shared]`."""
        return rows[:, self.size :]
