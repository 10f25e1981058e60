import weakref
from functools import partial

import pytest
import torch

from ffdist import load_config, train
from ffdist.errors import ConfigError
from ffdist.ff.network import Architecture
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.costs import Costs, predicted_samples_per_s
from ffdist.runtime.placement import Placement, reserve
from ffdist.training.precision import measurement
from ffdist.training.prepare import prepare


@pytest.fixture(scope="module")
def digits():
    return prepare(load_config("digits"))


def a_blueprint(prepared, cut) -> Blueprint:
    return Blueprint(prepared.architecture, prepared.order, prepared.negatives, cut, measure_every=1, device="cpu")


def measure(runner, prepared, config) -> Costs | None:
    return measurement(runner, prepared, config, "cpu")().costs


@pytest.mark.parametrize("runner", ["serial", "ray"])
def test_every_part_is_measured(runner, digits):
    costs = measure(runner, digits, load_config("digits"))
    assert len(costs.layers) == 3
    assert min(*costs.layers, costs.readout, costs.negatives) > 0
    assert costs.device == "cpu"


@pytest.mark.parametrize("kind", ["all_wrong", "hybrid"])
def test_one_layer_is_in_memory_at_a_time(kind, monkeypatch):
    """Whole networks were, and more than one of them: the system ended the driver in its first seconds."""
    label = ["data.label=none"] if kind == "hybrid" else ["data.jitter=1"]
    config = load_config("digits", ["model.layers=[40,30,20,20,10]", f"negatives.kind={kind}", *label])
    alive, made, build = weakref.WeakSet(), [], Architecture.layer

    def counting(architecture, index):
        assert not alive
        layer = build(architecture, index)
        alive.add(layer)
        made.append(index)
        return layer

    monkeypatch.setattr(Architecture, "layer", counting)
    costs = measure("ray", prepare(config), config)
    assert made == [0, 1, 2, 3, 4]
    assert not alive
    assert len(costs.layers) == 5


def test_layers_of_one_shape_are_measured_once_and_late_ones_are_estimated(digits, monkeypatch):
    costs = measure("ray", digits, load_config("digits"))
    assert costs.layers[0] != costs.layers[1] == costs.layers[2]
    monkeypatch.setattr("ffdist.pipeline.costs.LIMIT_S", -1)
    config = load_config("digits", ["model.layers=[40,30,20]"])
    prepared = prepare(config)
    costs, counts = measure("ray", prepared, config), prepared.architecture.num_parameters
    assert [cost / costs.layers[0] for cost in costs.layers] == pytest.approx([each / counts[0] for each in counts])


def test_a_task_measures_where_stages_will_be_and_tells_what_fails(ray_start_4_cpus):
    from ffdist.runtime.measurement import run_on_machines

    config = load_config("digits", ["model.layers=[20]"])
    placement = Placement(2, device="cuda", stage_gpus=0, stage_cpus=0.5, other_cpus=0.5)  # not in the driver
    with reserve(placement.bundles(1)) as group:
        found = run_on_machines(measurement("ray", prepare(config), config, "cpu"), group, placement)
        (measured,) = found.values()  # of both stages
        assert measured.costs.device == "cpu"
        assert min(*measured.costs.layers, measured.costs.readout, measured.costs.negatives) > 0
        fails = partial(torch.zeros, 1, device="meta:none")
        with pytest.raises(ConfigError, match=r"must train a layer .*0.5 CPU, 0 GPU; RuntimeError: .*model\.layers"):
            run_on_machines(fails, group, placement)


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
        (4, 0.01, 1e-6, 0.03 + 50 * 3 * 500 * 4e-6),  # the second stage packs most: a signal, and for the readout
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
    far, near = (predicted_samples_per_s(costs, blueprint.with_pace(size, 1), processors=2) for size in (1, 20))
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
