"""Which layers make a stage."""

from collections.abc import Sequence
from itertools import accumulate


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Cuts layers into contiguous stages so that the slowest stage is as fast as can be.

    Args:
        costs: Work of each layer, in any unit, such as its number of weights.
        stages: Number of stages, from 1 to the number of layers.

    Returns:
        The layers of each stage, counted from 0, none empty; of equally good cuts the one with the earliest ends.
    """
    assert 1 <= stages <= len(costs), "the configuration holds this"
    total = [0.0, *accumulate(costs)]
    # best[end]: slowest stage and ends of the cut of the first `end` layers, for the number of stages so far
    best = {end: (total[end], [end]) for end in range(1, len(costs) + 1)}
    for stage in range(2, stages + 1):
        best = {
            end: min(
                (max(best[start][0], total[end] - total[start]), [*best[start][1], end])
                for start in range(stage - 1, end)
            )
            for end in range(stage, len(costs) + 1)
        }
    return _ranges(best[len(costs)][1])


def given_partition(sizes: Sequence[int]) -> list[range]:
    """Returns the layers of each stage, given how many it has."""
    return _ranges(list(accumulate(sizes)))


def _ranges(ends: list[int]) -> list[range]:
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
