import pytest
import torch
import torch.nn.functional as F

from ffdist.ff.keyed import generator
from ffdist.ff.layers import METRICS, PEER_SMOOTHING, Dense
from ffdist.ff.update import Update

B, D, H = 6, 11, 9


def a_layer(dtype=torch.float64, **settings) -> Dense:
    layer = Dense(D, H, compute_dtype=dtype, generator=generator(0, "layer", 0), **settings)
    layer.bias.copy_(0.1 * torch.randn(H, generator=generator(0, "bias")))
    if dtype == torch.float64:
        layer = layer.double()
    layer.refresh()
    return layer


def some_rows(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(3 * B, D, generator=generator(1, "rows"), dtype=torch.float32).to(dtype)


def likelihood(rows, weight, bias, threshold):
    """The log-likelihood of positives and negatives, halved, because the release's gradient leaves out a factor 2."""
    goodness = F.linear(rows[: 2 * B], weight, bias).relu().square().sum(1)
    margin = torch.cat((goodness[:B] - threshold, threshold - goodness[B:]))
    return F.logsigmoid(margin).sum() / 2


def reference(layer: Dense, rows):
    """Gradients by autograd, the pull of peer normalization added to the total input of the positives."""
    weight, bias = layer.weight.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    total = F.linear(rows[:B], weight, bias)
    means = PEER_SMOOTHING * layer.mean_activity + (1 - PEER_SMOOTHING) * total.detach().relu().mean(0)
    pull = layer.peer_strength * (means.mean() - means)
    value = likelihood(rows, weight, bias, layer.threshold) + (total * pull).sum()
    return torch.autograd.grad(value, (weight, bias))


@pytest.mark.parametrize("peer_strength", [0.0, 0.03])
def test_closed_form_gradient_equals_autograd_in_float64(peer_strength):
    layer, rows = a_layer(peer_strength=peer_strength, update=Update(0.01, 0.0, smoothing=0.0)), some_rows()
    weight, bias = reference(layer, rows)
    layer.train_minibatch(rows, batch=B)
    torch.testing.assert_close(layer.weight_gradient, weight / B)
    torch.testing.assert_close(layer.bias_gradient, bias / B)


def test_closed_form_gradient_equals_finite_differences():
    layer, rows, step = a_layer(peer_strength=0.0, update=Update(0.01, 0.0, smoothing=0.0)), some_rows(), 1e-6
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.train_minibatch(rows, batch=B)
    for index in [(0, 0), (3, 7), (H - 1, D - 1)]:
        shift = torch.zeros_like(weight)
        shift[index] = step
        up, down = (likelihood(rows, weight + sign * shift, bias, layer.threshold) for sign in (1, -1))
        assert layer.weight_gradient[index].item() * B == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-5)


def test_update_follows_the_release():
    """g <- 0.9 g + 0.1 gradient / batch; W <- W + gain * 0.01 * (g - 0.001 W); biases without decay."""
    layer, rows = a_layer(), some_rows()
    smoothed = [torch.zeros(H, D, dtype=torch.float64), torch.zeros(H, dtype=torch.float64)]
    for gain in (1.0, 0.5):
        before = layer.weight.clone(), layer.bias.clone()
        smoothed = [0.9 * old + 0.1 * new / B for old, new in zip(smoothed, reference(layer, rows), strict=True)]
        layer.train_minibatch(rows, batch=B, gain=gain)
        torch.testing.assert_close(layer.weight, before[0] + gain * 0.01 * (smoothed[0] - 0.001 * before[0]))
        torch.testing.assert_close(layer.bias, before[1] + gain * 0.01 * smoothed[1])


def test_what_is_passed_on_is_computed_before_the_update():
    layer, rows = a_layer(), some_rows()
    expected = layer(rows)
    passed, _ = layer.train_minibatch(rows, batch=B)
    assert torch.equal(passed.activity, expected.activity)
    assert not torch.equal(layer(rows).activity, expected.activity)


def test_neutral_rows_teach_nothing():
    one, other = a_layer(), a_layer()
    rows = some_rows()
    one.train_minibatch(rows, batch=B)
    rows[2 * B :] = 0
    other.train_minibatch(rows, batch=B)
    assert torch.equal(one.weight, other.weight)


def test_metrics_are_what_their_names_say():
    layer, rows = a_layer(), some_rows()
    goodness, activity = layer(rows).goodness, layer._activity(rows)[: 2 * B]
    expected_rms = layer.weight.square().mean().sqrt().item()
    _, values = layer.train_minibatch(rows, batch=B, measure_weights=True)
    metrics = dict(zip(METRICS, values.tolist(), strict=True))
    margin = torch.cat((goodness[:B] - H, H - goodness[B : 2 * B]))
    assert metrics["loss"] == pytest.approx(F.softplus(-margin).mean().item())
    assert metrics["active_fraction"] == pytest.approx((activity > 0).double().mean().item())
    assert metrics["goodness_positive"] == pytest.approx(goodness[:B].mean().item())
    assert metrics["goodness_negative"] == pytest.approx(goodness[B : 2 * B].mean().item())
    assert metrics["pairwise_error"] == pytest.approx((goodness[B : 2 * B] >= goodness[:B]).double().mean().item())
    assert metrics["weight_rms"] == pytest.approx(expected_rms)


def test_bfloat16_stays_near_float64():
    exact, rounded = a_layer(), a_layer(torch.bfloat16)
    for _ in range(5):
        exact.train_minibatch(some_rows(), batch=B)
        rounded.train_minibatch(some_rows(torch.bfloat16), batch=B)
    moved = (exact.weight - a_layer().weight).norm()
    assert (exact.weight - rounded.weight).norm() < 0.02 * moved


def test_peer_normalization_revives_a_dead_unit():
    alive = {}
    for peer_strength in (0.0, 0.03):
        layer, rows = a_layer(peer_strength=peer_strength), some_rows()
        layer.bias[0] = -8.0
        assert not layer._activity(rows)[:, 0].any()
        for _ in range(10_000):
            layer.train_minibatch(rows, batch=B)
        alive[peer_strength] = bool(layer._activity(rows)[:, 0].any())
    assert alive == {0.0: False, 0.03: True}


def test_loaded_weights_are_used_in_products():
    """The products read a copy of the weights in the compute type, which a load must renew."""
    trained, fresh = a_layer(torch.bfloat16), Dense(D, H, compute_dtype=torch.bfloat16)
    trained.train_minibatch(some_rows(torch.bfloat16), batch=B)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(some_rows(torch.bfloat16)).goodness, trained(some_rows(torch.bfloat16)).goodness)
