import pytest
import torch
import torch.nn.functional as F

from ffdist.ff.readout import Readout

B, C, WIDTHS = 7, 4, (5, 3)


def test_update_is_the_gradient_of_the_cross_entropy_smoothed_and_decayed():
    """g <- 0.9 g + 0.1 gradient / batch; W <- W + lr_scale * 0.1 * (g - 0.003 W); biases without decay."""
    draw = torch.Generator().manual_seed(0)
    readout = Readout(sum(WIDTHS), C).double()
    smoothed = [torch.zeros(C, sum(WIDTHS)).double(), torch.zeros(C).double()]
    for lr_scale in (1.0, 0.5):
        activities = [torch.randn(B, width, generator=draw).double() for width in WIDTHS]
        labels = torch.randint(0, C, (B,), generator=draw)
        weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (readout.weight, readout.bias))
        logits = F.linear(torch.cat(activities, 1), weight, bias)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(-loss, (weight, bias))
        smoothed = [0.9 * old + 0.1 * new for old, new in zip(smoothed, gradients, strict=True)]

        _, metrics = readout.train_minibatch(activities, labels, lr_scale=lr_scale)
        torch.testing.assert_close(readout.weight, weight + lr_scale * 0.1 * (smoothed[0] - 0.003 * weight))
        torch.testing.assert_close(readout.bias, bias + lr_scale * 0.1 * smoothed[1])
        torch.testing.assert_close(metrics, torch.stack((loss.detach(), (logits.argmax(1) != labels).double().mean())))


def test_it_learns_what_can_be_told_apart():
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 6, generator=draw)
    labels = (rows[:, 0] > 0).long() + 2 * (rows[:, 3] > 0).long()
    readout = Readout(6, C)
    for _ in range(500):
        readout.train_minibatch([rows[:, :2], rows[:, 2:]], labels)
    assert (readout([rows[:, :2], rows[:, 2:]]).argmax(1) != labels).float().mean() < 0.1


def test_a_fit_ends_where_nothing_is_left_to_gain():
    """The gradient of cross-entropy and decay, by autograd, vanishes there."""
    draw = torch.Generator().manual_seed(2)
    rows, labels = torch.randn(300, 5, generator=draw), torch.randint(0, C, (300,), generator=draw)
    readout, asked = Readout(5, C), []
    slope = readout.fit(rows, labels, step=lambda: asked.append(1))
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (readout.weight, readout.bias))
    value = F.cross_entropy(F.linear(rows, weight, bias), labels) + 0.003 / 2 * weight.square().sum()
    steepest = max(gradient.abs().max().item() for gradient in torch.autograd.grad(value, (weight, bias)))
    assert slope <= 1e-4  # of 1.4 nats; float32 ends there
    assert steepest == pytest.approx(slope, abs=1e-5)
    assert 3 < len(asked) <= 501
