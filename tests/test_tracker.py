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
from ffdist.export.network import Names
from ffdist.ff.network import Network
from ffdist.tracking import tracker as tracker_module
from ffdist.tracking.outbox import OUTBOX, Outbox
from ffdist.tracking.server import check_server, default_uri, find_experiment, open_client, tracking_uri
from ffdist.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """Runs folder that the tests of this module share, because it takes seconds to create a database."""
    return tmp_path_factory.mktemp("runs")


def make_tracker(runs, uri=None) -> Tracker:
    return Tracker(uri or default_uri(runs), Tracking(), runs=runs)


def test_tracking_uri_prefers_configuration_over_environment_over_runs_folder(tmp_path, monkeypatch):
    assert tracking_uri(Tracking(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert tracking_uri(Tracking(), tmp_path) == "http://there"
    assert tracking_uri(Tracking(uri="http://here"), tmp_path) == "http://here"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@there")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI: a URI must hold no password") as error:
        tracking_uri(Tracking(), tmp_path)
    assert "hush" not in str(error.value)


def test_experiment_is_that_of_the_setting_or_the_environment(shared_runs, tmp_path, monkeypatch):
    client = MlflowClient(default_uri(shared_runs))
    with make_tracker(shared_runs):  # creates the database
        pass
    by_id = client.create_experiment("by id")
    for variables, setting, expected in (
        ({}, None, "ffdist"),
        ({"MLFLOW_EXPERIMENT_ID": by_id}, None, "by id"),
        ({"MLFLOW_EXPERIMENT_ID": by_id, "MLFLOW_EXPERIMENT_NAME": "by name"}, None, "by name"),
        ({"MLFLOW_EXPERIMENT_ID": by_id, "MLFLOW_EXPERIMENT_NAME": "by name"}, "by setting", "by setting"),
    ):
        for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        (tmp_path / expected).mkdir()
        with Tracker(default_uri(shared_runs), Tracking(experiment=setting), runs=shared_runs) as tracker:
            tracker.begin(tmp_path / expected, {})
        experiment_id = client.get_run(tracker.run_id).info.experiment_id
        assert client.get_experiment(experiment_id).name == expected == tracker.experiment
        with open_client(tracker.uri) as open_:
            assert find_experiment(open_, tracker.uri, setting).name == expected
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "987654")
    (tmp_path / "none").mkdir()
    with make_tracker(shared_runs) as tracker, pytest.raises(ConfigError, match=r"MLFLOW_EXPERIMENT_ID.*987654"):
        tracker.begin(tmp_path / "none", {})


