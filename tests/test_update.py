import math

import pytest
import torch

from ffdist.ff.optimizers import BETA2, Learner, Update
from ffdist.ff.schedules import lr_scales

RATE, DECAY, MOMENTUM = 0.05, 0.1, 0.8
TORCH_OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": MOMENTUM}),
    "adam": (torch.optim.Adam, {"betas": (MOMENTUM, BETA2)}),
    "adamw": (torch.optim.AdamW, {"betas": (MOMENTUM, BETA2)}),
}


def make_learner(weight, bias, optimizer) -> Learner:
    learner = Learner(Update(RATE, DECAY, MOMENTUM, optimizer))
    learner.weight, learner.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    learner.add_optimizer_state()
    return learner


@pytest.mark.parametrize("optimizer", TORCH_OPTIMIZERS)
def test_optimizers_match_torch_without_weight_decay_of_biases(optimizer):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)
    learner = make_learner(weight.clone(), bias.clone(), optimizer)
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer_class, settings = TORCH_OPTIMIZERS[optimizer]
    groups = [{"params": [weight], "weight_decay": DECAY}, {"params": [bias], "weight_decay": 0.0}]
    reference = optimizer_class(groups, lr=RATE, **settings)
    for lr_scale in (1.0, 1.0, 0.5, 0.25):
        gradients = torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)
        learner.ascend(dict(zip(("weight", "bias"), gradients, strict=True)), lr_scale=lr_scale)
        weight.grad, bias.grad = (-gradient for gradient in gradients)
        for group in reference.param_groups:
            group["lr"] = lr_scale * RATE
        reference.step()
        torch.testing.assert_close(learner.weight, weight.detach())
        torch.testing.assert_close(learner.bias, bias.detach())


@pytest.mark.parametrize("optimizer", ["hinton", *TORCH_OPTIMIZERS])
def test_state_dict_contains_the_optimizer_state(optimizer):
    """A learner that loads a state continues exactly like the original."""
    gradients = {"weight": torch.ones(4, 3), "bias": torch.ones(4)}
    original, restored = (make_learner(torch.ones(4, 3), torch.zeros(4), optimizer) for _ in range(2))
    original.ascend(gradients, lr_scale=1.0)
    restored.load_state_dict(original.state_dict())
    for learner in (original, restored):
        learner.ascend(gradients, lr_scale=0.5)
    assert all(torch.equal(tensor, restored.state_dict()[name]) for name, tensor in original.state_dict().items())
    assert not torch.equal(original.weight, torch.ones(4, 3))


@pytest.mark.parametrize("optimizer", ["hinton", *TORCH_OPTIMIZERS])
def test_blockwise_update_equals_update_of_the_whole_parameter(optimizer, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(3, 7, 5, generator=generator), torch.randn(3, 7, 5, generator=generator).bfloat16()
    states = []
    for block_values in (4, 20, 1000):  # one row per block, four rows, all rows
        monkeypatch.setattr("ffdist.ff.optimizers.BLOCK_VALUES", block_values)
        learner, copy = make_learner(weight.clone(), torch.zeros(21), optimizer), weight.half()
        for _ in range(2):
            learner.ascend({"weight": gradient, "bias": torch.ones(21)}, lr_scale=1.0, copies={"weight": copy})
        torch.testing.assert_close(copy, learner.weight.half(), rtol=0, atol=0)
        states.append(learner.state_dict())
    for name, tensor in states.pop().items():
        for state in states:
            torch.testing.assert_close(state[name], tensor)


def test_lr_scale_is_one_for_half_of_the_epochs_and_then_falls_to_one_over_epochs():
    scales = lr_scales("hinton", 100)
    assert scales[:50] == [1.0] * 50
    assert scales[50] == (1 + 2 * 49) / 100
    assert scales[-1] == 1 / 100
    assert scales == sorted(scales, reverse=True)


def test_cosine_falls_to_zero_and_warmup_rises_to_the_schedule():
    scales = lr_scales("cosine", 10, warmup=3)
    assert scales[3:] == lr_scales("cosine", 10)[3:]
    assert [round(scale, 6) for scale in scales[:3]] == [
        round(full * (epoch + 1) / 4, 6) for epoch, full in enumerate(lr_scales("cosine", 10)[:3])
    ]
    assert math.isclose(sum(lr_scales("cosine", 10)), 5)  # symmetric about 1/2
    assert lr_scales("cosine", 1000)[-1] < 1e-5
    assert lr_scales("constant", 4) == [1.0] * 4
