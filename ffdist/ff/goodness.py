"""Goodness of a layer's activations, and their normalization, which hides it from the next layer.

Hinton 2022, section 2: the goodness of a layer is the sum of its squared activations, and a row is positive with
probability `sigmoid(goodness - threshold)`. Section 2.1: activations are divided by their norm before they are passed
to the next layer, which therefore sees only their direction.

Shapes: `H` units.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-12
"""Avoids a division by zero for rows without activity, which stay zero."""


def squared_norm(activations: Tensor) -> Tensor:
    """Returns the sum of squares `[..., H] -> [...]`, in float32 or wider, because half precision loses the signal."""
    wide = torch.promote_types(activations.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(activations, dim=-1, dtype=wide)  # in one pass
    return norm.square()


def sum_of_squares(activations: Tensor, squares: Tensor) -> Tensor:
    """The paper's goodness (section 2)."""
    return squares


def sum_of_squares_slope(activations: Tensor) -> Tensor:
    """Returns half of the derivative: the activations."""
    return activations


def mean_of_squares(activations: Tensor, squares: Tensor) -> Tensor:
    """That of a common PyTorch port. It does not grow with the number of units, and its gradient is smaller by that."""
    return squares / activations.shape[-1]


def mean_of_squares_slope(activations: Tensor) -> Tensor:
    """Returns half of the derivative."""
    return activations / activations.shape[-1]


def softmax(activations: Tensor, squares: Tensor) -> Tensor:
    """A smooth maximum, `log(sum(exp(activations)))`, so the most active units learn most."""
    return activations.logsumexp(-1)


def softmax_slope(activations: Tensor) -> Tensor:
    """Returns half of the derivative with respect to the inputs of the ReLU."""
    return activations.softmax(-1) / 2 * (activations > 0)


def _one(size: int) -> float:
    return 1.0


def _reciprocal(size: int) -> float:
    return 1 / size


class Goodness(NamedTuple):
    """A goodness function and its derivative."""

    value: Callable[[Tensor, Tensor], Tensor]
    """Returns the goodness `[...]` of activations `[..., H]` with the sums of squares `[...]`."""
    slope: Callable[[Tensor], Tensor]
    """Returns half of the derivative `[..., H]`, 0 where an activation is 0. The factor 2 of the square is part of the
    learning rate, as in the paper's released code."""
    slope_factor: Callable[[int], float] | None = None
    """Returns the factor of the activations in it, from the number of units; None if it is not their multiple."""


GOODNESS = {
    "sum_of_squares": Goodness(sum_of_squares, sum_of_squares_slope, _one),
    "mean_of_squares": Goodness(mean_of_squares, mean_of_squares_slope, _reciprocal),
    "softmax": Goodness(softmax, softmax_slope),
}
"""Goodness functions, by the name in `model.goodness`."""

MINUS = "minus_"
"""Prefix of the name of a goodness: its negative, so that positive rows have little of it."""


def rms(squares: Tensor, size: int) -> Tensor:
    """Rows are divided by their root mean square, without subtracting the mean (the paper's released code)."""
    return torch.rsqrt(squares / size + TINY)


def l2(squares: Tensor, size: int) -> Tensor:
    """Rows are divided by their L2 norm."""
    return torch.rsqrt(squares + TINY)


def none(squares: Tensor, size: int) -> Tensor:
    """Rows do not change, so that the next layer can see their goodness."""
    return torch.ones_like(squares)


NORMALIZATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"rms": rms, "l2": l2, "none": none}
"""Normalizations, by the name in `model.normalization`. From the sums of squares of rows `[...]`, float32 or wider, and
their number of values, each returns the factors of the rows `[...]`."""


def normalize(kind: str, activations: Tensor, squares: Tensor) -> Tensor:
    """Returns normalized activations `[..., H]`, float32 or wider. A row of zeros stays zero.

    Args:
        kind: A key of `NORMALIZATIONS`.
        activations: `[..., H]`.
        squares: Their sums of squares `[...]`.
    """
    if kind == "none":
        return activations
    return activations * NORMALIZATIONS[kind](squares, activations.shape[-1]).unsqueeze(-1)
