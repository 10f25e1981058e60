import pytest
import torch
import torch.nn.functional as F

from ffdist.ff.readout import Readout

B, C, WIDTHS = 7, 4, (5, 3)


def test_update_is_sgd_on_cross_entropy_with_momentum_and_weight_decay():
    """m <- 0.9 m + 0.1 gradient / batch; W <- W + lr_scale * 0.1 * (m - 0.003 W); biases without weight decay."""
    generator = torch.Generator().manual_seed(0)
    readout = Readout(sum(WIDTHS), C).double()
    momentum = [torch.zeros(C, sum(WIDTHS)).double(), torch.zeros(C).double()]
    for lr_scale in (1.0, 0.5):
        activations = [torch.randn(B, width, generator=generator).double() for width in WIDTHS]
        labels = torch.randint(0, C, (B,), generator=generator)
        weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (readout.weight, readout.bias))
        logits = F.linear(torch.cat(activations, 1), weight, bias)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(-loss, (weight, bias))
        momentum = [0.9 * old + 0.1 * new for old, new in zip(momentum, gradients, strict=True)]

        _, metrics = readout.train_minibatch(activations, labels, lr_scale=lr_scale)
        torch.testing.assert_close(readout.weight, weight + lr_scale * 0.1 * (momentum[0] - 0.003 * weight))
        torch.testing.assert_close(readout.bias, bias + lr_scale * 0.1 * momentum[1])
        torch.testing.assert_close(metrics, torch.stack((loss.detach(), (logits.argmax(1) != labels).double().mean())))


def test_readout_learns_separable_classes():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 6, generator=generator)
    labels = (rows[:, 0] > 0).long() + 2 * (rows[:, 3] > 0).long()
    readout = Readout(6, C)
    for _ in range(500):
        readout.train_minibatch([rows[:, :2], rows[:, 2:]], labels)
    assert (readout([rows[:, :2], rows[:, 2:]]).argmax(1) != labels).float().mean() < 0.1


def test_fit_ends_where_the_gradient_vanishes():
    """Autograd computes the gradient of cross-entropy with weight decay at the fitted parameters."""
    generator = torch.Generator().manual_seed(2)
    rows, labels = torch.randn(300, 5, generator=generator), torch.randint(0, C, (300,), generator=generator)
    readout, steps = Readout(5, C), []
    max_gradient = readout.fit(rows, labels, step=lambda: steps.append(1))
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (readout.weight, readout.bias))
    loss = F.cross_entropy(F.linear(rows, weight, bias), labels) + 0.003 / 2 * weight.square().sum()
    expected = max(gradient.abs().max().item() for gradient in torch.autograd.grad(loss, (weight, bias)))
    assert max_gradient <= 1e-4  # the loss is 1.4 nats; float32 allows no smaller gradient
    assert expected == pytest.approx(max_gradient, abs=1e-5)
    assert 3 < len(steps) <= 501
