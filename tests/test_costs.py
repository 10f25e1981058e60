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
    assert min(*costs.layers, costs.others) > 0
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
    costs, blueprint = Costs([0.01, 0.03, 0.02], 0.01, "cpu"), a_blueprint(digits, cut)
    found = predicted_samples_per_s(costs, blueprint, processors=processors)
    assert found == pytest.approx(digits.order.batch_size / seconds)


def test_on_gpus_only_layers_share_them_and_a_stage_packs_by_itself(digits):
    three = a_blueprint(digits, [range(1), range(1, 2), range(2, 3)])
    for gpus, others, seconds in [(4, 0.05, 0.05), (4, 0.01, 0.03), (1, 0.05, 0.06)]:
        costs = Costs([0.01, 0.03, 0.02], others, "cuda")
        ideal = digits.order.batch_size / seconds
        found = predicted_samples_per_s(costs, three.paced(1000, 1), processors=gpus)
        assert 0.98 * ideal < found <= ideal


def test_parts_that_share_processors_wait_for_all_of_them_and_their_messages(digits):
    costs, blueprint = Costs([0.01, 0.03, 0.02], 0.01, "cpu"), a_blueprint(digits, [range(1), range(1, 2), range(2, 3)])
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
