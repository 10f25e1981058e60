"""`training.precision=auto` is the faster precision; the run records it, and the hardware of all actors."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from ffdist import load_config, train
from ffdist.runs.folder import checkpoints_of
from ffdist.runtime.access import private_ray
from ffdist.training.precision import DeviceMeasurement, resolve

FAST, EQUAL = DeviceMeasurement("a CPU with AMX", 5.0), DeviceMeasurement("a busy CPU of 2024", 1.4)
SLOW = DeviceMeasurement("a CPU of 2019", 0.25)


@pytest.mark.parametrize(
    ("speeds", "precision", "reason"),
    [
        ([FAST], "bfloat16", "5 times as fast as float32 on a CPU with AMX"),
        ([EQUAL], "float32", "1.4 times as fast as float32 on a busy CPU of 2024"),
        ([FAST, SLOW, FAST], "float32", "0.25 times as fast as float32 on a CPU of 2019"),
    ],
)
def test_auto_is_bfloat16_only_if_it_is_faster_on_every_device(speeds, precision, reason):
    assert resolve("auto", speeds)[0] == (precision, f"precision: {precision}; bfloat16 is {reason}")


@pytest.mark.parametrize(
    ("setting", "speeds", "warning"),
    [
        ("bfloat16", [FAST, SLOW], "bfloat16 is 4.0 times slower than float32 on a CPU of 2019"),
        ("float32", [FAST], "float32 is 5.0 times slower than bfloat16 on a CPU with AMX"),
        ("bfloat16", [FAST], ""),
        ("float32", [FAST, SLOW], ""),
        ("bfloat16", [EQUAL], ""),
        ("float32", [EQUAL], ""),
    ],
)
def test_slower_precision_is_used_with_a_warning(setting, speeds, warning):
    precision, reason = resolve(setting, speeds)[0]
    assert precision == setting
    assert warning in reason
    assert bool(reason) == bool(warning)


@pytest.mark.parametrize("runner", ["serial", "backpropagation"])
def test_a_run_records_the_resolved_precision(runner, tmp_path, capsys):
    config = load_config("digits", ["model.layers=[20]", "training.epochs=1", "tracking.artifacts=[]"])
    assert config.training.precision == "auto"
    run = train(config, runner=runner, runs=tmp_path)
    precision = run.summary["precision"]
    checkpoints = checkpoints_of(config, run.folder)
    manifest = checkpoints.read_manifest(checkpoints.names()[-1])
    assert precision in ("float32", "bfloat16")
    assert run.config.training.precision == run.network.architecture.precision == precision
    assert manifest.config["training"]["precision"] == precision
    output = capsys.readouterr().out
    assert f"precision: {precision}; bfloat16 is " in output
    assert f"\nprecision       {precision}\n" in output


@pytest.mark.slow
def test_recovery_on_another_cpu_type_is_recorded_with_a_warning(tmp_path, capsys):
    """The actors are not on the driver's node. Their node is replaced by one where torch uses other instructions."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "object_store_memory": 200_000_000, "node_ip_address": "127.0.0.2"}
    driver_node = {"num_cpus": 0, "object_store_memory": 200_000_000, "include_dashboard": False}
    settings = ["model.layers=[30,20]", "training.epochs=200", "checkpoint.every_minibatches=20", "pipeline.stages=1"]
    config = load_config("digits", [*settings, "tracking.artifacts=[]"])
    with private_ray(), ExitStack() as stack:
        cluster = Cluster(initialize_head=True, head_node_args=driver_node)
        stack.callback(cluster.shutdown)
        first_node = cluster.add_node(**node, env_vars={"ATEN_CPU_CAPABILITY": "default"})
        with ThreadPoolExecutor(1) as thread:  # Ray starts nodes in the main thread only
            training = thread.submit(train, config, address=cluster.address, runs=tmp_path)
            while not list(tmp_path.glob("*/checkpoints/*/manifest.json")):
                assert not training.done(), training.result()
                time.sleep(0.01)
            cluster.remove_node(first_node, allow_graceful=False)
            cluster.add_node(**node)
            run = training.result()
    output = capsys.readouterr().out
    pattern = r"^precision: \w+; bfloat16 is .* on .*DEFAULT.*, node .* \(127\.0\.0\.2\)"
    assert re.search(pattern, output, re.M), "the precision must be measured on the node of the actors"
    (recovery,) = run.summary["recoveries"]
    actors = "layer 1, layer 2, readout, negative actor 1"
    assert re.search(f"{actors}: CPU was [^;]*DEFAULT[^;]* and is ", recovery["differences"])
    assert f"{actors}: environment was ATEN_CPU_CAPABILITY=default and is none" in recovery["differences"]
    assert recovery["differences"] in output
