import torch

from ffdist.ff.goodness import logistic_loss, normalize, sum_of_squares


def test_goodness_of_bfloat16_is_summed_in_float32():
    activity = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    activity[0, 0] = 16.0  # 4351 is no bfloat16 number
    assert sum_of_squares(activity).item() == 4351.0


def test_normalized_rows_have_mean_square_one_whatever_their_neighbours():
    rows = torch.randn(5, 30) * torch.logspace(-2, 2, 5).unsqueeze(1)
    torch.testing.assert_close(normalize(rows).square().mean(1), torch.ones(5))
    assert torch.equal(normalize(rows)[2], normalize(rows[2:3])[0])


def test_dead_rows_stay_zero():
    assert torch.equal(normalize(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_loss_does_not_overflow():
    loss, pull = logistic_loss(torch.tensor([0.0]), torch.tensor([1e30]), 2000.0)
    assert loss[0] == 2000.0
    assert torch.isfinite(loss).all()
    assert pull.tolist() == [1.0, -1.0]


def test_pull_is_minus_the_derivative_of_the_loss():
    positive = torch.randn(7, dtype=torch.float64, requires_grad=True)
    negative = torch.randn(7, dtype=torch.float64, requires_grad=True)
    loss, pull = logistic_loss(positive, negative, 0.3)
    gradients = torch.autograd.grad(loss.sum(), (positive, negative))
    torch.testing.assert_close(pull, -torch.cat(gradients))
