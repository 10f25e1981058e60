import time

import pytest
import torch

from ffdist.pipeline.source import Shard
from ffdist.pipeline.stage import _Clock


def waited(make_s: float, made_ago_s: float, wait_s: float) -> float:
    """The time that a stage says it waited for negatives, had it been free for `wait_s` before its call."""
    clock, start = _Clock(), time.perf_counter()
    clock._free_since = start - wait_s
    shard = Shard(0, torch.zeros(1).long(), time.time() - made_ago_s, make_s)
    return clock.report(torch.zeros(1), start, [shard]).negatives_wait_s


@pytest.mark.parametrize(
    ("make_s", "made_ago_s", "wait_s", "expected"),
    [
        (2.0, 0.0, 5.0, 2.0),  # it waited for other things before, as in one process
        (2.0, 0.5, 1.5, 1.0),  # they were being made when it got free, and it went on half a second later
        (2.0, 9.0, 1.5, 0.0),  # made long ago
        (2.0, 0.0, 0.0, 0.0),
    ],
)
def test_waiting_for_negatives_is_the_time_in_which_they_were_made(make_s, made_ago_s, wait_s, expected):
    assert waited(make_s, made_ago_s, wait_s) == pytest.approx(expected, abs=0.2)
