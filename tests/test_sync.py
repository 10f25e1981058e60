"""Uploads that cannot be made at once: what waits, what is rejected, and who sends it later."""

import logging
import os
import shutil
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    TEMPORARILY_UNAVAILABLE,
    UNAUTHENTICATED,
)

from ffdist.config.sections import Tracking
from ffdist.tracking import sync as sending
from ffdist.tracking import tracker as module
from ffdist.tracking.outbox import OUTBOX, Outbox
from ffdist.tracking.server import TRAINING_VIEW, default_uri, tracking_uri
from ffdist.tracking.tracker import Tracker

SHORT = ["digits", "training.epochs=1", "model.layers=[9]", "training.validation_samples=100", "--runner", "serial"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ffdist_in):
    """A runs folder with one finished run."""
    folder = tmp_path_factory.mktemp("sync") / "runs"
    ffdist_in(folder.parent, "train", *SHORT)
    return folder


def a_tracker(runs, **settings) -> Tracker:
    return Tracker(default_uri(runs), Tracking(**settings), runs=runs)


def a_folder(runs, name):
    (runs / name).mkdir()
    (runs / name / "config.yaml").write_text("{}")
    return runs / name


def artifacts(uri, run_id, folder=None):
    return {file.path for file in MlflowClient(uri).list_artifacts(run_id, folder)}


def test_uploads_wait_for_an_artifact_store_and_nothing_waits_for_them(runs, ffdist_in, caplog):
    folder, store = a_folder(runs, "waiting"), runs / "artifacts"
    (folder / "a.txt").write_text("a")

    def plot(folder):
        (folder / "goodness").mkdir()
        (folder / "goodness" / "b.png").write_text("b")
        return folder / "goodness" / "b.png"

    store.rename(runs / "away")
    store.write_text("a disk that is not mounted")
    with a_tracker(runs, flush_timeout_s=1.0) as tracker:
        tracker.begin(folder, {})
        tracker.log_artifact(folder / "a.txt")
        tracker.draw(plot)
        tracker.log_artifact(folder / "missing.txt")
        tracker.log_tags({"kind": "test"})
        tracker.log_metrics({"loss": 1.0}, 1)
    assert "0 points and 2 other uploads wait" in caplog.text
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics, run.data.tags["kind"]) == ("FINISHED", {"loss": 1.0}, "test")
    told = ffdist_in(runs.parent, "sync", code=1)
    assert "2 other uploads wait" in told
    assert "missing.txt" in told
    assert "the file is missing" in told
    store.unlink()
    (runs / "away").rename(store)
    assert "everything is uploaded" in ffdist_in(runs.parent, "sync", folder)
    assert artifacts(tracker.uri, tracker.run_id) == {"a.txt", "goodness"}
    assert artifacts(tracker.uri, tracker.run_id, "goodness") == {"goodness/b.png"}
    assert "nothing is pending in runs" in ffdist_in(runs.parent, "sync")


def test_a_file_that_is_never_taken_does_not_hold_up_the_others(tmp_path):
    """A proxy that takes no large file, say: the others are tried before it is tried again."""

    class Client:
        taken: list[str]

        def log_artifact(self, run_id, path, folder):
            if path.endswith("large"):
                raise OSError("413")
            self.taken.append(path)

    outbox, client = Outbox(tmp_path / OUTBOX, 10**6), Client()
    client.taken = []
    for name in ("large", "b", "c"):
        (tmp_path / name).touch()
        outbox.add_call("artifact", name)
    for _ in range(2):
        with pytest.raises(OSError, match="413"):
            sending.send_calls(client, outbox, "", "")
    assert [path[-1] for path in client.taken] == ["b", "c"]
    assert [call.content for call in outbox.calls()] == ["large"]


def test_a_point_that_the_server_rejects_holds_up_no_other(runs, caplog):
    folder = a_folder(runs, "bad point")
    with a_tracker(runs) as tracker:
        tracker.begin(folder, {})
        for step in range(9):
            tracker.log_metrics({"loss": 1.0, "no\nname": 2.0}, step)
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(9))
    assert "rejected: points" in caplog.text
    assert "uploads wait" not in caplog.text


