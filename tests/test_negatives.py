import torch

from ffdist.ff.negatives import WrongLabel

LABELS = torch.arange(10).repeat(3000)


def test_wrong_labels_are_never_the_true_label():
    """Shuffled labels would be true in one case of ten."""
    for epoch in range(5):
        wrong = WrongLabel(LABELS, 10, seed=0).labels(epoch)
        assert not (wrong == LABELS).any()
        assert wrong.min() == 0
        assert wrong.max() == 9


def test_every_wrong_class_is_equally_likely():
    wrong = WrongLabel(LABELS, 10, seed=1).labels(0)
    counts = torch.bincount(LABELS * 10 + wrong, minlength=100).view(10, 10)
    expected = 3000 / 9
    off_diagonal = counts[~torch.eye(10, dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 6 * expected**0.5


def test_wrong_labels_are_drawn_afresh_each_epoch_and_repeatably():
    one, again = WrongLabel(LABELS, 10, seed=2), WrongLabel(LABELS, 10, seed=2)
    assert torch.equal(one.labels(7), again.labels(7))
    assert 0.05 < (one.labels(7) == one.labels(8)).double().mean() < 0.2


def test_two_classes_have_one_wrong_label():
    labels = torch.tensor([0, 1, 1])
    assert WrongLabel(labels, 2, seed=0).labels(0).tolist() == [1, 0, 0]
