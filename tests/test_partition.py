from itertools import combinations, pairwise

import pytest

from ffdist.pipeline.partition import partition


def slowest(costs, cut):
    return max(sum(costs[layer] for layer in layers) for layers in cut)


@pytest.mark.parametrize("costs", [[1, 1, 1, 1], [784, 2000, 2000, 2000], [5, 1, 1, 1, 5], [1, 2, 3, 4, 5, 6], [9, 1]])
def test_no_cut_has_a_faster_slowest_stage(costs):
    for stages in range(1, len(costs) + 1):
        cut = partition(costs, stages)
        assert [layer for layers in cut for layer in layers] == list(range(len(costs)))
        assert all(len(layers) for layers in cut)
        every = (
            [range(a, b) for a, b in pairwise((0, *ends, len(costs)))]
            for ends in combinations(range(1, len(costs)), stages - 1)
        )
        assert slowest(costs, cut) == min(slowest(costs, other) for other in every)
