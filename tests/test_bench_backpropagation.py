"""Pipelines by backpropagation, in real processes, train the network of `ffdist baseline`."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from ffdist import load_config
from ffdist.bench.backpropagation import SCHEDULES, PipelinePlan, start_backpropagation
from ffdist.bench.pipeline import measure_pipeline, plan_backpropagation
from ffdist.bench.stretch import request, start_processes
from ffdist.errors import ConfigError, RunFailed
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.schedule import Train
from ffdist.training.precision import make_blueprint, with_precision
from ffdist.training.prepare import prepare

CLASSIFYING = ("training.objective=class_goodness", "negatives.kind=none", "data.label=none")
CONV = (
    "model.layers=[{kind: conv, channels: 6, norm: none, pool: max}, {kind: conv, channels: 5, norm: group}, 12]",
    *CLASSIFYING,
)
BATCH_NORM = ("model.layers=[{kind: conv, channels: 8, dropout: 0.1}, {kind: conv, channels: 8}, 20]", *CLASSIFYING)
LOCAL = ("model.layers=[{kind: local, grid: 3, field: 4, units: 6, stride: 2}, 20]", "data.label=everywhere")


@pytest.mark.parametrize(
    ("stages", "precision", "tolerance", "settings"),
    [
        ([range(1), range(1, 3)], "float32", 1e-4, ()),
        ([range(2), range(2, 3)], "float32", 1e-4, (*CONV, "model.predict_from=1", "training.pooled_features=20")),
        ([range(1), range(1, 3)], "bfloat16", 0.05, BATCH_NORM),
        ([range(1), range(1, 2)], "bfloat16", 0.05, LOCAL),
        ([range(3)], "float32", 1e-4, ()),
    ],
)
def test_schedules_train_the_network_of_the_baseline(stages, precision, tolerance, settings):
    """The loss of the third minibatch, and that of the sixth with the other schedule, is that of one process.

    It differs in the last bits, because microbatches are summed; and a little with batch norm, which sees microbatches.
    """
    config = load_config("digits", settings)
    config, prepared = with_precision(config, prepare(config), precision)
    plan = plan_backpropagation(config, prepared, stages, None)
    assert plan.stage_layers == stages
    samples, labels = prepared.dataset.samples, prepared.dataset.labels["train"]
    with start_backpropagation(plan, samples, labels) as measure:
        results = [measure(name, 0.0) for name in SCHEDULES]
    reference = prepared._replace(architecture=plan.architecture)
    baseline = Backpropagation(make_blueprint(reference, config, stages, "cpu"), samples, labels, None)
    (trained,) = baseline.run([Train(0, 0, 6, 0, 1.0)])
    losses = trained.readout.metrics[:, 0]
    assert losses[5] < losses[0]
    assert [loss for _, loss in results] == pytest.approx([losses[2].item(), losses[5].item()], rel=tolerance)
    assert all(samples_per_s > 0 for samples_per_s, _ in results)


@pytest.mark.parametrize(
    ("stages", "batch", "expected"), [(2, 100, 4), (2, 50, 5), (4, 128, 8), (1, 128, 2), (3, 128, 8), (3, 7, 7)]
)
def test_minibatches_are_split_into_equal_microbatches(stages, batch, expected):
    prepared = prepare(load_config("digits", [f"training.batch_size={batch}"]))
    plan = PipelinePlan(prepared.architecture, prepared.order, [range(index, index + 1) for index in range(stages)], 1)
    assert plan.num_microbatches == expected


def test_there_are_no_more_stages_than_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    config = load_config("digits", ["model.layers=[40,30,20,20]"])
    plan = plan_backpropagation(config, prepare(config), [range(index, index + 1) for index in range(4)], None)
    assert plan.stage_layers == [range(1), range(1, 4)]


def fail(index):
    return {0: abs}[index]


def test_a_process_that_ends_ends_the_benchmark():
    with start_processes(fail, [(0,), (1,)]) as connections, pytest.raises(RunFailed, match="process of the benchmark"):
        request(connections, -1)


def test_backpropagation_is_compared_on_cpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"--backprop measures on CPUs; set pipeline\.device=cpu"):
        measure_pipeline(load_config("digits"), 0.1, print, backpropagation=True)


INTERRUPTED = """
import multiprocessing
from ffdist import load_config
from ffdist.bench.backpropagation import start_backpropagation
from ffdist.bench.pipeline import plan_backpropagation
from ffdist.training.prepare import prepare

if __name__ == "__main__":
    config = load_config("digits")
    prepared = prepare(config)
    plan = plan_backpropagation(config, prepared, [range(2), range(2, 3)], None)
    with start_backpropagation(plan, prepared.dataset.samples, prepared.dataset.labels["train"]) as measure:
        measure("gpipe", 0.0)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        measure("1f1b", 3600.0)
"""


def test_ctrl_c_ends_all_processes(tmp_path):
    (tmp_path / "script.py").write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert len(pids) == 2, errors
    assert not any(map(psutil.pid_exists, pids))
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1, "only the driver is interrupted"
    assert not [*tmp_path.glob("*/store")]
