"""Uploads that fail at first: which stay pending, which are rejected, and which command sends them later."""

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
from ffdist.tracking import sync as sync_module
from ffdist.tracking import tracker as tracker_module
from ffdist.tracking.outbox import OUTBOX, Outbox
from ffdist.tracking.server import TRAINING_VIEW, default_uri, tracking_uri
from ffdist.tracking.tracker import Tracker

SHORT = ["digits", "training.epochs=1", "model.layers=[9]", "training.validation_samples=100", "--runner", "serial"]
SHORT += ["tracking.flush_timeout_s=250"]  # other tests may keep the CPU busy


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ffdist_in):
    """A runs folder with one finished run."""
    folder = tmp_path_factory.mktemp("sync") / "runs"
    ffdist_in(folder.parent, "train", *SHORT)
    return folder


def make_tracker(runs, **settings) -> Tracker:
    return Tracker(default_uri(runs), Tracking(**settings), runs=runs)


def make_run_folder(runs, name):
    (runs / name).mkdir()
    (runs / name / "config.yaml").write_text("{}")
    return runs / name


def artifact_paths(uri, run_id, folder=None):
    return {file.path for file in MlflowClient(uri).list_artifacts(run_id, folder)}


def test_unavailable_artifact_store_delays_only_its_uploads(runs, ffdist_in, caplog):
    folder, store = make_run_folder(runs, "waiting"), runs / "artifacts"
    (folder / "a.txt").write_text("a")

    def plot(folder):
        (folder / "goodness").mkdir()
        (folder / "goodness" / "b.png").write_text("b")
        return folder / "goodness" / "b.png"

    store.rename(runs / "away")
    store.write_text("a disk that is not mounted")
    with make_tracker(runs, flush_timeout_s=1.0) as tracker:
        tracker.begin(folder, {})
        tracker.log_artifact(folder / "a.txt")
        tracker.draw(plot)
        tracker.log_artifact(folder / "missing.txt")
        tracker.log_tags({"kind": "test"})
        tracker.log_metrics({"loss": 1.0}, 1)
    assert "0 points and 2 other uploads wait" in caplog.text
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics, run.data.tags["kind"]) == ("FINISHED", {"loss": 1.0}, "test")
    output = ffdist_in(runs.parent, "sync", code=1)
    assert "2 other uploads wait" in output
    assert "missing.txt" in output
    assert "the file is missing" in output
    store.unlink()
    (runs / "away").rename(store)
    assert "everything is uploaded" in ffdist_in(runs.parent, "sync", folder)
    assert artifact_paths(tracker.uri, tracker.run_id) == {"a.txt", "goodness"}
    assert artifact_paths(tracker.uri, tracker.run_id, "goodness") == {"goodness/b.png"}
    assert "nothing is pending in runs" in ffdist_in(runs.parent, "sync")


def test_failing_upload_does_not_block_other_uploads(tmp_path):
    """For example, a proxy may reject large files: all other files are tried before a failed one is retried."""

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
            sync_module.send_calls(client, outbox, "", "")
    assert [path[-1] for path in client.taken] == ["b", "c"]
    assert [call.content for call in outbox.calls()] == ["large"]


def test_rejected_point_does_not_block_other_points(runs, caplog):
    folder = make_run_folder(runs, "bad point")
    with make_tracker(runs) as tracker:
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
        (TEMPORARILY_UNAVAILABLE, True),  # such as "database is locked" from SQLite
        (INTERNAL_ERROR, True),
        (UNAUTHENTICATED, True),
        (INVALID_PARAMETER_VALUE, False),
        (PERMISSION_DENIED, True),  # MLflow's code for every HTTP 403, even from a proxy
    ],
)
def test_only_permanent_errors_drop_uploads(tmp_path, code, is_kept):
    class Client:
        def log_batch(self, run_id, **kwargs):
            raise MlflowException("no", error_code=code)

        def get_run(self, run_id):
            return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"))

    outbox = Outbox(tmp_path / OUTBOX, 10**6)
    outbox.add({"loss": 1.0}, 1)
    outbox.add_call("parameters", {"seed": "0"})
    for send in (sync_module.send_points, partial(sync_module.send_calls, uri="")):
        with pytest.raises(MlflowException) if is_kept else nullcontext():
            send(Client(), outbox, "")
    assert (outbox.num_pending, outbox.num_calls, len(outbox.rejected())) == ((1, 1, 0) if is_kept else (0, 0, 2))


def test_concurrent_senders_create_no_duplicates(runs):
    folder, num_points = make_run_folder(runs, "leftovers"), 3000
    with make_tracker(runs) as tracker:
        tracker.begin(folder, {})
    with closing(Outbox(folder / OUTBOX, 10**6)) as outbox:
        for step in range(num_points):
            outbox.add({"loss": 1.0}, step)

    def send(_):
        try:
            return sync_module.send_run(MlflowClient(tracker.uri), folder, tracker.uri)[1]
        except Timeout:
            return "locked"

    with ThreadPoolExecutor(2) as threads:
        assert False in set(threads.map(send, range(2))) <= {False, "locked"}
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(num_points))


