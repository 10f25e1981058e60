import pytest
import torch
import torch.nn.functional as F
from helpers import train_rows

from ffdist.ff.dense import DenseLayer
from ffdist.ff.goodness import GOODNESS
from ffdist.ff.keyed import generator
from ffdist.ff.layers import MEAN_ACTIVITY_MOMENTUM
from ffdist.ff.losses import LOSSES
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update

B, D, H = 6, 11, 9


def a_layer(dtype=torch.float64, **settings) -> DenseLayer:
    layer = DenseLayer(D, H, compute_dtype=dtype, generator=generator(0, "layer", 0), **settings)
    layer.bias.copy_(0.1 * torch.randn(H, generator=generator(0, "bias")))
    if dtype == torch.float64:
        layer = layer.double()
    layer.refresh()
    return layer


def some_rows(blocks=3, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(blocks * B, D, generator=generator(1, "rows"), dtype=torch.float32).to(dtype)


def value(rows, weight, bias, rule, threshold, turn):
    """Minus the loss, halved, because the release's gradient leaves out a factor 2; by what papers write."""
    activity = F.linear(rows, weight, bias).relu()
    measures = {
        "sum_of_squares": activity.square().sum(1),
        "mean_of_squares": activity.square().mean(1),
        "softmax": activity.logsumexp(1),
    }
    measured = measures[rule.goodness.removeprefix("minus_")]
    margin = rule.alpha * (measured - threshold) * (-1 if rule.goodness.startswith("minus") else 1)
    positive, negative = margin[:B], margin[B:].view(-1, B)
    positive, negative = (
        side if turn in ("both", name) else side.detach()
        for side, name in ((positive, "positive"), (negative, "negative"))
    )
    if rule.loss == "symmetric":
        return F.logsigmoid(positive - negative).mean(0).sum() / 2
    return (F.logsigmoid(positive).sum() + F.logsigmoid(-negative).mean(0).sum()) / 2


def reference(layer: DenseLayer, rows):
    """Weights and biases after a minibatch, by autograd and plain ascent; the peers' pull goes past the ReLU."""
    rule, rate = layer.rule, layer.rule.update.learning_rate
    parameters, means = [layer.weight.detach().clone(), layer.bias.detach().clone()], layer.mean_activity
    threshold = -layer.objective.threshold if rule.goodness.startswith("minus") else layer.objective.threshold
    for turn in (["positive", "negative"] if rule.alternating else ["both"]) * rule.updates_per_minibatch:
        weight, bias = (parameter.requires_grad_() for parameter in parameters)
        gained = value(rows, weight, bias, rule, threshold, turn)
        if turn != "negative":
            total = F.linear(rows[:B], weight, bias)
            means = MEAN_ACTIVITY_MOMENTUM * means + (1 - MEAN_ACTIVITY_MOMENTUM) * total.detach().relu().mean(0)
            gained = gained + (total * rule.peer_strength * (means.mean() - means)).sum()
        gradients = torch.autograd.grad(gained, (weight, bias))
        parameters = [old.detach() + rate * new / B for old, new in zip(parameters, gradients, strict=True)]
    return parameters


PLAIN = Update(0.01, 0.0, momentum=0.0)
RULES = [
    Rule(
        goodness,
        loss=loss,
        alpha=alpha,
        alternating=alternating,
        updates_per_minibatch=repeats,
        peer_strength=peers,
        update=PLAIN,
    )
    for goodness in [sign + goodness for goodness in GOODNESS for sign in ("", "minus_")]
    for loss in LOSSES
    for alpha, alternating, repeats, peers in [(1.0, False, 1, 0.03), (4.0, True, 2, 0.03), (0.5, False, 3, 0.0)]
]


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_closed_form_gradient_equals_autograd_in_float64(rule, negatives):
    layer, rows = a_layer(rule=rule, threshold=2.0), some_rows(2 + negatives)
    weight, bias = reference(layer, rows[: B + negatives * B])
    before = layer.weight.clone()
    train_rows(layer, rows, B, negatives)
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(layer.bias, bias)
    assert (layer.weight - before).abs().max() > 1e-7


def test_closed_form_gradient_equals_finite_differences():
    rule = Rule(peer_strength=0.0, update=PLAIN)
    layer, rows, step = a_layer(rule=rule), some_rows(), 1e-6
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    train_rows(layer, rows, B)
    for index in [(0, 0), (3, 7), (H - 1, D - 1)]:
        shift = torch.zeros_like(weight)
        shift[index] = step
        up, down = (value(rows[: 2 * B], weight + sign * shift, bias, rule, H, "both") for sign in (1, -1))
        assert layer.optimizer.get_buffer("weight/gradient")[index].item() * B == pytest.approx(
            ((up - down) / (2 * step)).item(), rel=1e-5
        )


def test_update_follows_the_release():
    """g <- 0.9 g + 0.1 gradient / batch; W <- W + lr_scale * 0.01 * (g - 0.001 W); biases without decay."""
    layer, rows = a_layer(), some_rows()
    smoothed = [torch.zeros(H, D, dtype=torch.float64), torch.zeros(H, dtype=torch.float64)]
    for lr_scale in (1.0, 0.5):
        before = layer.weight.clone(), layer.bias.clone()
        moved = [(new - old) / 0.01 for old, new in zip(before, reference(layer, rows[: 2 * B]), strict=True)]
        smoothed = [0.9 * old + 0.1 * new for old, new in zip(smoothed, moved, strict=True)]
        train_rows(layer, rows, B, lr_scale=lr_scale)
        torch.testing.assert_close(layer.weight, before[0] + lr_scale * 0.01 * (smoothed[0] - 0.001 * before[0]))
        torch.testing.assert_close(layer.bias, before[1] + lr_scale * 0.01 * smoothed[1])


def test_what_is_passed_on_is_computed_before_the_update():
    layer, rows = a_layer(), some_rows()
    expected = layer(rows)
    passed, _ = train_rows(layer, rows, B)
    assert torch.equal(passed.activations, expected.activations)
    assert not torch.equal(layer(rows).activations, expected.activations)


def test_a_layer_that_does_not_learn_passes_on_and_stays_as_it_is():
    layer, rows = a_layer(), some_rows()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    passed, metrics = train_rows(layer, rows, B, lr_scale=None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    learned, same_metrics = train_rows(layer, rows, B)
    assert torch.equal(passed.activations, learned.activations)
    assert torch.equal(metrics.nan_to_num(), same_metrics.nan_to_num())


def test_neutral_rows_teach_nothing():
    one, other = a_layer(), a_layer()
    rows = some_rows()
    train_rows(one, rows, B)
    rows[2 * B :] = 0
    train_rows(other, rows, B)
    assert torch.equal(one.weight, other.weight)


def test_metrics_are_what_their_names_say():
    layer, rows = a_layer(), some_rows()
    goodness, activity = layer(rows).scores, layer.compute(rows)[: 2 * B]
    expected_rms = layer.weight.square().mean().sqrt().item()
    _, values = train_rows(layer, rows, B, measure=True)
    metrics = dict(zip(layer.metrics, values.tolist(), strict=True))
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
        train_rows(exact, some_rows(), B)
        train_rows(rounded, some_rows(dtype=torch.bfloat16), B)
    moved = (exact.weight - a_layer().weight).norm()
    assert (exact.weight - rounded.weight).norm() < 0.02 * moved


def test_peer_normalization_revives_a_dead_unit():
    alive = {}
    for peer_strength in (0.0, 0.03):
        layer, rows = a_layer(rule=Rule(peer_strength=peer_strength)), some_rows()
        layer.bias[0] = -8.0
        assert not layer.compute(rows)[:, 0].any()
        for _ in range(10_000):
            train_rows(layer, rows, B)
        alive[peer_strength] = bool(layer.compute(rows)[:, 0].any())
    assert alive == {0.0: False, 0.03: True}


def test_loaded_weights_are_used_in_products():
    """The products read a copy of the weights in the compute type, which a load must renew."""
    trained, fresh = a_layer(torch.bfloat16), DenseLayer(D, H, compute_dtype=torch.bfloat16)
    train_rows(trained, some_rows(dtype=torch.bfloat16), B)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(some_rows(dtype=torch.bfloat16)).scores, trained(some_rows(dtype=torch.bfloat16)).scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_changed_from_outside_count_at_once(dtype):
    """In bfloat16, and on a GPU, products use a copy of the weights."""
    changed, fresh, rows = a_layer(dtype), a_layer(dtype), some_rows(dtype=dtype)
    for layer in (changed, fresh):
        train_rows(layer, rows, B)
        with torch.no_grad():
            layer.weight.mul_(3)
    fresh.refresh()
    assert torch.equal(changed(rows).scores, fresh(rows).scores)
    with torch.inference_mode():
        assert torch.equal(a_layer(dtype)(rows).scores, a_layer(dtype)(rows).scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_makes_no_needless_copies(dtype, monkeypatch):
    layer, rows = a_layer(dtype), some_rows(dtype=dtype)
    monkeypatch.setattr(DenseLayer, "refresh", lambda self: pytest.fail("the update keeps the copy up to date"))
    for _ in range(3):
        train_rows(layer, rows, B)
    layer(rows)