@pytest.mark.parametrize(
    ("code", "is_kept"),
    [
        (TEMPORARILY_UNAVAILABLE, True),  # SQLite's "database is locked"
        (INTERNAL_ERROR, True),
        (UNAUTHENTICATED, True),
        (INVALID_PARAMETER_VALUE, False),
        (PERMISSION_DENIED, True),  # MLflow's code of every 403, also of a proxy's
    ],
)
def test_only_what_can_never_succeed_is_dropped(tmp_path, code, is_kept):
    class Client:
        def log_batch(self, run_id, **what):
            raise MlflowException("no", error_code=code)

        def get_run(self, run_id):
            return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"))

    outbox = Outbox(tmp_path / OUTBOX, 10**6)
    outbox.add({"loss": 1.0}, 1)
    outbox.add_call("parameters", {"seed": "0"})
    for send in (sending.send_points, partial(sending.send_calls, uri="")):
        with pytest.raises(MlflowException) if is_kept else nullcontext():
            send(Client(), outbox, "")
    assert (outbox.num_pending, outbox.num_calls, len(outbox.rejected())) == ((1, 1, 0) if is_kept else (0, 0, 2))


def test_two_senders_of_one_folder_double_nothing(runs):
    folder, count = a_folder(runs, "leftovers"), 3000
    with a_tracker(runs) as tracker:
        tracker.begin(folder, {})
    with closing(Outbox(folder / OUTBOX, 10**6)) as outbox:
        for step in range(count):
            outbox.add({"loss": 1.0}, step)

    def send(_):
        try:
            return sending.send_run(MlflowClient(tracker.uri), folder, tracker.uri).num_points
        except Timeout:
            return "locked"

    with ThreadPoolExecutor(2) as threads:
        assert 0 in set(threads.map(send, range(2))) <= {0, "locked"}
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(count))


def test_a_folder_stays_locked_while_something_is_sent_from_it(runs, monkeypatch):
    folder, free = a_folder(runs, "slow"), threading.Event()
    monkeypatch.setattr(sending, "send_calls", lambda *arguments, **options: free.wait(60))
    with a_tracker(runs, flush_timeout_s=0.0) as tracker:
        tracker.begin(folder, {})
        assert tracker.run_id
    with pytest.raises(Timeout):
        FileLock(folder / sending.LOCK).acquire(timeout=0)
    free.set()
    FileLock(folder / sending.LOCK).acquire(timeout=60).lock.release()


def test_uploads_of_other_runs_delay_no_run(runs, monkeypatch):
    other, folder, free, begun = a_folder(runs, "other"), a_folder(runs, "own"), threading.Event(), threading.Event()
    with closing(Outbox(other / OUTBOX, 10**6)) as outbox:
        outbox.set_facts(uri=default_uri(runs), run_id="some", left="KILLED")

    def send_run(*arguments):
        begun.set()
        free.wait(60)

    monkeypatch.setattr(module, "LEFTOVERS_TIMEOUT_S", 0.1)
    monkeypatch.setattr(sending, "send_run", send_run)
    try:
        with a_tracker(runs) as tracker:
            tracker.begin(folder, {})
            assert begun.wait(60)
            tracker.log_metrics({"loss": 1.0}, 1)
        run = MlflowClient(tracker.uri).get_run(tracker.run_id)
        assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 1.0)
        assert not free.is_set()
    finally:
        free.set()
        shutil.rmtree(other)


def test_a_folder_with_nothing_left_is_not_opened_for_writing(runs):
    for thread in threading.enumerate():  # of trackers that other tests left, which may still be closing
        if thread.name in ("tracker", "leftovers"):
            thread.join(60)
    (path,) = runs.glob("digits-*")
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()} | {"": path.stat().st_mtime_ns}
    assert path not in sending.pending_runs(runs)
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} | {"": path.stat().st_mtime_ns} == before


