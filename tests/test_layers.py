import pytest
import torch
import torch.nn.functional as F
from helpers import train_rows

from ffdist.ff.dense import DenseLayer
from ffdist.ff.forms import Form
from ffdist.ff.goodness import GOODNESS
from ffdist.ff.keyed import generator
from ffdist.ff.layers import MEAN_ACTIVITY_MOMENTUM, MEASURED
from ffdist.ff.losses import LOSSES
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update

B, D, H = 6, 11, 9


def make_layer(dtype=torch.float64, **settings) -> DenseLayer:
    layer = DenseLayer(Form((H,)), (H, D), compute_dtype=dtype, generator=generator(0, "layer", 0), **settings)
    layer.add_optimizer_state()
    layer.bias.copy_(0.1 * torch.randn(H, generator=generator(0, "bias")))
    if dtype == torch.float64:
        layer = layer.double()
    layer.refresh()
    return layer


def random_rows(num_passes=3, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(num_passes * B, D, generator=generator(1, "rows"), dtype=torch.float32).to(dtype)


def objective_value(rows, weight, bias, rule, threshold, trained_side):
    """Returns half of the negative loss by the formulas of the papers. The released code omits a factor of 2."""
    activations = F.linear(rows, weight, bias).relu()
    goodness_values = {
        "sum_of_squares": activations.square().sum(1),
        "mean_of_squares": activations.square().mean(1),
        "softmax": activations.logsumexp(1),
    }
    goodness = goodness_values[rule.goodness.removeprefix("minus_")]
    margin = rule.alpha * (goodness - threshold) * (-1 if rule.goodness.startswith("minus") else 1)
    positive, negative = margin[:B], margin[B:].view(-1, B)
    positive, negative = (
        side if trained_side in ("both", name) else side.detach()
        for side, name in ((positive, "positive"), (negative, "negative"))
    )
    if rule.loss == "symmetric":
        return F.logsigmoid(positive - negative).mean(0).sum() / 2
    return (F.logsigmoid(positive).sum() + F.logsigmoid(-negative).mean(0).sum()) / 2


def reference_update(layer: DenseLayer, rows):
    """Returns weight and bias after a minibatch, computed with autograd and plain gradient ascent.

    The gradient of the peer term is not multiplied by the derivative of the ReLU.
    """
    rule, rate = layer.rule, layer.rule.update.learning_rate
    parameters, means = [layer.weight.detach().clone(), layer.bias.detach().clone()], layer.mean_activity
    threshold = -layer.objective.threshold if rule.goodness.startswith("minus") else layer.objective.threshold
    for trained_side in (["positive", "negative"] if rule.alternating else ["both"]) * rule.updates_per_minibatch:
        weight, bias = (parameter.requires_grad_() for parameter in parameters)
        objective = objective_value(rows, weight, bias, rule, threshold, trained_side)
        if trained_side != "negative":
            preactivations = F.linear(rows[:B], weight, bias)
            means = MEAN_ACTIVITY_MOMENTUM * means + (1 - MEAN_ACTIVITY_MOMENTUM) * preactivations.detach().relu().mean(
                0
            )
            objective = objective + (preactivations * rule.peer_strength * (means.mean() - means)).sum()
        gradients = torch.autograd.grad(objective, (weight, bias))
        parameters = [old.detach() + rate * new / B for old, new in zip(parameters, gradients, strict=True)]
    return parameters


PLAIN_UPDATE = Update(0.01, 0.0, momentum=0.0)
RULES = [
    Rule(
        goodness,
        loss=loss,
        alpha=alpha,
        alternating=alternating,
        updates_per_minibatch=updates,
        peer_strength=peer_strength,
        update=PLAIN_UPDATE,
    )
    for goodness in [sign + goodness for goodness in GOODNESS for sign in ("", "minus_")]
    for loss in LOSSES
    for alpha, alternating, updates, peer_strength in [
        (1.0, False, 1, 0.03),
        (4.0, True, 2, 0.03),
        (0.5, False, 3, 0.0),
    ]
]


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_closed_form_gradient_equals_autograd_in_float64(rule, negatives):
    layer, rows = make_layer(rule=rule, threshold=2.0), random_rows(2 + negatives)
    weight, bias = reference_update(layer, rows[: B + negatives * B])
    before = layer.weight.clone()
    train_rows(layer, rows, B, negatives)
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(layer.bias, bias)
    assert (layer.weight - before).abs().max() > 1e-7


def test_closed_form_gradient_equals_finite_differences():
    rule = Rule(peer_strength=0.0, update=PLAIN_UPDATE)
    layer, rows, epsilon = make_layer(rule=rule), random_rows(), 1e-6
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    train_rows(layer, rows, B)
    for index in [(0, 0), (3, 7), (H - 1, D - 1)]:
        shift = torch.zeros_like(weight)
        shift[index] = epsilon
        up, down = (objective_value(rows[: 2 * B], weight + sign * shift, bias, rule, H, "both") for sign in (1, -1))
        assert layer.optimizer.get_buffer("weight/gradient")[index].item() * B == pytest.approx(
            ((up - down) / (2 * epsilon)).item(), rel=1e-5
        )


def test_update_matches_the_released_code():
    """g <- 0.9 g + 0.1 gradient / batch; W <- W + lr_scale * 0.01 * (g - 0.001 W); biases have no weight decay."""
    layer, rows = make_layer(), random_rows()
    momentum_buffers = [torch.zeros(H, D, dtype=torch.float64), torch.zeros(H, dtype=torch.float64)]
    for lr_scale in (1.0, 0.5):
        before = layer.weight.clone(), layer.bias.clone()
        gradients = [
            (new - old) / 0.01 for old, new in zip(before, reference_update(layer, rows[: 2 * B]), strict=True)
        ]
        momentum_buffers = [0.9 * old + 0.1 * new for old, new in zip(momentum_buffers, gradients, strict=True)]
        train_rows(layer, rows, B, lr_scale=lr_scale)
        torch.testing.assert_close(
            layer.weight, before[0] + lr_scale * 0.01 * (momentum_buffers[0] - 0.001 * before[0])
        )
        torch.testing.assert_close(layer.bias, before[1] + lr_scale * 0.01 * momentum_buffers[1])


def test_output_is_computed_before_the_update():
    layer, rows = make_layer(), random_rows()
    expected = layer(rows)
    output, _ = train_rows(layer, rows, B)
    assert torch.equal(output.activations, expected.activations)
    assert not torch.equal(layer(rows).activations, expected.activations)


def test_lr_scale_none_keeps_the_state_and_returns_the_same_output():
    layer, rows = make_layer(), random_rows()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    output, metrics = train_rows(layer, rows, B, lr_scale=None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    trained_output, trained_metrics = train_rows(layer, rows, B)
    assert torch.equal(output.activations, trained_output.activations)
    assert torch.equal(metrics.nan_to_num(), trained_metrics.nan_to_num())


def test_neutral_rows_do_not_affect_the_update():
    layer, other_layer = make_layer(), make_layer()
    rows = random_rows()
    train_rows(layer, rows, B)
    rows[2 * B :] = 0
    train_rows(other_layer, rows, B)
    assert torch.equal(layer.weight, other_layer.weight)


def test_metrics_match_their_definitions():
    layer, rows = make_layer(), random_rows()
    goodness, activations = layer(rows).scores, layer.compute(rows)[: 2 * B]
    expected_rms = layer.weight.square().mean().sqrt().item()
    _, values = train_rows(layer, rows, B, measure=True)
    metrics = dict(zip((*layer.objective.metrics, *MEASURED), values.tolist(), strict=True))
    margin = torch.cat((goodness[:B] - H, H - goodness[B : 2 * B]))
    assert metrics["loss"] == pytest.approx(F.softplus(-margin).mean().item())
    assert metrics["active_fraction"] == pytest.approx((activations > 0).double().mean().item())
    assert metrics["goodness_positive"] == pytest.approx(goodness[:B].mean().item())
    assert metrics["goodness_negative"] == pytest.approx(goodness[B : 2 * B].mean().item())
    assert metrics["pairwise_error"] == pytest.approx((goodness[B : 2 * B] >= goodness[:B]).double().mean().item())
    assert metrics["weight_rms"] == pytest.approx(expected_rms)


def test_bfloat16_stays_near_float64():
    exact, rounded = make_layer(), make_layer(torch.bfloat16)
    for _ in range(5):
        train_rows(exact, random_rows(), B)
        train_rows(rounded, random_rows(dtype=torch.bfloat16), B)
    change = (exact.weight - make_layer().weight).norm()
    assert (exact.weight - rounded.weight).norm() < 0.02 * change


def test_peer_normalization_revives_a_dead_unit():
    is_alive = {}
    for peer_strength in (0.0, 0.03):
        layer, rows = make_layer(rule=Rule(peer_strength=peer_strength)), random_rows()
        layer.bias[0] = -8.0
        assert not layer.compute(rows)[:, 0].any()
        for _ in range(10_000):
            train_rows(layer, rows, B)
        is_alive[peer_strength] = bool(layer.compute(rows)[:, 0].any())
    assert is_alive == {0.0: False, 0.03: True}


def test_loaded_weights_are_used_in_products():
    """Matrix products use a copy of the weights in the compute dtype, which must be refreshed after loading."""
    trained, fresh = make_layer(torch.bfloat16), DenseLayer(Form((H,)), (H, D), compute_dtype=torch.bfloat16)
    train_rows(trained, random_rows(dtype=torch.bfloat16), B)
    fresh.add_optimizer_state()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(
        fresh(random_rows(dtype=torch.bfloat16)).scores, trained(random_rows(dtype=torch.bfloat16)).scores
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_changes_of_weights_take_effect_immediately(dtype):
    """In bfloat16 and on a GPU, matrix products use a copy of the weights."""
    changed, fresh, rows = make_layer(dtype), make_layer(dtype), random_rows(dtype=dtype)
    for layer in (changed, fresh):
        train_rows(layer, rows, B)
        with torch.no_grad():
            layer.weight.mul_(3)
    fresh.refresh()
    assert torch.equal(changed(rows).scores, fresh(rows).scores)
    with torch.inference_mode():
        assert torch.equal(make_layer(dtype)(rows).scores, make_layer(dtype)(rows).scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_makes_no_unnecessary_weight_copies(dtype, monkeypatch):
    layer, rows = make_layer(dtype), random_rows(dtype=dtype)
    monkeypatch.setattr(DenseLayer, "refresh", lambda self: pytest.fail("the update keeps the copy up to date"))
    for _ in range(3):
        train_rows(layer, rows, B)
    layer(rows)
