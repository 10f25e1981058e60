import pytest
from helpers import image_architecture

from ffdist.data.order import SampleOrder
from ffdist.pipeline.blueprint import DEFAULT_CHUNK, MAX_CHUNK_BYTES, Blueprint
from ffdist.pipeline.source import NegativePlan


def a_blueprint(stages=3, delay=None, width=5, minibatches=500) -> Blueprint:
    architecture = image_architecture((1, 2, 2), 3, (width,) * stages)
    order = SampleOrder(0, 10 * minibatches, 10)
    plan = NegativePlan("hard_label" if delay else "hybrid", prediction_delay=delay)
    return Blueprint(architecture, order, plan, [range(i, i + 1) for i in range(stages)], measure_every=1, device="cpu")


@pytest.mark.parametrize(("minibatch_s", "size"), [(None, DEFAULT_CHUNK), (0.01, 35), (0.07, 5), (10, 1), (1e-9, 500)])
def test_a_chunk_takes_its_time_and_no_more_than_an_epoch(minibatch_s, size):
    assert a_blueprint().with_pace("auto", "auto", minibatch_s=minibatch_s).chunk_size == size


def test_a_chunk_that_was_asked_for_is_only_cut_to_the_epoch():
    found = [a_blueprint(minibatches=30).with_pace(size, 1, minibatch_s=1.0, most=3).chunk_size for size in (7, 1000)]
    assert found == [7, 30]


def test_a_chunk_of_wide_layers_is_no_larger_than_a_message_may_be():
    wide = a_blueprint(width=100_000)
    size = wide.with_pace("auto", 1, minibatch_s=1e-9).chunk_size
    row_bytes = 100_000 * wide.architecture.compute_dtype.itemsize
    passed = 10 * 3 * row_bytes  # of a minibatch: positive and negative rows, and those that the readout reads
    assert size * passed <= MAX_CHUNK_BYTES < (size + 1) * passed
    alone = wide._replace(stage_layers=[range(3)]).with_pace("auto", 1, minibatch_s=1e-9)
    assert alone.chunk_size == MAX_CHUNK_BYTES // (10 * 2 * row_bytes)  # two layers are read, and nothing goes on
    assert a_blueprint(width=10**9).with_pace("auto", 1).chunk_size == 1


def test_a_chunk_is_no_longer_than_from_one_checkpoint_to_the_next():
    assert a_blueprint().with_pace("auto", 1, minibatch_s=0.01, most=12).chunk_size == 12


@pytest.mark.parametrize(("stages", "asked", "window"), [(3, "auto", 6), (5, "auto", 8), (3, 2, 2), (3, 60, 60)])
def test_the_window_keeps_every_stage_busy(stages, asked, window):
    assert a_blueprint(stages).with_pace(10, asked).max_in_flight == window


@pytest.mark.parametrize(
    ("size", "asked", "found"),
    [(20, 1, (20, 1)), (20, 4, (20, 4)), (20, 60, (20, 10)), (200, 4, (200, 1)), ("auto", "auto", (33, 6))],
)
def test_no_chunk_waits_for_labels_of_one_under_way(size, asked, found):
    hard = a_blueprint(delay=200).with_pace(size, asked, minibatch_s=0.001)
    assert (hard.chunk_size, hard.max_in_flight) == found
