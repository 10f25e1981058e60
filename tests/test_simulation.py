"""Recovery with simulated actors: faults do not change the result, and the simulation detects deliberate bugs."""

from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from ffdist.chaos import simulation
from ffdist.chaos.simulation import simulate
from ffdist.checkpoint.checkpoints import Checkpoints, StopState
from ffdist.errors import RunFailed
from ffdist.pipeline.source import Drawn, HardLabels
from ffdist.tracking.outbox import Outbox
from ffdist.training.early_stopping import EarlyStopping
from ffdist.training.metrics import Metrics


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_faults_do_not_break_recovery(seed):
    outcome = simulate(200, seed)
    assert outcome.schedules == 200
    assert outcome.faults > 400


@pytest.fixture
def early_stopping(monkeypatch):
    """Makes all runs of a simulation end early."""
    training = {"epochs": 6, "stop": {"patience": 2}}
    monkeypatch.setitem(simulation.SETTINGS, "training", simulation.SETTINGS["training"] | training)
    reference, _ = simulation.run_schedule(0, max_faults=0)
    assert len(reference.metrics["validation/readout_error"]) < 6


def test_random_faults_do_not_change_where_a_run_ends(early_stopping):
    assert simulate(200, 0).faults > 400


def test_simulation_detects_a_lost_state_of_early_stopping(early_stopping, monkeypatch):
    monkeypatch.setattr(EarlyStopping, "state", lambda self, step: StopState())
    with pytest.raises(RunFailed, match=r"schedule \d+ of seed 0 failed"):
        simulate(200, 0)


class Recorder:
    """Records files instead of writing them."""

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


def write_manifest_first(monkeypatch):
    finish = Checkpoints.finish

    def finish_manifest_first(self, *args, **options):
        folder, files = self.folder, []
        self.folder = Recorder(files)
        try:
            manifest = finish(self, *args, **options)
        finally:
            self.folder = folder
        for name, content in reversed(files):
            folder.put(name, content)
        return manifest

    monkeypatch.setattr(Checkpoints, "finish", finish_manifest_first)


def prune_before_saving(monkeypatch):
    finish = Checkpoints.finish

    def finish_after_pruning(self, *args, **options):
        for name in self.names():
            self.folder.remove(f"{name}/manifest.json")
            self.folder.remove(name)
        return finish(self, *args, **options)

    monkeypatch.setattr(Checkpoints, "finish", finish_after_pruning)


def lose_labels_in_flight(monkeypatch):
    monkeypatch.setattr(Drawn, "added_to", lambda self, state: state)


def lose_pending_labels(monkeypatch):
    monkeypatch.setattr(HardLabels, "restore", lambda self, state: None)


def lose_partial_averages(monkeypatch):
    monkeypatch.setattr(Metrics, "state", lambda self: {})


def resend_points(monkeypatch):
    add = Outbox._add

    def add_again(self, points, *, sent):
        points = list(points)
        for point in points:
            self._database.execute("delete from points where name = ? and step = ?", (point.name, point.step))
        return add(self, [point._replace(timestamp=point.timestamp + id(point)) for point in points], sent=sent)

    monkeypatch.setattr(Outbox, "_add", add_again)


@pytest.mark.parametrize(
    "inject_bug",
    [
        write_manifest_first,
        prune_before_saving,
        lose_labels_in_flight,
        lose_pending_labels,
        lose_partial_averages,
        resend_points,
    ],
)
def test_simulation_detects_the_bug_within_200_schedules(monkeypatch, inject_bug):
    inject_bug(monkeypatch)
    with pytest.raises(
        RunFailed,
        match=r"schedule \d+ of seed 0 failed: .*run `ffdist chaos --simulated \d+ --seed 0` to reproduce it",
    ):
        simulate(200, seed=0)
