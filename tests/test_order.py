import torch

from ffdist.data.order import SampleOrder, split


def test_epoch_is_a_permutation_without_the_remainder():
    order = SampleOrder(seed=0, num_samples=103, batch_size=10)
    assert order.num_minibatches == 10
    indices = order.indices(3, 0, 10).flatten()
    assert len(indices.unique()) == 100
    remainders = [set(range(103)) - set(order.indices(epoch, 0, 10).flatten().tolist()) for epoch in range(3)]
    assert remainders[0] != remainders[1] != remainders[2]


def test_minibatches_do_not_depend_on_the_requested_range():
    order = SampleOrder(seed=5, num_samples=100, batch_size=10)
    expected = order.indices(2, 0, 10)
    assert torch.equal(torch.cat([order.indices(2, first, 1) for first in range(10)]), expected)
    assert not torch.equal(order.indices(3, 0, 10), expected)
    assert not torch.equal(SampleOrder(seed=6, num_samples=100, batch_size=10).indices(2, 0, 10), expected)


def test_split_is_disjoint_and_depends_on_the_seed():
    training, validation = split(0, 100, 20)
    assert sorted((*training.tolist(), *validation.tolist())) == list(range(100))
    assert len(validation) == 20
    assert not torch.equal(validation, split(1, 100, 20)[1])
