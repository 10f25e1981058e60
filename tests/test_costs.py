import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from ffdist import load_config, train
from ffdist.errors import ConfigError
from ffdist.ff.architecture import Architecture
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.costs import Costs, _minibatch_s, predicted_samples_per_s, send_s
from ffdist.pipeline.partition import partition
from ffdist.pipeline.stage import Report
from ffdist.runtime.placement import Placement, reserve
from ffdist.training.precision import measurement
from ffdist.training.prepare import prepare


@pytest.fixture(scope="module")
def prepared_digits():
    return prepare(load_config("digits"))


def make_blueprint(prepared, stage_layers) -> Blueprint:
    return Blueprint(
        prepared.architecture, prepared.order, prepared.negatives, stage_layers, measure_every=1, device="cpu"
    )


def measure(runner, prepared, config) -> Costs | None:
    return measurement(runner, prepared, config, "cpu")().costs


@pytest.mark.parametrize("runner", ["serial", "ray"])
def test_costs_of_all_actors_are_measured(runner, prepared_digits):
    costs = measure(runner, prepared_digits, load_config("digits"))
    assert len(costs.layers) == 3
    assert min(*costs.layers, costs.readout, costs.negatives) > 0
    assert costs.device == "cpu"


@pytest.mark.parametrize("kind", ["all_wrong", "hybrid"])
def test_measurement_holds_one_layer_in_memory_at_a_time(kind, monkeypatch):
    """Measuring used to build several whole networks, so that the system killed the driver for lack of memory."""
    label = ["data.label=none"] if kind == "hybrid" else ["data.jitter=1"]
    config = load_config("digits", ["model.layers=[40,30,20,20,10]", f"negatives.kind={kind}", *label])
    live_layers, built_layers, build = weakref.WeakSet(), [], Architecture.layer

    def build_and_count(architecture, index):
        assert not live_layers
        layer = build(architecture, index)
        live_layers.add(layer)
        built_layers.append(index)
        return layer

    monkeypatch.setattr(Architecture, "layer", build_and_count)
    costs = measure("ray", prepare(config), config)
    assert built_layers == [0, 1, 2, 3, 4]
    assert not live_layers
    assert len(costs.layers) == 5


def test_layers_of_the_same_shape_are_measured_once_and_estimated_after_the_time_limit(prepared_digits, monkeypatch):
    costs = measure("ray", prepared_digits, load_config("digits"))
    assert costs.layers[0] != costs.layers[1] == costs.layers[2]
    monkeypatch.setattr("ffdist.pipeline.costs.LIMIT_S", -1)
    config = load_config("digits", ["model.layers=[40,30,20]"])
    prepared = prepare(config)
    costs, counts = measure("ray", prepared, config), prepared.architecture.num_parameters
    assert [cost / costs.layers[0] for cost in costs.layers] == pytest.approx([each / counts[0] for each in counts])


def test_task_measures_on_the_nodes_of_the_stages_and_reports_failures(ray_start_4_cpus):
    from ffdist.runtime.measurement import run_on_machines

    config = load_config("digits", ["model.layers=[20]"])
    placement = Placement(2, device="cuda", stage_gpus=0, stage_cpus=0.5, other_cpus=0.5)  # not measured in the driver
    with reserve(placement.bundles(1)) as group:
        results = run_on_machines(measurement("ray", prepare(config), config, "cpu"), group, placement)
        (result,) = results.values()  # both stages are on this node
        assert result.costs.device == "cpu"
        assert min(*result.costs.layers, result.costs.readout, result.costs.negatives) > 0
        failing_function = partial(torch.zeros, 1, device="meta:none")
        with pytest.raises(ConfigError, match=r"must train a layer .*0.5 CPU, 0 GPU; RuntimeError: .*model\.layers"):
            run_on_machines(failing_function, group, placement)


def test_greedy_training_estimated_balance_and_backpropagation_are_not_measured(prepared_digits):
    assert measure("serial", prepared_digits, load_config("digits", ["training.schedule=greedy"])) is None
    assert measure("serial", prepared_digits, load_config("digits", ["pipeline.balance=estimated"])) is None
    assert measure("backpropagation", prepared_digits, load_config("digits")) is None


def test_first_chunk_is_never_counted_even_if_it_takes_all_the_time(prepared_digits, monkeypatch):
    """The cost of a convolution was that of its first chunk alone; the predicted throughput was half the real one."""
    monkeypatch.setattr("ffdist.pipeline.costs.MAX_ACTOR_S", 0)
    chunks = []

    def train(chunk):
        chunks.append(chunk.step)
        return Report(torch.empty(0), compute_s=0.001 if chunk.step else 1.0, wait_s=0.0)

    blueprint = make_blueprint(prepared_digits, [range(3)])._replace(device="cuda")  # whose time is that of the report
    blueprint = blueprint._replace(order=replace(blueprint.order, num_samples=blueprint.order.batch_size))
    assert _minibatch_s(train, blueprint) == 0.001
    assert chunks == [0, 1]