def test_run_of_the_environment_is_continued_once(shared_runs, tmp_path, monkeypatch):
    """`mlflow run` and Databricks jobs set MLFLOW_RUN_ID. MLflow removes it, too, when it is used."""
    with make_tracker(shared_runs):  # creates the database
        pass
    client = MlflowClient(default_uri(shared_runs))
    given = client.create_run(client.create_experiment("of the job"), tags={"job": "7"}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    for number, is_given in ((1, True), (2, False)):
        (tmp_path / str(number)).mkdir()
        settings = Tracking(experiment="another")  # the run is in an experiment already
        with Tracker(default_uri(shared_runs), settings, runs=shared_runs) as tracker:
            tracker.begin(tmp_path / str(number), {"seed": number})
            tracker.log_metrics({"loss": 0.5}, 3)
        assert (tracker.run_id == given) == is_given
        assert tracker.experiment == ("of the job" if is_given else "another")
    run = client.get_run(given)
    assert (run.info.status, run.data.params["seed"], run.data.metrics["loss"]) == ("FINISHED", "1", 0.5)
    assert run.data.tags["job"] == "7"
    for run_id, problem in ((given, "finished"), ("0" * 32, "not found")):
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        (tmp_path / problem).mkdir()
        with (
            make_tracker(shared_runs) as tracker,
            pytest.raises(ConfigError, match=rf"MLFLOW_RUN_ID.*a run that has not ended.*{problem}.*unset it"),
        ):
            tracker.begin(tmp_path / problem, {})
    monkeypatch.setenv("MLFLOW_RUN_ID", given)  # the job is started again, and resumes its run
    with Tracker(default_uri(shared_runs), settings, runs=shared_runs, is_new=False) as tracker:
        tracker.resume(tmp_path / "1", given)
    assert (tracker.run_id, tracker.experiment) == (given, "of the job")
    assert "MLFLOW_RUN_ID" not in os.environ


def test_runs_in_an_active_run_are_nested_under_it(tmp_path):
    """As in a notebook that tries several values."""
    program = (
        "import mlflow, sys\nfrom ffdist import train\n"
        "mlflow.set_tracking_uri('sqlite:///' + sys.argv[1] + '/store.db'); mlflow.set_experiment('sweep')\n"
        "with mlflow.start_run() as parent:\n"
        "    for seed in (1, 2):\n"
        "        tracking = {'artifacts': [], 'name': f'seed {seed}', 'tags': {'fold': seed}}\n"
        "        config = {'seed': seed, 'data': {'name': 'xor', 'label': 'append'}, 'model': {'layers': [8]},\n"
        "                  'training': {'epochs': 1}, 'tracking': tracking}\n"
        "        run = train(config, runner='serial', runs=sys.argv[1] + '/runs')\n"
        "print(parent.info.run_id)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=True)
    parent = process.stdout.split()[-1]  # MLflow keeps the artifacts of its experiments in the working folder
    client = MlflowClient(f"sqlite:///{tmp_path}/store.db")
    experiment = client.get_experiment_by_name("sweep")
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert {run.info.run_name for run in children} == {"seed 1", "seed 2"}
    assert {run.data.tags["fold"] for run in children} == {"1", "2"}
    assert client.get_run(parent).info.status == "FINISHED"
    assert client.get_experiment_by_name("ffdist") is None
    assert {path.name[:7] for path in (tmp_path / "runs").glob("seed*")} == {"seed 1-", "seed 2-"}


def test_everything_logged_arrives_once_and_in_order(shared_runs, tmp_path):
    (tmp_path / "note.txt").write_text("a note")
    with make_tracker(shared_runs) as tracker:
        tracker.begin(tmp_path, {"seed": 3})
        for step in range(2500):  # more than fit into one request
            tracker.log_metrics({"loss": step / 2}, step)
        tracker.log_artifact(tmp_path / "note.txt")
        tracker.log_tags({"kind": "test"})
    client = MlflowClient(tracker.uri)
    history = client.get_metric_history(tracker.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(step, step / 2) for step in range(2500)]
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.params, run.data.tags["kind"]) == ("FINISHED", {"seed": "3"}, "test")
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["note.txt"]


def test_rejected_upload_is_reported_and_does_not_stay_pending(shared_runs, tmp_path, caplog):
    with make_tracker(shared_runs) as tracker:
        tracker.begin(tmp_path, {})
        tracker.log_artifact(tmp_path / "nothing.txt")
    assert "not everything was tracked" in caplog.text
    assert "uploads wait" not in caplog.text
    assert Outbox.fact_of(tmp_path / OUTBOX, "left") == ""
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")])
def test_run_that_ends_early_is_marked_as_killed_or_failed(shared_runs, error, status, tmp_path):
    with pytest.raises(error), make_tracker(shared_runs) as tracker:  # noqa: PT012
        tracker.begin(tmp_path, {})
        tracker.log_metrics({"loss": 1.0}, 1)
        raise error
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == (status, {"loss": 1.0})


def test_unreachable_server_is_refused_immediately(tmp_path):
    with pytest.raises(ConfigError, match=r"tracking at http://127\.0\.0\.1:9 is not possible"):
        make_tracker(tmp_path, "http://127.0.0.1:9")


def test_rejected_upload_does_not_block_metrics(shared_runs, tmp_path, caplog):
    with make_tracker(shared_runs) as tracker:
        tracker.begin(tmp_path, {})
        tracker.log_artifact(tmp_path / "missing.txt")
        tracker.log_metrics({"loss": 1.0}, 1)
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert "missing.txt" in caplog.text


def test_deleted_experiment_is_refused_and_nothing_is_written(shared_runs, tmp_path):
    client, settings = MlflowClient(default_uri(shared_runs)), Tracking(experiment="deleted")
    client.delete_experiment(client.create_experiment(settings.experiment))
    with (
        Tracker(default_uri(shared_runs), settings, runs=shared_runs) as tracker,
        pytest.raises(ConfigError, match=r"not possible.*active"),
    ):
        tracker.begin(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_killed_database_creation_leaves_no_broken_database(tmp_path):
    """MLflow's migrations take seconds. If they are killed, the incomplete database must not break later runs."""
    program = (
        "from ffdist.config.sections import Tracking; from ffdist.tracking.server import default_uri\n"
        "from ffdist.tracking.tracker import Tracker\n"
        f"import pathlib; runs = pathlib.Path({str(tmp_path)!r})\n"
        "with Tracker(default_uri(runs), Tracking(), runs=runs) as tracker: tracker.begin(runs, {})"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    incomplete_database = tmp_path / ".mlflow.db.part"
    while not (incomplete_database.is_file() and incomplete_database.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.wait()
    with make_tracker(tmp_path) as tracker:
        tracker.begin(tmp_path, {})
    assert MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_run_refused_before_it_begins_creates_no_mlflow_run(shared_runs):
    num_runs = len(MlflowClient(default_uri(shared_runs)).search_runs(["1"]))
    with pytest.raises(ConfigError), make_tracker(shared_runs):
        raise ConfigError("refused")
    assert len(MlflowClient(default_uri(shared_runs)).search_runs(["1"])) == num_runs


def test_server_outage_does_not_delay_logging_and_uploads_follow_after_restart(
    shared_runs, free_port, monkeypatch, caplog, ffdist_in, tmp_path
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, folder, store = f"http://127.0.0.1:{free_port}", shared_runs / "a run", tmp_path / "store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    options = ["--backend-store-uri", default_uri(shared_runs), "--port", str(free_port), "--workers", "1"]
    options += ["--artifacts-destination", str(store)]
    command = [sys.executable, "-m", "mlflow", "server", *options]
    servers = [subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)]
    try:
        wait_for(f"{uri}/health")
        settings = Tracking(
            flush_timeout_s=2.0, experiment="by the server", register="a name"
        )  # the server stores its artifacts
        with Tracker(uri, settings, runs=shared_runs) as tracker:
            tracker.begin(folder, {})
            assert tracker.run_id
            os.killpg(servers[0].pid, signal.SIGKILL)
            for step in range(1000):  # none of these calls waits for the server; otherwise the test would time out
                tracker.log_metrics({"loss": 1.0}, step)
            (folder / "a picture.png").write_bytes(b"of something")
            tracker.log_artifact(folder / "a picture.png")
            tracker.log_tags({"kind": "test"})
            network = Network(image_architecture((1, 2, 2), 3, (5, 4)))
            example = torch.zeros(4, dtype=torch.uint8)
            tracker.log_model(network, Names(), example, checkpoint="0001-000000", step=7, evaluations={})
        assert f"not everything was tracked at {uri}" in caplog.text
        assert f"`ffdist sync '{folder}'`" in caplog.text
        servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True))
        wait_for(f"{uri}/health")
        store.write_text("a disk that is not mounted")
        output = ffdist_in(shared_runs, "sync", "--runs", shared_runs, code=1)
        assert f"{folder}: 0 points and 3 other uploads wait" in output
        assert MlflowClient(uri).get_run(tracker.run_id).info.status == "FINISHED"
        store.unlink()
        assert f"{folder}: everything is uploaded" in ffdist_in(shared_runs, "sync", "--runs", shared_runs)
        client = MlflowClient(uri)
        assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["a picture.png"]
        (version,) = client.search_model_versions("name = 'a name'")
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        assert (version.run_id, model.source_run_id, model.status) == (tracker.run_id, tracker.run_id, "READY")
        assert not (folder / "network").exists()
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGKILL)
    client = MlflowClient(default_uri(shared_runs))
    history = client.get_metric_history(tracker.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(1000))
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["kind"]) == ("FINISHED", "test")


