"""Recovery on simulated parts: nothing breaks it, and what would break it is found."""

from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from ffdist.chaos.simulation import ScheduleFailed, simulate
from ffdist.checkpoint.checkpoints import Checkpoints
from ffdist.pipeline.source import Drawn, HardLabels
from ffdist.tracking.outbox import Outbox
from ffdist.training.metrics import Metrics


@pytest.mark.parametrize("seed", [0, 1])
def test_no_schedule_breaks_it(seed):
    outcome = simulate(200, seed)
    assert outcome.schedules == 200
    assert outcome.faults > 400


class Recorder:
    """Only notes what is written."""

    def __init__(self, written):
        self.written = written

    def put(self, *file):
        self.written.append(file)

    @contextmanager
    def atomic_write(self, name):
        with NamedTemporaryFile() as file:
            path = Path(file.name)
            yield path
            self.put(name, path.read_bytes())


def manifest_first(monkeypatch):
    finish = Checkpoints.finish

    def broken(self, *args, **facts):
        folder, written = self.folder, []
        self.folder = Recorder(written)
        try:
            manifest = finish(self, *args, **facts)
        finally:
            self.folder = folder
        for name, content in reversed(written):
            folder.put(name, content)
        return manifest

    monkeypatch.setattr(Checkpoints, "finish", broken)


def pruned_before_saved(monkeypatch):
    finish = Checkpoints.finish

    def broken(self, *args, **facts):
        for name in self.names():
            self.folder.remove(f"{name}/manifest.json")
            self.folder.remove(name)
        return finish(self, *args, **facts)

    monkeypatch.setattr(Checkpoints, "finish", broken)


def labels_under_way_forgotten(monkeypatch):
    monkeypatch.setattr(Drawn, "added_to", lambda self, state: state)


def labels_that_wait_forgotten(monkeypatch):
    monkeypatch.setattr(HardLabels, "restore", lambda self, state: None)


def half_an_average_forgotten(monkeypatch):
    monkeypatch.setattr(Metrics, "state", lambda self: {})


def points_sent_again(monkeypatch):
    add = Outbox._add

    def broken(self, points, *, sent):
        points = list(points)
        for point in points:
            self._database.execute("delete from points where name = ? and step = ?", (point.name, point.step))
        return add(self, [point._replace(timestamp=point.timestamp + id(point)) for point in points], sent=sent)

    monkeypatch.setattr(Outbox, "_add", broken)


@pytest.mark.parametrize(
    "break_it",
    [
        manifest_first,
        pruned_before_saved,
        labels_under_way_forgotten,
        labels_that_wait_forgotten,
        half_an_average_forgotten,
        points_sent_again,
    ],
)
def test_a_broken_recovery_is_found_within_200(monkeypatch, break_it):
    break_it(monkeypatch)
    with pytest.raises(
        ScheduleFailed,
        match=r"schedule \d+ of seed 0 failed: .*run `ffdist chaos --simulated \d+ --seed 0` to reproduce it",
    ):
        simulate(200, seed=0)
