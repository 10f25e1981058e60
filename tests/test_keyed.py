import torch

from ffdist.ff.keyed import generator


def draws(*key) -> list[int]:
    return torch.randint(10**9, (3,), generator=generator(0, *key)).tolist()


def test_keys_decide_draws_and_have_32_bits():
    """Two keys of a long run whose hashes agree in the 32 bits that torch uses; weights depend on this."""
    assert draws("layer", 0) == draws("layer", 0) != draws("layer", 1)
    assert draws("jitter", 19033) == draws("hard labels", 7077)