def test_folder_is_locked_while_its_uploads_are_sent(runs, monkeypatch):
    folder, release = make_run_folder(runs, "slow"), threading.Event()
    monkeypatch.setattr(sync_module, "send_calls", lambda *args, **kwargs: release.wait(60))
    with make_tracker(runs, flush_timeout_s=0.0) as tracker:
        tracker.begin(folder, {})
        assert tracker.run_id
    with pytest.raises(Timeout):
        FileLock(folder / sync_module.LOCK).acquire(timeout=0)
    release.set()
    FileLock(folder / sync_module.LOCK).acquire(timeout=60).lock.release()


def test_pending_uploads_of_other_runs_do_not_delay_a_run(runs, monkeypatch):
    other_folder, folder, release, start = (
        make_run_folder(runs, "other"),
        make_run_folder(runs, "own"),
        threading.Event(),
        threading.Event(),
    )
    with closing(Outbox(other_folder / OUTBOX, 10**6)) as outbox:
        outbox.set_facts(uri=default_uri(runs), run_id="some", left="KILLED")

    def send_run(*args):
        start.set()
        release.wait(60)

    monkeypatch.setattr(tracker_module, "LEFTOVERS_TIMEOUT_S", 0.1)
    monkeypatch.setattr(sync_module, "send_run", send_run)
    try:
        with make_tracker(runs) as tracker:
            tracker.begin(folder, {})
            assert start.wait(60)
            tracker.log_metrics({"loss": 1.0}, 1)
        run = MlflowClient(tracker.uri).get_run(tracker.run_id)
        assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 1.0)
        assert not release.is_set()
    finally:
        release.set()
        shutil.rmtree(other_folder)


def test_folder_without_pending_uploads_is_not_written(runs):
    for thread in threading.enumerate():  # trackers of other tests may still be closing
        if thread.name in ("tracker", "leftovers"):
            thread.join(60)
    (path,) = runs.glob("digits-*")
    mtimes = {file.name: file.stat().st_mtime_ns for file in path.iterdir()} | {"": path.stat().st_mtime_ns}
    assert path not in sync_module.pending_runs(runs)
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} | {"": path.stat().st_mtime_ns} == mtimes


def test_adding_points_does_not_count_pending_points(tmp_path, monkeypatch):
    outbox, calls = Outbox(tmp_path / OUTBOX, 10**6), []
    count = Outbox.num_pending.fget
    monkeypatch.setattr(Outbox, "num_pending", property(lambda outbox: calls.append(1) or count(outbox)))
    for step in range(100):
        outbox.add({"loss": 1.0}, step)
    assert not calls
    assert outbox.num_pending == 100


def test_concurrent_add_and_send_lose_no_points(tmp_path):
    outbox, stop = Outbox(tmp_path / OUTBOX, 100 * 600), threading.Event()

    def send() -> None:
        while not stop.is_set():
            outbox.mark_sent(outbox.pending_points(1000))

    with ThreadPoolExecutor(1) as executor:
        executor.submit(send)
        for step in range(3000):
            outbox.add({"loss": 1.0, "error": 0.5}, step)
            while outbox.num_pending > 300:
                time.sleep(0.001)
        stop.set()
    assert not outbox.has_dropped_points
    assert outbox._num_pending == outbox.num_pending
    assert len(outbox.history()["loss"]) == 3000


def test_closed_outbox_is_a_single_file_despite_an_open_reader(tmp_path):
    outbox = Outbox(tmp_path / OUTBOX, 10**6)
    with closing(sqlite3.connect(f"file:{tmp_path / OUTBOX}?mode=ro", uri=True)) as reader:
        reader.execute("select * from points").fetchall()
        outbox.add({"loss": 1.0}, 7)
        outbox.close()
    shutil.copy(tmp_path / OUTBOX, tmp_path / "copy.db")
    assert Outbox.history_of(tmp_path / "copy.db") == {"loss": [(7, 1.0)]}


