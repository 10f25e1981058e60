import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import image_architecture
from mlflow import MlflowClient

from ffdist.config.sections import Tracking
from ffdist.errors import ConfigError
from ffdist.ff.network import Network
from ffdist.tracking import tracker as module
from ffdist.tracking.outbox import OUTBOX, Outbox
from ffdist.tracking.server import check_server, default_uri, tracking_uri
from ffdist.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A fresh database takes seconds to make; runs of this module share one."""
    return tmp_path_factory.mktemp("runs")


def a_tracker(runs, uri=None) -> Tracker:
    return Tracker(uri or default_uri(runs), Tracking(), runs=runs)


def test_configuration_wins_over_environment_wins_over_runs_folder(tmp_path, monkeypatch):
    assert tracking_uri(Tracking(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert tracking_uri(Tracking(), tmp_path) == "http://there"
    assert tracking_uri(Tracking(uri="http://here"), tmp_path) == "http://here"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@there")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI: a URI must hold no password") as refused:
        tracking_uri(Tracking(), tmp_path)
    assert "hush" not in str(refused.value)


def test_everything_logged_arrives_once_and_in_order(template, tmp_path):
    (tmp_path / "note.txt").write_text("a note")
    with a_tracker(template) as tracker:
        tracker.begin(tmp_path, {"seed": 3})
        for step in range(2500):  # more than one request holds
            tracker.log_metrics({"loss": step / 2}, step)
        tracker.log_artifact(tmp_path / "note.txt")
        tracker.log_tags({"kind": "test"})
    client = MlflowClient(tracker.uri)
    history = client.get_metric_history(tracker.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(step, step / 2) for step in range(2500)]
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.params, run.data.tags["kind"]) == ("FINISHED", {"seed": "3"}, "test")
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["note.txt"]


def test_what_the_store_refuses_is_told_and_nothing_is_said_to_wait(template, tmp_path, caplog):
    with a_tracker(template) as tracker:
        tracker.begin(tmp_path, {})
        tracker.log_artifact(tmp_path / "nothing.txt")
    assert "not everything was tracked" in caplog.text
    assert "uploads wait" not in caplog.text
    assert Outbox.fact_of(tmp_path / OUTBOX, "left") == ""
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")])
def test_a_run_that_ends_early_is_marked_so(template, error, status, tmp_path):
    with pytest.raises(error), a_tracker(template) as tracker:  # noqa: PT012
        tracker.begin(tmp_path, {})
        tracker.log_metrics({"loss": 1.0}, 1)
        raise error
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == (status, {"loss": 1.0})


def test_a_server_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"tracking at http://127\.0\.0\.1:9 is not possible"):
        a_tracker(tmp_path, "http://127.0.0.1:9")


def test_what_the_store_refuses_holds_nothing_up(template, tmp_path, caplog):
    with a_tracker(template) as tracker:
        tracker.begin(tmp_path, {})
        tracker.log_artifact(tmp_path / "missing.txt")
        tracker.log_metrics({"loss": 1.0}, 1)
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert "missing.txt" in caplog.text


def test_a_deleted_experiment_is_told_and_nothing_is_written(template, tmp_path):
    client, settings = MlflowClient(default_uri(template)), Tracking(experiment="deleted")
    client.delete_experiment(client.create_experiment(settings.experiment))
    with (
        Tracker(default_uri(template), settings, runs=template) as tracker,
        pytest.raises(ConfigError, match=r"not possible.*active"),
    ):
        tracker.begin(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_the_database_is_made_leaves_none_that_is_broken(tmp_path):
    """Killed among MLflow's migrations, a database half made kept every later run from starting."""
    program = (
        "from ffdist.config.sections import Tracking; from ffdist.tracking.server import default_uri\n"
        "from ffdist.tracking.tracker import Tracker\n"
        f"import pathlib; runs = pathlib.Path({str(tmp_path)!r})\n"
        "with Tracker(default_uri(runs), Tracking(), runs=runs) as tracker: tracker.begin(runs, {})"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    part = tmp_path / ".mlflow.db.part"
    while not (part.is_file() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.wait()
    with a_tracker(tmp_path) as tracker:
        tracker.begin(tmp_path, {})
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_run_that_is_refused_before_it_begins_leaves_no_trace(template):
    before = len(MlflowClient(default_uri(template)).search_runs(["1"]))
    with pytest.raises(ConfigError), a_tracker(template):
        raise ConfigError("refused")
    assert len(MlflowClient(default_uri(template)).search_runs(["1"])) == before


def test_a_server_that_goes_away_slows_nothing_and_gets_the_rest_when_it_is_back(
    template, free_port, monkeypatch, caplog, ffdist_in, tmp_path
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, folder, store = f"http://127.0.0.1:{free_port}", template / "a run", tmp_path / "store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder.mkdir()
    options = ["--backend-store-uri", default_uri(template), "--port", str(free_port), "--workers", "1"]
    options += ["--artifacts-destination", str(store)]
    command = [sys.executable, "-m", "mlflow", "server", *options]
    servers = [subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)]
    try:
        wait_for(f"{uri}/health")
        settings = Tracking(flush_timeout_s=2.0, experiment="by the server")  # whose artifacts the server keeps
        with Tracker(uri, settings, runs=template) as tracker:
            tracker.begin(folder, {})
            assert tracker.run_id
            os.killpg(servers[0].pid, signal.SIGKILL)
            for step in range(1000):  # none of these waits for the server; pytest's own limit would tell
                tracker.log_metrics({"loss": 1.0}, step)
            (folder / "a picture.png").write_bytes(b"of something")
            tracker.log_artifact(folder / "a picture.png")
            tracker.log_tags({"kind": "test"})
            network = Network(image_architecture((1, 2, 2), 3, (5, 4)))
            tracker.log_model(network, (), torch.zeros(4, dtype=torch.uint8), "a name")
        assert f"not everything was tracked at {uri}" in caplog.text
        assert f"`ffdist sync '{folder}'`" in caplog.text
        servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True))
        wait_for(f"{uri}/health")
        store.write_text("a disk that is not mounted")
        told = ffdist_in(template, "sync", "--runs", template, code=1)
        assert f"{folder}: 0 points and 3 other uploads wait" in told
        assert MlflowClient(uri).get_run(tracker.run_id).info.status == "FINISHED"
        store.unlink()
        assert f"{folder}: everything is uploaded" in ffdist_in(template, "sync", "--runs", template)
        client = MlflowClient(uri)
        assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["a picture.png"]
        (version,) = client.search_model_versions("name = 'a name'")
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        assert (version.run_id, model.source_run_id, model.status) == (tracker.run_id, tracker.run_id, "READY")
        assert not (folder / "network").exists()
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGKILL)
    client = MlflowClient(default_uri(template))
    history = client.get_metric_history(tracker.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(1000))
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["kind"]) == ("FINISHED", "test")


