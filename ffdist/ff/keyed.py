"""Random draws that are keyed by what they are for, so that no generator has a state to save."""

import hashlib

import torch


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Makes a fresh generator for one draw: equal keys give equal draws, wherever and whenever they are made.

    Args:
        seed: The run's seed.
        purpose: What is drawn, such as `"order"`; different purposes are independent.
        *position: The epoch, minibatch or layer that the draw belongs to.

    Returns:
        A CPU generator.
    """
    key = repr((seed, purpose, *position)).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))