def test_balance_accounts_for_the_size_of_what_stages_send(monkeypatch):
    """The output of a convolution without pooling is large, so a stage ends after the next one, which pools."""
    monkeypatch.setattr("ffdist.pipeline.costs.BYTE_S", 1e-6)
    layers = "model.layers=[{kind: conv, channels: 8}, {kind: conv, channels: 8, pool: max}, 20]"
    config = load_config(
        "digits", [layers, "training.objective=class_goodness", "negatives.kind=none", "data.label=none"]
    )
    prepared, costs = prepare(config), Costs([0.02, 0.01, 0.01], 0.001, 0.0, "cpu")
    sends = send_s(make_blueprint(prepared, []))
    batch = prepared.order.batch_size
    assert sends[:2] == pytest.approx([batch * 4 * 1e-6 * values for values in (8 * 8 * 8, 8 * 4 * 4)])
    assert partition(costs.layers, 2) == [range(1), range(1, 3)]
    assert partition(costs.layers, 2, sends) == [range(2), range(2, 3)]


@pytest.mark.parametrize(
    ("stage_layers", "cpus", "byte_s", "seconds"),
    [
        ([range(3)], None, 1, 0.07),  # sum of all actors
        ([range(1), range(1, 2), range(2, 3)], None, 1, 0.07),
        ([range(1), range(1, 2), range(2, 3)], 16, 0, 0.03),  # the slowest stage
        ([range(1), range(1, 2), range(2, 3)], 16, 1e-6, 0.03 + 50 * 3 * 500 * 4e-6),
        ([range(1), range(1, 3)], 16, 0, 0.05),
    ],
)
def test_slowest_stage_limits_predicted_throughput_if_there_are_enough_cpus(
    stage_layers, cpus, byte_s, seconds, prepared_digits, monkeypatch
):
    monkeypatch.setattr("ffdist.pipeline.costs.BYTE_S", byte_s)
    costs, blueprint = Costs([0.01, 0.03, 0.02], 0.006, 0.004, "cpu"), make_blueprint(prepared_digits, stage_layers)
    predicted = predicted_samples_per_s(costs, blueprint, processors=cpus)
    assert predicted == pytest.approx(prepared_digits.order.batch_size / seconds)


@pytest.mark.parametrize(
    ("gpus", "negatives", "byte_s", "seconds"),
    [
        (4, 0.01, 0, 0.03),  # the slowest stage
        (1, 0.01, 0, 0.07),  # layers and readout share a GPU
        (4, 0.05, 0, 0.05),  # negatives are made on a CPU
        # The second stage sends most: the signal, and activations for the readout.
        (4, 0.01, 1e-6, 0.03 + 50 * 3 * 500 * 4e-6),
    ],
)
def test_slowest_actor_limits_predicted_throughput_on_gpus(
    gpus, negatives, byte_s, seconds, prepared_digits, monkeypatch
):
    monkeypatch.setattr("ffdist.pipeline.costs.BYTE_S", byte_s)
    monkeypatch.setattr("ffdist.pipeline.costs.CALL_S", 0)
    costs = Costs([0.01, 0.03, 0.02], 0.01, negatives, "cuda")
    blueprint = make_blueprint(prepared_digits, [range(1), range(1, 2), range(2, 3)])
    predicted = predicted_samples_per_s(costs, blueprint, processors=gpus)
    assert predicted == pytest.approx(prepared_digits.order.batch_size / seconds)


def test_total_time_and_messages_limit_predicted_throughput_of_actors_that_share_cpus(prepared_digits):
    costs = Costs([0.01, 0.03, 0.02], 0.006, 0.004, "cpu")
    blueprint = make_blueprint(prepared_digits, [range(1), range(1, 2), range(2, 3)])
    ideal = prepared_digits.order.batch_size / 0.035
    small_chunks, large_chunks = (
        predicted_samples_per_s(costs, blueprint.with_pace(size, 1), processors=2) for size in (1, 20)
    )
    assert small_chunks < large_chunks < ideal


def test_balance_changes_stages_but_not_the_results(tmp_path):
    summaries = {
        balance: train(
            load_config("digits", ["training.epochs=1", f"pipeline.balance={balance}", "pipeline.stages=auto"]),
            runner="serial",
            runs=tmp_path,
        ).summary
        for balance in ("measured", "estimated", "[2, 1]")
    }
    assert len({summary["weights_sha256"] for summary in summaries.values()}) == 1
    assert [summary["stages"] for summary in summaries.values()] == [3, 3, 2]
    assert [bool(summary["predicted_samples_per_s"]) for summary in summaries.values()] == [True, False, True]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parameters of glibc")
def test_memory_that_is_kept_for_a_measurement_is_given_back():
    """Layers are measured with the same memory settings as in their actors, and the driver is left as it was."""
    code = (
        "import psutil, torch; from ffdist.pipeline.runner import memory_kept\n"
        "def free(): [torch.ones(2**24).sum() for _ in range(2)]; return psutil.Process().memory_info().rss // 2**20\n"
        "before = free()\n"
        "with memory_kept(): kept = free()\n"
        "print(before, kept, psutil.Process().memory_info().rss // 2**20, free())"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=200, capture_output=True, text=True)
    before, kept, *after = map(int, result.stdout.split())
    assert kept > before + 50
    assert max(after) < before + 30
