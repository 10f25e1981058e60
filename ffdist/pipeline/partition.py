"""Assignment of layers to stages."""

from collections.abc import Sequence
from itertools import accumulate


def partition(costs: Sequence[float], stages: int, sends: Sequence[float] = ()) -> list[range]:
    """Splits layers into contiguous stages so that the slowest stage is as fast as possible.

    Args:
        costs: Cost of each layer, in any unit, such as its number of weights.
        stages: Number of stages, from 1 to the number of layers.
        sends: Cost of sending the output of a stage that ends with each layer, in the same unit; empty if it is 0.

    Returns:
        The layers of each stage, counted from 0; no stage is empty. Ties are resolved in favor of early ends.
    """
    assert 1 <= stages <= len(costs), "checked by the configuration"
    total, sends = [0.0, *accumulate(costs)], [0.0, *(sends or [0.0] * len(costs))]
    # best[end]: slowest stage and stage sizes for the first `end` layers, with the number of stages so far
    best = {end: (total[end] + sends[end], [end]) for end in range(1, len(costs) + 1)}
    for stage in range(2, stages + 1):
        best = {
            end: min(
                (max(best[start][0], total[end] - total[start] + sends[end]), [*best[start][1], end - start])
                for start in range(stage - 1, end)
            )
            for end in range(stage, len(costs) + 1)
        }
    return partition_of_sizes(best[len(costs)][1])


def partition_of_sizes(sizes: Sequence[int]) -> list[range]:
    """Returns the layers of each stage, given their numbers."""
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