def test_next_run_marks_a_killed_run_as_killed(shared_runs):
    program = (
        "from ffdist.config.sections import Tracking; from ffdist.tracking.server import default_uri\n"
        "from ffdist.tracking.tracker import Tracker\n"
        f"import os, pathlib, signal; runs = pathlib.Path({str(shared_runs)!r}); (runs / 'killed').mkdir()\n"
        "with Tracker(default_uri(runs), Tracking(), runs=runs) as tracker:\n"
        "    tracker.begin(runs / 'killed', {}); tracker.run_id; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], check=False, timeout=100)
    run_id, client = Outbox.fact_of(shared_runs / "killed" / OUTBOX, "run_id"), MlflowClient(default_uri(shared_runs))
    assert client.get_run(run_id).info.status == "RUNNING"
    (shared_runs / "next").mkdir()
    with make_tracker(shared_runs) as tracker:
        tracker.begin(shared_runs / "next", {})
    assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(("code", "is_reachable"), [(200, True), (401, True), (404, True), (503, False)])
def test_server_is_reachable_unless_the_response_is_503(code, is_reachable, free_port):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", free_port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with nullcontext() if is_reachable else pytest.raises(ConfigError, match="503"):
            check_server(f"http://127.0.0.1:{free_port}")
        server.shutdown()


def test_resume_without_an_outbox_restores_points_from_the_server(shared_runs, tmp_path):
    """After the loss of the node's disk, repeated points have new timestamps, but must not be stored twice."""
    with make_tracker(shared_runs) as tracker:
        tracker.begin(tmp_path, {})
        tracker.log_metrics({"loss": 2.0}, 1)
        tracker.log_metrics({"loss": 1.0}, 2)
    (tmp_path / OUTBOX).unlink()
    with make_tracker(shared_runs) as resumed_tracker:
        resumed_tracker.resume(tmp_path, tracker.run_id)
        resumed_tracker.log_metrics({"loss": 1.0}, 2)
        resumed_tracker.log_metrics({"loss": 0.5}, 3)
        assert resumed_tracker.history() == {"loss": [(1, 2.0), (2, 1.0), (3, 0.5)]}
    history = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 2.0), (2, 1.0), (3, 0.5)]


def test_run_folder_is_locked_by_one_process(shared_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(tracker_module, "LOCK_TIMEOUT_S", 0.1)
    with make_tracker(shared_runs) as tracker, make_tracker(shared_runs) as other_tracker:
        tracker.begin(tmp_path, {})
        with pytest.raises(ConfigError, match="is being trained by another process"):
            other_tracker.resume(tmp_path, tracker.run_id)


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
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.read().decode()
        except OSError:
            assert time.monotonic() < deadline, f"{url} did not answer"
            time.sleep(0.5)
