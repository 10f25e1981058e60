import torch

from ffdist.ff.keyed import generator


def draw_numbers(*key) -> list[int]:
    return torch.randint(10**9, (3,), generator=generator(0, *key)).tolist()


def test_random_numbers_depend_on_a_32_bit_key():
    """The hashes of the last two keys agree in the 32 bits that torch uses. A wider key would change all weights."""
    assert draw_numbers("layer", 0) == draw_numbers("layer", 0) != draw_numbers("layer", 1)
    assert draw_numbers("jitter", 19033) == draw_numbers("hard labels", 7077)
