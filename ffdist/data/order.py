"""Which sample is in which minibatch: pure arithmetic of the seed and the epoch."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ffdist.ff.keyed import generator


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
        return _permutation(self.seed, epoch, self.samples)[start : start + count * self.batch_size].view(count, -1)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, samples: int) -> Tensor:
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


def split(seed: int, samples: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Parts a training set in two by the seed: `[samples - held_out]` to train on and `[held_out]`, both ascending."""
    shuffled = torch.randperm(samples, generator=generator(seed, "split"))
    return shuffled[held_out:].sort().values, shuffled[:held_out].sort().values
