"""Other places than MLflow that get the metrics."""

import csv
import struct
from pathlib import Path

import pytest

from ffdist import ConfigError, load_config, train
from ffdist.config.sections import Tracking
from ffdist.tracking import sinks as sinks_module
from ffdist.tracking.outbox import OUTBOX, Outbox
from ffdist.tracking.sinks import Sinks
from ffdist.tracking.tracker import Tracker

TRAINED = ["training.epochs=2", "model.layers=[20,10]", "tracking.log_every_minibatches=7", "tracking.artifacts=[]"]


def read_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            series.setdefault(row["metric"], []).append((int(row["step"]), float(row["value"])))
    return series


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.compat.proto.event_pb2 import Event

    series: dict[str, list[tuple[int, float]]] = {}
    (path,) = (folder / "tensorboard").iterdir()
    data = path.read_bytes()
    while data:  # records: length, its checksum, content, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            series.setdefault(value.tag, []).append((event.step, value.simple_value))
        data = data[16 + length :]
    return series


@pytest.mark.parametrize("uri", ["none", None])
def test_csv_has_every_metric_of_a_run(uri, tmp_path):
    config = load_config("digits", [*TRAINED, "tracking.also=[csv]", *([f"tracking.uri={uri}"] if uri else [])])
    run = train(config, runner="serial", runs=tmp_path)
    assert read_csv(run.folder) == run.metrics


def test_event_files_have_every_metric_of_a_run(tmp_path):
    pytest.importorskip("tensorboard")
    config = load_config("digits", [*TRAINED, "tracking.also=[tensorboard]", "tracking.uri=none"])
    run = train(config, runner="serial", runs=tmp_path)
    events = read_events(run.folder)
    assert events.keys() == run.metrics.keys()
    for name, points in run.metrics.items():
        assert [step for step, _ in events[name]] == [step for step, _ in points]
        assert [value for _, value in events[name]] == pytest.approx([value for _, value in points], rel=1e-6)


def test_resumed_run_has_no_point_twice(tmp_path):
    for steps in (range(3), range(1, 6)):  # a recovered run logs points again
        outbox = Outbox(tmp_path / OUTBOX, 10**6)
        sinks = Sinks(outbox, ["csv"])
        for step in steps:
            outbox.add({"loss": step / 2}, step)
        sinks.close(60)
        outbox.close()
    assert read_csv(tmp_path) == {"loss": [(step, step / 2) for step in range(6)]}


def num_losses(folder: Path) -> int:
    try:
        return len(read_csv(folder).get("loss", []))
    except (OSError, KeyError, TypeError, ValueError):  # a line is being written
        return 0


def test_points_appear_while_the_run_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks_module, "FLUSH_INTERVAL_S", 0.01)
    outbox = Outbox(tmp_path / OUTBOX, 10**6)
    sinks = Sinks(outbox, ["csv"])
    for step in range(5):
        outbox.add({"loss": 1.0, "nothing": float("nan")}, step)
        while num_losses(tmp_path) < step + 1:
            pass
    sinks.close(60)
    outbox.close()
    assert len(read_csv(tmp_path)["nothing"]) == 5


def test_run_ends_well_if_a_sink_cannot_be_written(tmp_path, caplog):
    (tmp_path / "metrics.csv").mkdir()
    with Tracker("none", Tracking(uri="none", also=["csv"]), runs=tmp_path) as tracker:
        tracker.begin(tmp_path, {})
        tracker.log_metrics({"loss": 1.0}, 1)
    assert "tracking.also=['csv'] stopped" in caplog.text
    assert Outbox.history_of(tmp_path / OUTBOX) == {"loss": [(1, 1.0)]}


def test_missing_package_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package tensorboard"):
        Tracker("none", Tracking(uri="none", also=["tensorboard"]), runs=tmp_path)
