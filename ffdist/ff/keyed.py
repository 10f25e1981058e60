"""Random draws that are keyed by what they are for, so that no generator has a state to save."""

import hashlib

import torch


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Makes a fresh generator for one draw: equal keys give equal draws, wherever and whenever they are made.

    torch's CPU generator uses 32 bits of the key's hash. Two different keys therefore give the same numbers with
    probability 2^-32: among 100,000 keys, one such pair is likely. This does no harm where a pair is drawn for
    different purposes or epochs. A wider key would change the weights of every run.

    Args:
        seed: The run's seed.
        purpose: What is drawn, such as `"order"`.
        *position: The epoch, minibatch or layer that the draw belongs to.

    Returns:
        A CPU generator.
    """
    key = repr((seed, purpose, *position)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))
