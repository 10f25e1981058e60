import math
from types import SimpleNamespace

import torch
from helpers import image_architecture
from mlflow.utils.validation import _validate_metric

from ffdist.ff.layers import MEASURED
from ffdist.ff.objectives import GoodnessObjective
from ffdist.pipeline.evaluation import Evaluation
from ffdist.pipeline.runner import Trained
from ffdist.pipeline.schedule import Train
from ffdist.pipeline.stage import Report
from ffdist.training.metrics import Metrics, error_metrics
from ffdist.training.resume import Start

STEPS, BATCH_SIZE = 24, 10
METRICS = (*GoodnessObjective.metrics, *MEASURED)
PIPELINE = SimpleNamespace(blueprint=SimpleNamespace(architecture=image_architecture((1, 2, 2), 3, (5, 5))))
LAYERS = torch.randn(STEPS, 2, len(METRICS), generator=torch.Generator().manual_seed(0))
READOUT = torch.rand(STEPS, 2, generator=torch.Generator().manual_seed(1))


def collect_points(chunk_size: int, every: int) -> list[tuple[int, dict[str, float]]]:
    points = []
    metrics = Metrics(every, BATCH_SIZE, lambda values, samples: points.append((samples, values)))
    metrics.on_start(Start({}), PIPELINE)
    metrics.on_restore(0)
    for first in range(0, STEPS, chunk_size):
        rows = slice(first, first + chunk_size)
        stages = [Report(LAYERS[rows, layer : layer + 1], 3.0, 1.0, 0.5) for layer in (0, 1)]
        chunk = Train(0, first, len(READOUT[rows]), first, 1.0)
        metrics.on_chunk(Trained(chunk, stages, Report(READOUT[rows], 1.0, 1.0)), first + chunk_size)
    metrics.finish(STEPS)
    return points


def remove_times(points):
    return [
        (
            step,
            {
                name: value
                for name, value in metrics.items()
                if not any(word in name for word in ("_s", "busy", "wait"))
            },
        )
        for step, metrics in points
    ]


def test_logged_metrics_do_not_depend_on_the_chunk_size():
    expected = remove_times(collect_points(1, 10))
    assert [step for step, _ in expected] == [100, 200, 240]
    for chunk_size in (3, 7, 10, 24):
        assert remove_times(collect_points(chunk_size, 10)) == expected


def test_logged_metric_is_the_mean_over_its_minibatches():
    step, metrics = collect_points(4, 8)[1]
    assert step == 160
    assert metrics["layer_2/loss"] == LAYERS[8:16, 1, 0].double().mean().item()
    assert metrics["readout/error"] == READOUT[8:16, 1].double().mean().item()


def test_times_are_counted_once_and_fractions_are_of_the_total_time():
    for chunk_size in (3, 24):
        timings = [metrics for _, metrics in collect_points(chunk_size, 8) if "stage_1/compute_s" in metrics]
        assert sum(metrics["stage_1/compute_s"] for metrics in timings) == 3.0 * STEPS / chunk_size
        assert all(metrics["stage_2/busy_fraction"] == 0.75 for metrics in timings)
        assert all(metrics["negatives/wait_fraction"] == 0.125 for metrics in timings)


def test_metrics_that_were_not_measured_are_not_logged(monkeypatch):
    monkeypatch.setitem(globals(), "LAYERS", LAYERS.clone().index_fill_(2, torch.tensor([4, 5]), math.nan))
    assert not {f"layer_1/{name}" for name in MEASURED} & set(collect_points(4, 8)[0][1])


def test_throughput_is_measured_from_the_start_of_training(monkeypatch):
    """The time in which the actors start, between `on_start` and `on_restore`, does not count."""
    now, logged_values = 0.0, []
    monkeypatch.setattr("time.perf_counter", lambda: now)
    metrics = Metrics(STEPS, BATCH_SIZE, lambda values, samples: logged_values.append(values))
    metrics.on_start(Start({}), PIPELINE)
    now = 100.0
    metrics.on_restore(0)
    now = 102.0
    stages = [Report(LAYERS, 3.0, 1.0, 0.5)]
    metrics.on_chunk(Trained(Train(0, 0, STEPS, 0, 1.0), stages, Report(READOUT, 1.0, 1.0)), STEPS)
    assert logged_values[0]["samples_per_s"] == STEPS * BATCH_SIZE / 2


def class_metrics(split, names, confusion):
    evaluation = Evaluation(None, 0.5, None, torch.tensor(confusion), torch.empty(0))
    return {
        name: error for name, error in error_metrics(split, evaluation, names).items() if name.startswith("test/class")
    }


def test_errors_of_classes_are_logged_for_the_test_set_under_names_that_mlflow_accepts():
    confusion = [[3, 1, 0], [0, 2, 0], [0, 0, 0]]  # the third class has no samples
    assert class_metrics("test", ["a/b?", "M\u00f6we 1", "owl"], confusion) == {
        "test/class_a_b__error": 0.25,
        "test/class_M\u00f6we 1_error": 0.0,
    }
    for names in ([], ["a?", "a!", "b"], ["x" * 300, "x" * 301, "b"]):  # none, or equal ones
        assert class_metrics("test", names, confusion) == {"test/class_0_error": 0.25, "test/class_1_error": 0.0}
    assert class_metrics("validation", ["a", "b", "c"], confusion) == {}
    assert len(class_metrics("test", [], torch.eye(20).long().tolist())) == 20
    assert class_metrics("test", [], torch.eye(21).long().tolist()) == {}


def test_error_metrics_of_any_class_name_are_accepted_by_mlflow():
    names = ["..", "/", "", "K\udce4uzchen", "\u6b62\u8840", "a:b", "%20", "tab\t", "x" * 300, "-"]
    for name in class_metrics("test", names, torch.eye(10).long().tolist()):
        _validate_metric(name, 0.5, 0, 0)
