import pytest
import torch

from ffdist.ff.goodness import GOODNESS, NORMALIZATIONS, normalize, squared_norm
from ffdist.ff.losses import LOSSES, logistic


def test_squares_of_bfloat16_are_summed_in_float32():
    activations = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    activations[0, 0] = 16.0  # 4351 is not representable in bfloat16
    assert squared_norm(activations).item() == pytest.approx(4351.0, rel=1e-6)


@pytest.mark.parametrize("goodness", GOODNESS)
def test_slope_is_half_the_derivative_of_the_goodness(goodness):
    activations = torch.rand(4, 7, dtype=torch.float64, requires_grad=True)
    value = GOODNESS[goodness].value(activations, squared_norm(activations))
    torch.testing.assert_close(
        GOODNESS[goodness].slope(activations), torch.autograd.grad(value.sum(), activations)[0] / 2
    )


NORMS = {"rms": 30**0.5, "l2": 1.0, "none": None}


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_normalized_rows_have_the_expected_norm_independently_of_other_rows(kind):
    rows = torch.randn(5, 30) * torch.logspace(-2, 2, 5).unsqueeze(1)
    expected = squared_norm(rows).sqrt() if NORMS[kind] is None else torch.full((5,), NORMS[kind])
    normalized = normalize(kind, rows, squared_norm(rows))
    torch.testing.assert_close(squared_norm(normalized).sqrt(), expected)
    assert torch.equal(normalized[2], normalize(kind, rows[2:3], squared_norm(rows[2:3]))[0])
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(normalized, rows), torch.ones(5))


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_rows_of_zeros_stay_zero(kind):
    assert torch.equal(normalize(kind, torch.zeros(2, 8), torch.zeros(2)), torch.zeros(2, 8))


def test_loss_does_not_overflow():
    loss, pull = logistic(torch.tensor([-2000.0]), torch.tensor([[1e30]]))
    assert loss[0] == 2000.0
    assert torch.isfinite(loss).all()
    assert pull.tolist() == [[1.0], [-1.0]]


@pytest.mark.parametrize("name", LOSSES)
def test_pull_is_minus_the_derivative_of_the_loss(name):
    """The loss is that of the positive rows plus the mean over the negative rows; that of a pair counts once."""
    positive = torch.randn(7, dtype=torch.float64, requires_grad=True)
    negative = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    loss, pull = LOSSES[name](positive, negative)
    total = loss[0].sum() if name == "symmetric" else loss[0].sum() + loss[1:].sum() / 3
    positive_gradient, negative_gradient = torch.autograd.grad(total, (positive, negative))
    torch.testing.assert_close(pull, -torch.cat((positive_gradient.unsqueeze(0), 3 * negative_gradient)))


def test_margin_loss_matches_the_common_pytorch_port():
    """Its loss is the mean of `log(1 + exp(cat(threshold - positive, negative - threshold)))` over all rows."""
    positive, negative = torch.rand(6) * 4, torch.rand(6) * 4
    expected = torch.log(1 + torch.exp(torch.cat((2 - positive, negative - 2)))).mean()
    loss, _ = LOSSES["margin"](positive - 2, (negative - 2).unsqueeze(0))
    torch.testing.assert_close(loss.mean(), expected)


def test_rms_does_not_subtract_the_mean():
    torch.testing.assert_close(
        normalize("rms", torch.tensor([[3.0, 4.0]]), torch.tensor([25.0])), torch.tensor([[3, 4]]) / 12.5**0.5
    )
