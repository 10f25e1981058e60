"""Random generators that are keyed by their purpose, so that no generator state has to be saved."""

import hashlib

import torch


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Returns a new generator. Equal keys give equal random numbers, in any process and at any time.

    torch's CPU generator uses 32 bits of the key's hash. Two different keys therefore give the same numbers with
    probability 2^-32: among 100,000 keys, one such pair is likely. This does no harm where a pair is drawn for
    different purposes or epochs. A wider key would change the weights of every run.

    Args:
        seed: The run's seed.
        purpose: Purpose of the random numbers, such as `"order"`.
        *position: Epoch, minibatch or layer that they belong to.

    Returns:
        A CPU generator.
    """
    key = repr((seed, purpose, *position)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))
