import pytest
from helpers import image_architecture

from ffdist.data.order import SampleOrder
from ffdist.pipeline.blueprint import DEFAULT_CHUNK, MAX_CHUNK_BYTES, Blueprint
from ffdist.pipeline.source import NegativePlan


def make_blueprint(stages=3, delay=None, width=5, minibatches=500) -> Blueprint:
    architecture = image_architecture((1, 2, 2), 3, (width,) * stages)
    order = SampleOrder(0, 10 * minibatches, 10)
    plan = NegativePlan("hard_label" if delay else "hybrid", prediction_delay=delay)
    return Blueprint(architecture, order, plan, [range(i, i + 1) for i in range(stages)], measure_every=1, device="cpu")


@pytest.mark.parametrize(("minibatch_s", "size"), [(None, DEFAULT_CHUNK), (0.01, 35), (0.07, 5), (10, 1), (1e-9, 500)])
def test_auto_chunk_size_follows_the_minibatch_time_up_to_an_epoch(minibatch_s, size):
    assert make_blueprint().with_pace("auto", "auto", minibatch_s=minibatch_s).chunk_size == size


def test_explicit_chunk_size_is_limited_only_by_the_epoch():
    sizes = [
        make_blueprint(minibatches=30).with_pace(size, 1, minibatch_s=1.0, most=3).chunk_size for size in (7, 1000)
    ]
    assert sizes == [7, 30]


def test_auto_chunk_size_of_wide_layers_is_limited_by_the_message_size():
    wide = make_blueprint(width=100_000)
    size = wide.with_pace("auto", 1, minibatch_s=1e-9).chunk_size
    row_bytes = 100_000 * wide.architecture.compute_dtype.itemsize
    minibatch_bytes = 10 * 3 * row_bytes  # positive and negative rows, and rows for the readout
    assert size * minibatch_bytes <= MAX_CHUNK_BYTES < (size + 1) * minibatch_bytes
    single_stage = wide._replace(stage_layers=[range(3)]).with_pace("auto", 1, minibatch_s=1e-9)
    # Activations of two layers for the readout; there is no next stage.
    assert single_stage.chunk_size == MAX_CHUNK_BYTES // (10 * 2 * row_bytes)
    assert make_blueprint(width=10**9).with_pace("auto", 1).chunk_size == 1


def test_auto_chunk_size_is_limited_by_the_checkpoint_interval():
    assert make_blueprint().with_pace("auto", 1, minibatch_s=0.01, most=12).chunk_size == 12


@pytest.mark.parametrize(
    ("stages", "max_in_flight", "expected"), [(3, "auto", 6), (5, "auto", 8), (3, 2, 2), (3, 60, 60)]
)
def test_auto_max_in_flight_keeps_every_stage_busy(stages, max_in_flight, expected):
    assert make_blueprint(stages).with_pace(10, max_in_flight).max_in_flight == expected


@pytest.mark.parametrize(
    ("size", "max_in_flight", "expected"),
    [(20, 1, (20, 1)), (20, 4, (20, 4)), (20, 60, (20, 10)), (200, 4, (200, 1)), ("auto", "auto", (33, 6))],
)
def test_no_chunk_waits_for_hard_labels_of_a_chunk_in_flight(size, max_in_flight, expected):
    blueprint = make_blueprint(delay=200).with_pace(size, max_in_flight, minibatch_s=0.001)
    assert (blueprint.chunk_size, blueprint.max_in_flight) == expected