def test_waiting_points_are_not_counted_at_every_metric(tmp_path, monkeypatch):
    outbox, counted = Outbox(tmp_path / OUTBOX, 10**6), []
    count = Outbox.num_pending.fget
    monkeypatch.setattr(Outbox, "num_pending", property(lambda outbox: counted.append(1) or count(outbox)))
    for step in range(100):
        outbox.add({"loss": 1.0}, step)
    assert not counted
    assert outbox.num_pending == 100


def test_points_are_kept_however_threads_add_and_send_them(tmp_path):
    outbox, ended = Outbox(tmp_path / OUTBOX, 100 * 600), threading.Event()

    def send() -> None:
        while not ended.is_set():
            outbox.mark_sent(outbox.pending_points(1000))

    with ThreadPoolExecutor(1) as other:
        other.submit(send)
        for step in range(3000):
            outbox.add({"loss": 1.0, "error": 0.5}, step)
            while outbox.num_pending > 300:
                time.sleep(0.001)
        ended.set()
    assert not outbox.has_dropped_points
    assert outbox._num_pending == outbox.num_pending
    assert len(outbox.history()["loss"]) == 3000


def test_a_closed_outbox_is_one_file_even_while_it_is_read(tmp_path):
    outbox = Outbox(tmp_path / OUTBOX, 10**6)
    with closing(sqlite3.connect(f"file:{tmp_path / OUTBOX}?mode=ro", uri=True)) as reader:
        reader.execute("select * from points").fetchall()
        outbox.add({"loss": 1.0}, 7)
        outbox.close()
    shutil.copy(tmp_path / OUTBOX, tmp_path / "copy.db")
    assert Outbox.history_of(tmp_path / "copy.db") == {"loss": [(7, 1.0)]}


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("sqlite:///a.db", "sqlite:///{}/a.db"),
        ("sqlite:////a.db", "sqlite:////a.db"),
        ("./runs", "{}/runs"),
        ("file:runs", "file://{}/runs"),
        ("file:///runs", "file:///runs"),
        ("http://there", "http://there"),
        ("databricks", "databricks"),
    ],
)
def test_where_a_run_is_tracked_is_an_absolute_place(uri, absolute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Tracking(uri=uri).uri == absolute.format(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri(Tracking(), tmp_path) == absolute.format(tmp_path)


@pytest.mark.parametrize("wrong", ["store", "experiment", "run"])
def test_a_store_that_refuses_a_run_does_so_before_the_run_has_a_folder(runs, ffdist_in, wrong, monkeypatch, tmp_path):
    before, client = sorted(runs.iterdir()), MlflowClient(default_uri(runs))
    if wrong == "store":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    elif wrong == "run":
        shutil.copy(runs / "mlflow.db", tmp_path)
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
            database.execute("create trigger full before insert on runs begin select raise(abort, 'no more runs'); end")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    else:
        client.delete_experiment(client.create_experiment(wrong))
    told = ffdist_in(runs.parent, "train", *SHORT, f"tracking.experiment={wrong}", code=2)
    assert "tracking at" in told
    assert [path for path in sorted(runs.iterdir()) if path not in before and path.name != "artifacts"] == []


def test_a_runs_folder_can_be_moved(runs, ffdist_in, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(runs, moved)
    (run,) = moved.glob("digits-*")
    run_id = Outbox.fact_of(run / OUTBOX, "run_id")
    shutil.move(runs, tmp_path / "hidden")
    try:
        assert "test error" in ffdist_in(tmp_path, "readout", run, "--runs", moved)
        ffdist_in(tmp_path, "train", *SHORT, "--runs", moved)
        assert not runs.exists()
        uri = default_uri(moved)
        (newest,) = set(moved.glob("digits-*")) - {run}
        for each in (run_id, Outbox.fact_of(newest / OUTBOX, "run_id")):
            assert "errors.png" in artifacts(uri, each)
            assert MlflowClient(uri).get_run(each).info.artifact_uri.startswith(moved.as_uri())
        assert "test/fitted_readout_error" in MlflowClient(uri).get_run(run_id).data.metrics
    finally:
        shutil.move(tmp_path / "hidden", runs)


def test_a_copy_of_a_runs_folder_keeps_its_own_artifacts_and_those_of_others_stay(runs, tmp_path):
    copy, other = tmp_path / "copy", tmp_path / "other" / "artifacts"
    shutil.copytree(runs, copy)
    (run,) = copy.glob("digits-*")
    client = MlflowClient(default_uri(copy))
    run_id = Outbox.fact_of(run / OUTBOX, "run_id")
    places = {}
    for name, is_there in (("there", True), ("on a disk that is not mounted", False)):
        place = other / name / "artifacts"
        if is_there:
            place.mkdir(parents=True)
        places[client.create_experiment(name, place.as_uri())] = place.as_uri()
    ours = client.create_experiment(
        "of a folder that was moved", (other / "gone" / "artifacts").as_uri(), TRAINING_VIEW
    )
    with Tracker(default_uri(copy), Tracking(experiment="there"), runs=copy) as tracker:
        tracker.begin(a_folder(copy, "elsewhere"), {})
        tracker.log_artifact(copy / "elsewhere" / "config.yaml")
    assert client.get_run(run_id).info.artifact_uri.startswith(copy.as_uri())
    assert client.get_experiment(ours).artifact_location == (copy / "artifacts").as_uri()
    assert {each: client.get_experiment(each).artifact_location for each in places} == places
    assert artifacts(default_uri(copy), tracker.run_id) == {"config.yaml"}
    assert list(other.glob("there/artifacts/*/artifacts/config.yaml"))


def test_a_figure_that_cannot_be_kept_is_told_in_one_line(runs, ffdist_in, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as database, database:
        words = "select raise(abort, 'attempt to write a readonly database')"
        database.execute(f"create trigger readonly before insert on metrics begin {words}; end")
    (run,) = (tmp_path / "runs").glob("digits-*")
    told = ffdist_in(tmp_path, "readout", run, code=2)
    (error,) = [line for line in told.splitlines() if line.startswith("Error: ")]
    assert "readonly database" in error
    assert "Traceback" not in told


def test_the_log_levels_of_other_packages_stay(runs):
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
    try:
        with a_tracker(runs) as tracker:
            tracker.begin(a_folder(runs, "levels"), {})
            assert tracker.run_id
        assert [logger.level for logger in loggers] == [logging.INFO] * 2
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def test_a_run_is_tracked_without_system_metrics(runs, monkeypatch):
    def SystemMonitor():
        raise ImportError("another MLflow has no such module")

    monkeypatch.setattr(module, "SystemMonitor", SystemMonitor)
    with a_tracker(runs) as tracker:
        tracker.begin(a_folder(runs, "no system"), {})
        tracker.log_metrics({"loss": 1.0}, 1)
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).data.metrics == {"loss": 1.0}


def test_the_ui_takes_the_next_free_port(runs, ffdist_in, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words))
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = ffdist_in(runs.parent, "ui", "--port", server.getsockname()[1])
        (used,) = [words[-1] for words in started]
        assert int(used) > server.getsockname()[1]
        assert f"http://127.0.0.1:{used}/" in told


def test_runs_of_others_in_an_experiment_are_left_out_of_the_table(runs, ffdist_in):
    client = MlflowClient(default_uri(runs))
    ours = client.get_run(Outbox.fact_of(next(runs.glob("digits-*")) / OUTBOX, "run_id")).data.params
    experiment_id = client.create_experiment("others")
    for params in (ours, {}, {"seed": "0", "runner": "ray"}, ours | {"model.layers": "open()"}):
        run_id = client.create_run(experiment_id, run_name=f"run {len(params)}").info.run_id
        client.log_metric(run_id, "test/readout_error", 0.2)
        client.log_batch(run_id, params=[Param(*param) for param in params.items()])
        client.set_terminated(run_id)
    told = ffdist_in(runs.parent, "results", "--experiment", "others")
    assert len(told.splitlines()) == 2
    assert "20.00%" in told