def test_a_run_whose_driver_was_killed_is_marked_by_the_next(template):
    program = (
        "from ffdist.config.sections import Tracking; from ffdist.tracking.server import default_uri\n"
        "from ffdist.tracking.tracker import Tracker\n"
        f"import os, pathlib, signal; runs = pathlib.Path({str(template)!r}); (runs / 'killed').mkdir()\n"
        "with Tracker(default_uri(runs), Tracking(), runs=runs) as tracker:\n"
        "    tracker.begin(runs / 'killed', {}); tracker.run_id; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], check=False, timeout=100)
    run_id, client = Outbox.fact_of(template / "killed" / OUTBOX, "run_id"), MlflowClient(default_uri(template))
    assert client.get_run(run_id).info.status == "RUNNING"
    (template / "next").mkdir()
    with a_tracker(template) as tracker:
        tracker.begin(template / "next", {})
    assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(("code", "is_there"), [(200, True), (401, True), (404, True), (503, False)])
def test_a_server_is_there_unless_another_says_that_it_is_not(code, is_there, free_port):
    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", free_port), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with nullcontext() if is_there else pytest.raises(ConfigError, match="503"):
            check_server(f"http://127.0.0.1:{free_port}")
        server.shutdown()


def test_a_run_goes_on_with_what_the_server_has_even_without_its_outbox(template, tmp_path):
    """The node's disk is gone: what comes again has other times, and must not stand there twice."""
    with a_tracker(template) as tracker:
        tracker.begin(tmp_path, {})
        tracker.log_metrics({"loss": 2.0}, 1)
        tracker.log_metrics({"loss": 1.0}, 2)
    (tmp_path / OUTBOX).unlink()
    with a_tracker(template) as again:
        again.resume(tmp_path, tracker.run_id)
        again.log_metrics({"loss": 1.0}, 2)
        again.log_metrics({"loss": 0.5}, 3)
        assert again.history() == {"loss": [(1, 2.0), (2, 1.0), (3, 0.5)]}
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 2.0), (2, 1.0), (3, 0.5)]


def test_a_folder_belongs_to_one_process(template, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.1)
    with a_tracker(template) as tracker, a_tracker(template) as other:
        tracker.begin(tmp_path, {})
        with pytest.raises(ConfigError, match="is being trained by another process"):
            other.resume(tmp_path, tracker.run_id)


def test_a_full_outbox_keeps_every_other_point(tmp_path):
    outbox = Outbox(tmp_path / OUTBOX, limit_bytes=100 * 100)
    for step in range(300):
        outbox.add({"loss": step / 2, "error": 0.1}, step)
    assert outbox.has_dropped_points
    assert outbox.num_pending <= 100
    steps = [step for step, _ in outbox.history()["loss"]]
    assert (steps[0], steps[-1]) == (0, 299)
    assert all(value == step / 2 for step, value in outbox.history()["loss"])


def wait_for(url: str, timeout_s: float = 90) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            assert time.monotonic() < deadline, f"{url} did not answer"
            time.sleep(0.5)
