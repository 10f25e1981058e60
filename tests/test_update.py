import pytest
import torch

from ffdist.ff.optimizers import BETA2, Learner, Update, epoch_lr_scale

RATE, DECAY, MOMENTUM = 0.05, 0.1, 0.8
TORCH = {
    "sgd": (torch.optim.SGD, {"momentum": MOMENTUM}),
    "adam": (torch.optim.Adam, {"betas": (MOMENTUM, BETA2)}),
    "adamw": (torch.optim.AdamW, {"betas": (MOMENTUM, BETA2)}),
}


def a_learner(weight, bias, optimizer) -> Learner:
    learner = Learner(Update(RATE, DECAY, MOMENTUM, optimizer))
    learner.weight, learner.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    learner.add_optimizer_state()
    return learner


@pytest.mark.parametrize("optimizer", TORCH)
def test_optimizers_are_those_of_torch_without_decay_of_biases(optimizer):
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 3, generator=draw), torch.randn(4, generator=draw)
    learner = a_learner(weight.clone(), bias.clone(), optimizer)
    weight.requires_grad_()
    bias.requires_grad_()
    kind, settings = TORCH[optimizer]
    groups = [{"params": [weight], "weight_decay": DECAY}, {"params": [bias], "weight_decay": 0.0}]
    reference = kind(groups, lr=RATE, **settings)
    for lr_scale in (1.0, 1.0, 0.5, 0.25):
        gradients = torch.randn(4, 3, generator=draw), torch.randn(4, generator=draw)
        learner.ascend(dict(zip(("weight", "bias"), gradients, strict=True)), lr_scale=lr_scale)
        weight.grad, bias.grad = (-gradient for gradient in gradients)
        for group in reference.param_groups:
            group["lr"] = lr_scale * RATE
        reference.step()
        torch.testing.assert_close(learner.weight, weight.detach())
        torch.testing.assert_close(learner.bias, bias.detach())


@pytest.mark.parametrize("optimizer", ["hinton", *TORCH])
def test_what_an_optimizer_keeps_is_in_the_state(optimizer):
    """A learner that is loaded in the middle goes on as if it had never stopped."""
    gradients = {"weight": torch.ones(4, 3), "bias": torch.ones(4)}
    one, other = (a_learner(torch.ones(4, 3), torch.zeros(4), optimizer) for _ in range(2))
    one.ascend(gradients, lr_scale=1.0)
    other.load_state_dict(one.state_dict())
    for learner in (one, other):
        learner.ascend(gradients, lr_scale=0.5)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert not torch.equal(one.weight, torch.ones(4, 3))


@pytest.mark.parametrize("optimizer", ["hinton", *TORCH])
def test_an_update_in_pieces_is_that_of_the_whole(optimizer, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(3, 7, 5, generator=draw), torch.randn(3, 7, 5, generator=draw).bfloat16()
    found = []
    for piece in (4, 20, 1000):  # of numbers: a row at a time, four of them, all
        monkeypatch.setattr("ffdist.ff.optimizers.BLOCK_VALUES", piece)
        learner, copy = a_learner(weight.clone(), torch.zeros(21), optimizer), weight.half()
        for _ in range(2):
            learner.ascend({"weight": gradient, "bias": torch.ones(21)}, lr_scale=1.0, copies={"weight": copy})
        torch.testing.assert_close(copy, learner.weight.half(), rtol=0, atol=0)
        found.append(learner.state_dict())
    for name, tensor in found.pop().items():
        for other in found:
            torch.testing.assert_close(other[name], tensor)


def test_gain_is_one_for_the_first_half_then_falls_to_one_epoch_th():
    gains = [epoch_lr_scale(epoch, 100) for epoch in range(100)]
    assert gains[:50] == [1.0] * 50
    assert gains[50] == (1 + 2 * 49) / 100
    assert gains[-1] == 1 / 100
    assert gains == sorted(gains, reverse=True)
