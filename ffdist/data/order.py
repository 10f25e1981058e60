"""Which sample is in which minibatch: pure arithmetic of the seed and the epoch."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ffdist.ff.keyed import generator

SHARD_SAMPLES = 5000
"""Samples whose negatives are made together; fixed, because draws are keyed by the shard."""


@dataclass(frozen=True)
class SampleOrder:
    """The order of a training set.

    An epoch is a permutation cut into whole minibatches; the rest that fills none is dropped, another rest each epoch.
    """

    seed: int
    samples: int
    """Size of the training set."""
    batch_size: int

    @property
    def minibatches(self) -> int:
        """Minibatches an epoch."""
        return self.samples // self.batch_size

    def indices(self, epoch: int, first: int, count: int) -> Tensor:
        """Returns the samples of `count` minibatches from minibatch `first` of an epoch on `[count, B]`, int64."""
        start = first * self.batch_size
        return self.permutation(epoch)[start : start + count * self.batch_size].view(count, -1)

    def permutation(self, epoch: int) -> Tensor:
        """Returns the whole order of an epoch `[samples]`, int64; never to be written to."""
        return _permutation(self.seed, epoch, self.samples)

    def shards(self, first: int, count: int) -> range:
        """Returns the numbers of the shards in which `count` minibatches from minibatch `first` of an epoch on lie."""
        start, stop = first * self.batch_size, (first + count) * self.batch_size
        return range(start // SHARD_SAMPLES, -(-stop // SHARD_SAMPLES))

    def shard(self, epoch: int, number: int) -> Tensor:
        """Returns the samples of a shard `[n]`: `SHARD_SAMPLES` consecutive ones of the epoch's order, or the rest."""
        return self.permutation(epoch)[number * SHARD_SAMPLES : (number + 1) * SHARD_SAMPLES]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, samples: int) -> Tensor:
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


def split(seed: int, samples: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Parts a training set in two by the seed: `[samples - held_out]` to train on and `[held_out]`, both ascending."""
    shuffled = torch.randperm(samples, generator=generator(seed, "split"))
    return shuffled[held_out:].sort().values, shuffled[:held_out].sort().values
