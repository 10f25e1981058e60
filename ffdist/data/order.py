"""Order of the training samples, a pure function of the seed and the epoch."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ffdist.ff.keyed import generator

SHARD_SAMPLES = 5000
"""Samples per shard, for which negatives are generated together. Fixed, because random draws are keyed by shard."""


@dataclass(frozen=True)
class SampleOrder:
    """Order in which an epoch visits the training samples: a permutation, divided into minibatches.

    The remainder that does not fill a minibatch is dropped. It differs from epoch to epoch.
    """

    seed: int
    num_samples: int
    """Size of the training set."""
    batch_size: int

    @property
    def num_minibatches(self) -> int:
        """Number of minibatches per epoch."""
        return self.num_samples // self.batch_size

    def indices(self, epoch: int, first: int, count: int) -> Tensor:
        """Returns the samples of minibatches `[first, first + count)` of an epoch, int64 `[count, B]`."""
        start = first * self.batch_size
        return self.permutation(epoch)[start : start + count * self.batch_size].view(count, -1)

    def permutation(self, epoch: int) -> Tensor:
        """Returns all samples in the order of an epoch, int64 `[num_samples]`. Do not modify it: it is cached."""
        return _permutation(self.seed, epoch, self.num_samples)

    def shards(self, first: int, count: int) -> range:
        """Returns the numbers of the shards that contain minibatches `[first, first + count)` of an epoch."""
        start, stop = first * self.batch_size, (first + count) * self.batch_size
        return range(start // SHARD_SAMPLES, -(-stop // SHARD_SAMPLES))

    def shard(self, epoch: int, number: int) -> Tensor:
        """Returns the samples of a shard, int64 `[n]` with n = `SHARD_SAMPLES`, or fewer for the last shard."""
        return self.permutation(epoch)[number * SHARD_SAMPLES : (number + 1) * SHARD_SAMPLES]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> Tensor:
    return torch.randperm(num_samples, generator=generator(seed, "order", epoch))


def split(seed: int, num_samples: int, num_validation: int) -> tuple[Tensor, Tensor]:
    """Splits the samples at random. Returns the sorted indices of the training and the validation samples, int64."""
    shuffled = torch.randperm(num_samples, generator=generator(seed, "split"))
    return shuffled[num_validation:].sort().values, shuffled[:num_validation].sort().values
