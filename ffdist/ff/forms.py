"""The shape of a sample between layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
