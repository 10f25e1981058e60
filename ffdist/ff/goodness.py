"""Goodness, and the normalization that hides it from the next layer.

Hinton 2022, section 2: the goodness of a layer is the sum of its squared activities, and a row is taken for positive
with probability `sigmoid(goodness - threshold)`. Section 2.1: a layer's activities are divided by their length before
they go on, so that the next layer sees their direction only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-12
"""Keeps the length of a dead row from dividing by zero: such a row stays zero."""


def squared_length(activity: Tensor) -> Tensor:
    """Returns the sum of squares `[..., H] -> [...]`, in at least float32 (half precision loses the signal)."""
    wide = torch.promote_types(activity.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(activity, dim=-1, dtype=wide)  # in one pass
    return length.square()


def sum_of_squares(activity: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's goodness (section 2)."""
    return squares, activity


def mean_of_squares(activity: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """That of the common PyTorch port; its scale does not grow with the layer, and the loss is flatter by as much."""
    return squares / activity.shape[-1], activity / activity.shape[-1]


def softmax(activity: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """A smooth maximum, `log(sum(exp(activity)))`, whose slope is the softmax: the most active units learn most."""
    return activity.logsumexp(-1), activity.softmax(-1) / 2 * (activity > 0)


GOODNESS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "sum_of_squares": sum_of_squares,
    "mean_of_squares": mean_of_squares,
    "softmax": softmax,
}
"""Kinds of goodness, by the name that `model.goodness` gives.

From activities `[..., H]` and their sums of squares `[...]`, each makes the goodness `[...]`, and half of its
derivative with respect to the total inputs `[..., H]`, 0 where a unit is silent: the factor 2 of a square is in the
learning rate (released code).
"""

MINUS = "minus_"
"""Before the name of a goodness: its negative, so that positives are to have little of it."""


def rms(activity: Tensor, squares: Tensor) -> Tensor:
    """Divides every row by its root mean square, without subtracting the mean (released code)."""
    return activity * torch.rsqrt(squares / activity.shape[-1] + TINY).unsqueeze(-1)


def l2(activity: Tensor, squares: Tensor) -> Tensor:
    """Divides every row by its length."""
    return activity * torch.rsqrt(squares + TINY).unsqueeze(-1)


def none(activity: Tensor, squares: Tensor) -> Tensor:
    """Leaves rows as they are, so that the next layer can read the goodness off their length."""
    return activity


NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"rms": rms, "l2": l2, "none": none}
"""What is done to a row, by the name that `model.normalization` gives, from activities `[..., H]`, float32 or wider,
and their sums of squares `[...]`; a row of zeros stays one."""
