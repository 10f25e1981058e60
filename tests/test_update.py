from ffdist.ff.update import rate_gain


def test_gain_is_one_for_the_first_half_then_falls_to_one_epoch_th():
    gains = [rate_gain(epoch, 100) for epoch in range(100)]
    assert gains[:50] == [1.0] * 50
    assert gains[50] == (1 + 2 * 49) / 100
    assert gains[-1] == 1 / 100
    assert gains == sorted(gains, reverse=True)