@pytest.mark.parametrize(
    ("uri", "expected"),
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
def test_tracking_uri_is_made_absolute(uri, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Tracking(uri=uri).uri == expected.format(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri(Tracking(), tmp_path) == expected.format(tmp_path)


@pytest.mark.parametrize("cause", ["store", "experiment", "run"])
def test_run_refused_by_the_tracking_store_creates_no_folder(runs, ffdist_in, cause, monkeypatch, tmp_path):
    entries_before, client = sorted(runs.iterdir()), MlflowClient(default_uri(runs))
    if cause == "store":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    elif cause == "run":
        shutil.copy(runs / "mlflow.db", tmp_path)
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
            database.execute("create trigger full before insert on runs begin select raise(abort, 'no more runs'); end")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    else:
        client.delete_experiment(client.create_experiment(cause))
    output = ffdist_in(runs.parent, "train", *SHORT, f"tracking.experiment={cause}", code=2)
    assert "tracking at" in output
    assert [path for path in sorted(runs.iterdir()) if path not in entries_before and path.name != "artifacts"] == []


def test_runs_folder_can_be_moved(runs, ffdist_in, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(runs, moved)
    (run,) = moved.glob("digits-*")
    run_id = Outbox.fact_of(run / OUTBOX, "run_id")
    shutil.move(runs, tmp_path / "hidden")
    try:
        assert "test error" in ffdist_in(tmp_path, "fit-readout", run, "--runs", moved)
        ffdist_in(tmp_path, "train", *SHORT, "--runs", moved)
        assert not runs.exists()
        uri = default_uri(moved)
        (new_run,) = set(moved.glob("digits-*")) - {run}
        for tracked_id in (run_id, Outbox.fact_of(new_run / OUTBOX, "run_id")):
            assert "errors.png" in artifact_paths(uri, tracked_id)
            assert MlflowClient(uri).get_run(tracked_id).info.artifact_uri.startswith(moved.as_uri())
        assert "test/fitted_readout_error" in MlflowClient(uri).get_run(run_id).data.metrics
    finally:
        shutil.move(tmp_path / "hidden", runs)


def test_copied_runs_folder_uses_its_own_artifacts_and_keeps_other_locations(runs, tmp_path):
    copy, other_root = tmp_path / "copy", tmp_path / "other" / "artifacts"
    shutil.copytree(runs, copy)
    (run,) = copy.glob("digits-*")
    client = MlflowClient(default_uri(copy))
    run_id = Outbox.fact_of(run / OUTBOX, "run_id")
    locations = {}
    for name, exists in (("there", True), ("on a disk that is not mounted", False)):
        location = other_root / name / "artifacts"
        if exists:
            location.mkdir(parents=True)
        locations[client.create_experiment(name, location.as_uri())] = location.as_uri()
    moved_experiment = client.create_experiment(
        "of a folder that was moved", (other_root / "gone" / "artifacts").as_uri(), TRAINING_VIEW
    )
    with Tracker(default_uri(copy), Tracking(experiment="there"), runs=copy) as tracker:
        tracker.begin(make_run_folder(copy, "elsewhere"), {})
        tracker.log_artifact(copy / "elsewhere" / "config.yaml")
    assert client.get_run(run_id).info.artifact_uri.startswith(copy.as_uri())
    assert client.get_experiment(moved_experiment).artifact_location == (copy / "artifacts").as_uri()
    assert {
        experiment_id: client.get_experiment(experiment_id).artifact_location for experiment_id in locations
    } == locations
    assert artifact_paths(default_uri(copy), tracker.run_id) == {"config.yaml"}
    assert list(other_root.glob("there/artifacts/*/artifacts/config.yaml"))


def test_failure_to_log_a_metric_is_reported_in_one_line(runs, ffdist_in, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as database, database:
        action = "select raise(abort, 'attempt to write a readonly database')"
        database.execute(f"create trigger readonly before insert on metrics begin {action}; end")
    (run,) = (tmp_path / "runs").glob("digits-*")
    output = ffdist_in(tmp_path, "fit-readout", run, code=2)
    (error,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert "readonly database" in error
    assert "Traceback" not in output


def test_log_levels_of_other_packages_are_preserved(runs):
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels_before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
    try:
        with make_tracker(runs) as tracker:
            tracker.begin(make_run_folder(runs, "levels"), {})
            assert tracker.run_id
        assert [logger.level for logger in loggers] == [logging.INFO] * 2
    finally:
        for logger, level in zip(loggers, levels_before, strict=True):
            logger.setLevel(level)


def test_run_is_tracked_if_system_metrics_are_unavailable(runs, monkeypatch):
    def SystemMonitor():
        raise ImportError("another MLflow has no such module")

    monkeypatch.setattr(tracker_module, "SystemMonitor", SystemMonitor)
    with make_tracker(runs) as tracker:
        tracker.begin(make_run_folder(runs, "no system"), {})
        tracker.log_metrics({"loss": 1.0}, 1)
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).data.metrics == {"loss": 1.0}


def test_ui_uses_the_next_free_port(runs, ffdist_in, monkeypatch):
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, args: commands.append(args))
    with socket.create_server(("127.0.0.1", 0)) as server:
        output = ffdist_in(runs.parent, "ui", "--port", server.getsockname()[1])
        (port,) = [args[-1] for args in commands]
        assert int(port) > server.getsockname()[1]
        assert f"http://127.0.0.1:{port}/" in output


def test_results_exclude_runs_of_other_programs(runs, ffdist_in):
    client = MlflowClient(default_uri(runs))
    own_params = client.get_run(Outbox.fact_of(next(runs.glob("digits-*")) / OUTBOX, "run_id")).data.params
    experiment_id = client.create_experiment("others")
    for params in (own_params, {}, {"seed": "0", "runner": "ray"}, own_params | {"model.layers": "open()"}):
        run_id = client.create_run(experiment_id, run_name=f"run {len(params)}").info.run_id
        client.log_metric(run_id, "test/readout_error", 0.2)
        client.log_batch(run_id, params=[Param(*param) for param in params.items()])
        client.set_terminated(run_id)
    output = ffdist_in(runs.parent, "results", "--experiment", "others")
    assert len(output.splitlines()) == 2
    assert "20.00%" in output
