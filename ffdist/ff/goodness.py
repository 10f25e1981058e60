"""Goodness, the probability that it stands for, and the normalization that hides it from the next layer.

Hinton 2022, section 2: the goodness of a layer is the sum of its squared activities, and a row is taken for positive
with probability `sigmoid(goodness - threshold)`. Section 2.1: a layer's activities are divided by their length before
they go on, so that the next layer sees their direction only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-12
"""Keeps the length of a dead row from dividing by zero: such a row stays zero."""


def sum_of_squares(activity: Tensor) -> Tensor:
    """Returns the goodness `[..., H] -> [...]`, summed in at least float32 (half precision loses the signal)."""
    activity = activity.to(torch.promote_types(activity.dtype, torch.float32))
    return activity.square().sum(-1)


def normalize(activity: Tensor, goodness: Tensor | None = None) -> Tensor:
    """Divides every row by its root mean square, without subtracting the mean.

    Args:
        activity: `[..., H]`, float32 or wider.
        goodness: The rows' sums of squares `[...]`, where they are at hand.

    Returns:
        `[..., H]`, each row of mean square 1, or 0 where the row was 0.
    """
    if goodness is None:
        goodness = sum_of_squares(activity)
    return activity * torch.rsqrt(goodness / activity.shape[-1] + TINY).unsqueeze(-1)


def logistic_loss(positive: Tensor, negative: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Scores goodness by the logistic loss, positive rows above the threshold and negative rows below it.

    Args:
        positive: Goodness of the positive rows `[B]`.
        negative: Goodness of the negative rows `[B]`.
        threshold: The goodness at which a row is as likely positive as negative.

    Returns:
        The loss of each row `[2B]`, positive first, in nats; and minus its derivative with respect to the row's
        goodness `[2B]`, which is `1 - p` for positive and `-p` for negative rows.
    """
    margin = torch.cat((positive - threshold, threshold - negative))
    sign = torch.ones_like(margin)
    sign[len(positive) :] = -1
    return F.softplus(-margin), sign * torch.sigmoid(-margin)
