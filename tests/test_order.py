import torch

from ffdist.data.order import SampleOrder, split


def test_an_epoch_is_a_permutation_whose_rest_is_dropped():
    order = SampleOrder(seed=0, num_samples=103, batch_size=10)
    assert order.num_minibatches == 10
    seen = order.indices(3, 0, 10).flatten()
    assert len(seen.unique()) == 100
    rest = [set(range(103)) - set(order.indices(epoch, 0, 10).flatten().tolist()) for epoch in range(3)]
    assert rest[0] != rest[1] != rest[2]


def test_minibatches_do_not_depend_on_how_they_are_asked_for():
    order = SampleOrder(seed=5, num_samples=100, batch_size=10)
    whole = order.indices(2, 0, 10)
    assert torch.equal(torch.cat([order.indices(2, first, 1) for first in range(10)]), whole)
    assert not torch.equal(order.indices(3, 0, 10), whole)
    assert not torch.equal(SampleOrder(seed=6, num_samples=100, batch_size=10).indices(2, 0, 10), whole)


def test_split_parts_by_the_seed():
    rest, held_out = split(0, 100, 20)
    assert sorted((*rest.tolist(), *held_out.tolist())) == list(range(100))
    assert len(held_out) == 20
    assert not torch.equal(held_out, split(1, 100, 20)[1])
