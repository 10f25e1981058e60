from itertools import combinations, pairwise

import pytest

from ffdist.pipeline.partition import partition


def max_stage_cost(costs, assignment):
    return max(sum(costs[layer] for layer in layers) for layers in assignment)


@pytest.mark.parametrize("costs", [[1, 1, 1, 1], [784, 2000, 2000, 2000], [5, 1, 1, 1, 5], [1, 2, 3, 4, 5, 6], [9, 1]])
def test_partition_minimizes_the_slowest_stage(costs):
    for num_stages in range(1, len(costs) + 1):
        assignment = partition(costs, num_stages)
        assert [layer for layers in assignment for layer in layers] == list(range(len(costs)))
        assert all(len(layers) for layers in assignment)
        candidates = (
            [range(a, b) for a, b in pairwise((0, *ends, len(costs)))]
            for ends in combinations(range(1, len(costs)), num_stages - 1)
        )
        assert max_stage_cost(costs, assignment) == min(max_stage_cost(costs, candidate) for candidate in candidates)


def test_a_stage_ends_where_it_has_little_to_send():
    assert partition([2, 2, 2, 2], 2) == [range(2), range(2, 4)]
    assert partition([2, 2, 2, 2], 2, [0, 9, 1, 0]) == [range(1), range(1, 4)]
    assert partition([2, 2, 2, 2], 3, [9, 1, 2, 0]) == [range(2), range(2, 3), range(3, 4)]
    assert partition([1, 1, 1], 1, [9, 9, 0]) == [range(3)]
