"""Losses of the goodness objective.

Shapes: `B` samples, `M` negatives per sample.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """A row is positive with probability `p = sigmoid(margin)` (Hinton 2022, section 2).

    The pull is `1 - p` on positive and `-p` on negative rows.
    """
    surprise = torch.cat((-positive.unsqueeze(0), negative))
    pull = torch.sigmoid(surprise)
    pull[1:].neg_()
    return F.softplus(surprise), pull


def symmetric(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """A sample's positive row should have more goodness than its negative rows (Lee and Song 2023, SymBa).

    The loss of a pair is `softplus(-difference)`. The threshold cancels out.
    """
    difference = positive - negative
    loss, pull = F.softplus(-difference), torch.sigmoid(-difference)
    return torch.cat((loss.mean(0, keepdim=True), loss)), torch.cat((pull.mean(0, keepdim=True), -pull))


LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "logistic": logistic,
    "margin": logistic,  # its name in the common PyTorch port, which uses mean_of_squares and a threshold of 2
    "symmetric": symmetric,
}
"""Losses, by the name in `training.loss`.

From the margins (goodness minus threshold) of positive rows `[B]` and negative rows `[M, B]`, each returns the loss of
every row in nats, and its pull: minus its derivative with respect to the margin. Both are `[1 + M, B]`, positive rows
first. The pull of a negative row is not yet divided by M.
"""
