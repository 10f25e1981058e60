import torch
import torch.nn.functional as F

from ffdist.ff.readout import Readout

B, C, WIDTHS = 7, 4, (5, 3)


def test_update_is_the_gradient_of_the_cross_entropy_smoothed_and_decayed():
    """g <- 0.9 g + 0.1 gradient / batch; W <- W + gain * 0.1 * (g - 0.003 W); biases without decay."""
    draw = torch.Generator().manual_seed(0)
    readout = Readout(sum(WIDTHS), C).double()
    smoothed = [torch.zeros(C, sum(WIDTHS)).double(), torch.zeros(C).double()]
    for gain in (1.0, 0.5):
        activities = [torch.randn(B, width, generator=draw).double() for width in WIDTHS]
        labels = torch.randint(0, C, (B,), generator=draw)
        weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (readout.weight, readout.bias))
        logits = F.linear(torch.cat(activities, 1), weight, bias)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(-loss, (weight, bias))
        smoothed = [0.9 * old + 0.1 * new for old, new in zip(smoothed, gradients, strict=True)]

        _, metrics = readout.train_minibatch(activities, labels, gain=gain)
        torch.testing.assert_close(readout.weight, weight + gain * 0.1 * (smoothed[0] - 0.003 * weight))
        torch.testing.assert_close(readout.bias, bias + gain * 0.1 * smoothed[1])
        torch.testing.assert_close(metrics, torch.stack((loss.detach(), (logits.argmax(1) != labels).double().mean())))


def test_it_learns_what_can_be_told_apart():
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 6, generator=draw)
    labels = (rows[:, 0] > 0).long() + 2 * (rows[:, 3] > 0).long()
    readout = Readout(6, C)
    for _ in range(500):
        readout.train_minibatch([rows[:, :2], rows[:, 2:]], labels)
    assert (readout([rows[:, :2], rows[:, 2:]]).argmax(1) != labels).float().mean() < 0.1
