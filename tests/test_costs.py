import pytest

from ffdist import load_config, train
from ffdist.launch import measure
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.costs import Costs, predicted_samples_per_s
from ffdist.prepare import prepare


@pytest.fixture(scope="module")
def digits():
    return prepare(load_config("digits"))


def a_blueprint(prepared, cut) -> Blueprint:
    return Blueprint(prepared.architecture, prepared.order, prepared.negatives, 0, cut, measure_every=1, device="cpu")


@pytest.mark.parametrize("runner", ["serial", "ray"])  # in turn, and as many at a time as there are processors
def test_every_part_is_measured(runner, digits):
    costs = measure(runner, digits, load_config("digits"))
    assert len(costs.layers) == 3
    assert min(*costs.layers, costs.readout, costs.negatives) > 0
    assert costs.device == "cpu"


def test_greedy_training_and_estimates_need_no_measurement(digits):
    assert measure("serial", digits, load_config("digits", ["training.schedule=greedy"])) is None
    assert measure("serial", digits, load_config("digits", ["pipeline.balance=estimated"])) is None
    assert measure("backpropagation", digits, load_config("digits")) is None


@pytest.mark.parametrize(
    ("cut", "processors", "seconds"),
    [
        ([range(3)], None, 0.07),  # all in turn
        ([range(1), range(1, 2), range(2, 3)], None, 0.07),
        ([range(1), range(1, 2), range(2, 3)], 16, 0.03),  # the slowest stage
        ([range(1), range(1, 3)], 16, 0.05),
    ],
)
def test_the_slowest_stage_decides_where_processors_abound(cut, processors, seconds, digits):
    costs, blueprint = Costs([0.01, 0.03, 0.02], 0.006, 0.004, "cpu"), a_blueprint(digits, cut)
    found = predicted_samples_per_s(costs, blueprint, processors=processors)
    assert found == pytest.approx(digits.order.batch_size / seconds)


@pytest.mark.parametrize(
    ("gpus", "negatives", "byte_s", "seconds"),
    [
        (4, 0.01, 0, 0.03),  # the slowest stage
        (1, 0.01, 0, 0.07),  # layers and readout share a GPU
        (4, 0.05, 0, 0.05),  # negatives are made elsewhere
        (4, 0.01, 1e-6, 0.03 + 50 * 3 * 500 * 2e-6),  # the second stage packs most: a signal, and for the readout
    ],
)
def test_on_gpus_the_slowest_part_decides(gpus, negatives, byte_s, seconds, digits, monkeypatch):
    monkeypatch.setattr("ffdist.pipeline.costs.BYTE_S", byte_s)
    monkeypatch.setattr("ffdist.pipeline.costs.CALL_S", 0)
    costs = Costs([0.01, 0.03, 0.02], 0.01, negatives, "cuda")
    three = a_blueprint(digits, [range(1), range(1, 2), range(2, 3)])
    found = predicted_samples_per_s(costs, three, processors=gpus)
    assert found == pytest.approx(digits.order.batch_size / seconds)


def test_parts_that_share_processors_wait_for_all_of_them_and_their_messages(digits):
    costs = Costs([0.01, 0.03, 0.02], 0.006, 0.004, "cpu")
    blueprint = a_blueprint(digits, [range(1), range(1, 2), range(2, 3)])
    ideal = digits.order.batch_size / 0.035
    far, near = (predicted_samples_per_s(costs, blueprint.paced(size, 1), processors=2) for size in (1, 20))
    assert far < near < ideal


def test_balance_changes_stages_and_no_result(tmp_path):
    found = {
        balance: train(
            load_config("digits", ["training.epochs=1", f"pipeline.balance={balance}", "pipeline.stages=auto"]),
            runner="serial",
            runs=tmp_path,
        ).summary
        for balance in ("measured", "estimated", "[2, 1]")
    }
    assert len({summary["weights_sha256"] for summary in found.values()}) == 1
    assert [summary["stages"] for summary in found.values()] == [3, 3, 2]
    assert [bool(summary["predicted_samples_per_s"]) for summary in found.values()] == [True, False, True]
