"""What a layer makes of goodness: a loss of each row, and how hard it pulls at the row's goodness."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Takes goodness above the threshold for positive, with probability `sigmoid(margin)` (Hinton 2022, section 2).

    The pull is `1 - p` on positive and `-p` on negative rows.
    """
    surprise = torch.cat((-positive, negative))
    pull = torch.sigmoid(surprise)
    pull[len(positive) :].neg_()
    return F.softplus(surprise), pull


def symmetric(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Asks only that a sample's positive row has more goodness than its negative ones (Lee and Song 2023, SymBa).

    A pair's loss is `softplus(-difference)`; the threshold falls out.
    """
    difference = positive - negative.view(-1, len(positive))
    loss, pull = F.softplus(-difference), torch.sigmoid(-difference)
    return torch.cat((loss.mean(0), loss.flatten())), torch.cat((pull.mean(0), -pull.flatten()))


LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "logistic": logistic,
    "margin": logistic,  # the common PyTorch port's name for it, with mean_of_squares against a threshold of 2
    "symmetric": symmetric,
}
"""Losses, by the name that `training.loss` gives.

From the margins of B positive rows `[B]` and of M negative rows each, `[M B]`, sample after sample and M times over,
each makes every row's loss in nats and its pull `[B + M B]`, positive rows first. A margin is goodness minus threshold.
The pull is minus the loss's derivative; that of a negative row is still to be weighed with a share of 1 / M.
"""
