"""The command line, run in a separate process where that matters."""

import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from ffdist.cli import main
from ffdist.cli.options import check_writable, load
from ffdist.config.loading import load_config
from ffdist.errors import ConfigError

SHORT = ["training.epochs=2", "model.layers=[30,20]"]
SERIAL = ["--runner", "serial"]


def run_ffdist(*arguments, cwd, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ffdist.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200, **options)


def read_summary(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory) -> Path:
    """Folder with a finished serial run and a finished Ray run, both short and with validation."""
    folder = tmp_path_factory.mktemp("finished")
    overrides = ["training.validation_samples=200", "training.validate_every_epochs=1", "pipeline.chunk_size=7"]
    overrides.append("training.learning_rate=0")  # so that the first checkpoint is the best by goodness
    for runner in ("serial", "ray"):
        options = ["--runner", runner, "--summary", f"{runner}.json"]
        process = run_ffdist("train", *options, "digits", *overrides, *SHORT, cwd=folder)
        assert process.returncode == 0, process.stderr
        (folder / f"{runner}.log").write_text(process.stdout)
    return folder


def test_serial_and_ray_runs_have_equal_results(finished_runs):
    serial, ray = read_summary(finished_runs / "serial.json"), read_summary(finished_runs / "ray.json")
    assert serial["checkpoint"] == "0001-000000"  # the best one, which both load before testing
    for key in (
        "checkpoint",
        "weights_sha256",
        "test_goodness_error",
        "test_readout_error",
        "layer_errors",
        "epochs",
    ):
        assert serial[key] == ray[key]
    assert (serial["runner"], ray["runner"]) == ("serial", "ray")
    assert serial["stages"] == ray["stages"] == 2
    assert 0 < ray["train_s"] < ray["wall_s"]


def test_train_prints_where_its_results_are(finished_runs):
    summary, log = read_summary(finished_runs / "ray.json"), (finished_runs / "ray.log").read_text()
    for text in (
        summary["weights_sha256"],
        summary["mlflow_run_id"],
        summary["mlflow_tracking_uri"],
        "ffdist ui",
        f"checkpoint      {summary['checkpoint']} (best on validation)",
    ):
        assert text in log
    folder = next(line for line in log.splitlines() if line.startswith("run  ")).split()[1]
    assert load_config(str(finished_runs / folder / "config.yaml")).training.epochs == 2
    assert len(list((finished_runs / folder / "checkpoints").glob("*/manifest.json"))) in (1, 2)


def test_mlflow_has_all_metrics_and_artifacts_of_both_runners(finished_runs):
    names = {"loss", "goodness_positive", "goodness_negative", "pairwise_error", "active_fraction", "weight_rms"}
    histories = {}
    for runner in ("serial", "ray"):
        summary = read_summary(finished_runs / f"{runner}.json")
        client = MlflowClient(summary["mlflow_tracking_uri"])
        run = client.get_run(summary["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.params["model.layers"] == "[30, 20]"
        assert run.data.tags["weights_sha256"] == summary["weights_sha256"]
        metrics = {f"layer_{layer}/{name}" for layer in (1, 2) for name in names} | {"readout/loss", "readout/error"}
        errors = {
            f"{split}/{predictor}_error"
            for split in ("validation", "test")
            for predictor in ("goodness", "readout", "layer_1", "balanced")
        }
        errors |= {f"test/class_{label}_error" for label in range(10)}
        times = {f"stage_{stage}/{name}" for stage in (1, 2) for name in ("compute_s", "wait_s", "busy_fraction")}
        assert metrics | errors | times | {"samples_per_s"} <= set(run.data.metrics)
        histories[runner] = {
            name: [(point.step, point.value) for point in client.get_metric_history(summary["mlflow_run_id"], name)]
            for name in metrics | errors
        }
        files = {file.path for file in client.list_artifacts(summary["mlflow_run_id"])}
        plots = {"layers", "negatives", "goodness", "samples", "errors", "errors_over_time", "fields", "confusion"}
        plots |= {"timeline"}
        assert files == {"config.yaml", "timeline.json", "goodness", *(f"{plot}.png" for plot in plots)}
        goodness_plots = {file.path for file in client.list_artifacts(summary["mlflow_run_id"], "goodness")}
        assert "goodness/epoch_0002.png" in goodness_plots  # the newest of the plots that wait for upload
        assert run.data.tags["mlflow.note.content"].startswith(
            f"test error {summary['test_goodness_error']:.2%} by good"
        )
        contexts = {each.dataset.name: each.tags[0].value for each in run.inputs.dataset_inputs}
        assert len(run.inputs.dataset_inputs) == 3, contexts
        assert len(run.outputs.model_outputs) == 1
        assert run.data.tags["cluster"].startswith("nodes: 1, CPUs: ")
    assert histories["serial"] == histories["ray"]
    assert len(histories["ray"]["validation/goodness_error"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digit"], "did you mean digits"),
        (["train"], "expected exactly one CONFIG (given: none)"),
        (["train", "digits", "mnist"], "(given: digits mnist)"),
        (["train", "digits", "training.epoch=3"], "did you mean training.epochs"),
        (["train", "digits", "training.batch_size=5000"], "batch_size: 5000, training samples: 1437"),
        (["train", "digits", "pipeline.stages=4"], "stages: 4, layers: 3"),
        (["train", "digits", "pipeline.device=cuda"], "needs at least one GPU"),
        (
            ["train", "digits", "pipeline.chunk_size=28", "pipeline.max_in_flight=1000000"],
            "may fill at most half of Ray's object store",
        ),
        (
            ["train", "digits", "tracking.uri=http://127.0.0.1:9", *SERIAL],
            "tracking at http://127.0.0.1:9 is not possible",
        ),
        (
            ["train", "digits", "tracking.uri=sqlite:////proc/all.db", *SERIAL],
            "tracking at sqlite:////proc/all.db is not possible",
        ),
        (["train", "digits", "--address", "127.0.0.1:9"], "no Ray cluster answers at 127.0.0.1:9"),
        (["train", "digits", "--summary", "nowhere/file.json"], "--summary must be a file that can be written"),
        (["train", "digits", "--runs", "/proc/runs", *SERIAL], "the folder /proc/runs cannot be written"),
        (["train", "digits", "data.name=parquet", "data.path=nowhere", *SERIAL], "must hold train*.parquet"),
        (["train", "digits", "--runs", "a%20b", *SERIAL], "must not contain ? or escapes such as %20"),
        (["resume", "", *SERIAL], "RUN must be the folder of a run, the MLflow run id of"),
        (["train", "digits", "checkpoint.uri=nowhere://x", *SERIAL], "nowhere://x cannot be opened"),
        (["train", "digits", "checkpoint.uri=s3://", *SERIAL], "cannot be written"),
        (["train", "digits", f"model.layers={[0] * 200}", *SERIAL], "units must be a whole number from 1 to"),
        (["train", "x" * 300], "CONFIG must be a YAML file or the name of a shipped one"),
        (["ui"], "holds no tracked run"),
        (["train", "digits", "negatives.kind=hybird", *SERIAL], "negatives.kind=hybird: is none of wrong_label, fixed"),
        (["negatives", "make", "digits"], "give negatives.store=FOLDER"),
        (["negatives", "show", "nowhere"], "nowhere holds no negatives"),
        (["bench", "step", "--device", "cuda"], "--device: cuda needs a GPU that torch can use"),
        (["bench", "step", "--device", "mps"], "a step is measured on cpu or cuda"),
        (["bench", "pipeline"], "for example: main bench pipeline digits"),
        (["fit-readout", "nowhere"], "RUN must be the folder of a run, the MLflow run id of a run in runs"),
    ],
)
def test_invalid_input_exits_with_code_2_and_a_one_line_error(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)  # in this process, which has already imported everything
    assert isinstance(result.exception, SystemExit), result.output
    assert result.exit_code == 2
    (line,) = result.output.strip().splitlines()
    assert message in line
    assert line.startswith("Error: ")
    assert not list(tmp_path.glob("runs/digits-*"))


def test_config_path_may_contain_an_equals_sign(tmp_path):
    (tmp_path / "lr=0.1.yaml").write_text("data: {name: digits}\nmodel: {layers: [9]}\n")
    config, name = load((str(tmp_path / "lr=0.1.yaml"), "training.epochs=3"))
    assert (config.training.epochs, name) == (3, "lr=0.1")


def test_check_writable_leaves_links_and_pipes_unchanged(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "later.json")
    check_writable("--summary", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "later.json").exists()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="--summary must be a file that can be written"):
        check_writable("--summary", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    check_writable("--summary", tmp_path / "pipe")  # does not block until the pipe has a reader


def test_simulated_chaos_rejects_options_that_it_does_not_use(ffdist, tmp_path):
    assert "--simulated trains nothing and takes no CONFIG (given: mnist)" in ffdist(
        "chaos", "mnist", "--simulated", "3", code=2
    )
    output = ffdist("chaos", "--simulated", "2", "--kind", "stage", "--faults", "3", "--minutes", "1", code=2)
    assert "(given: --faults, --kind, --minutes)" in output
    ffdist("chaos", "--simulated", "3", "--seed", "1", "--json", "found.json")
    assert read_summary(tmp_path / "found.json")["schedules"] == 3


def test_run_finishes_after_its_output_pipe_is_closed(tmp_path):
    command = [sys.executable, "-u", "-m", "ffdist.cli", "train", "digits", "training.epochs=2", *SERIAL]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert list(tmp_path.glob("runs/digits-*/summary.json"))


def test_error_in_a_separate_process_has_no_traceback(tmp_path):
    process = run_ffdist("train", "digits", "pipeline.stages=4", cwd=tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    assert "every stage needs a layer" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.fixture(scope="module")
def unsupervised_runs(tmp_path_factory, ffdist_in) -> Path:
    """Folder with a store of negatives, and two runs without labels: only `stored` uses the store."""
    folder = tmp_path_factory.mktemp("unsupervised")
    settings = ["digits", "data.label=none", "negatives.kind=hybrid", "training.epochs=2", "model.layers=[40,30]"]
    settings += ["tracking.artifacts=[]"]
    ffdist_in(folder, "negatives", "make", *settings, "negatives.store=made")
    for name, options in (("drawn", []), ("stored", ["negatives.store=made"])):
        output = ffdist_in(folder, "train", *SERIAL, "--summary", f"{name}.json", *settings, *options)
        (folder / f"{name}.log").write_text(output)
    return folder


def test_training_from_stored_negatives_gives_the_same_weights(unsupervised_runs):
    online, offline = read_summary(unsupervised_runs / "drawn.json"), read_summary(unsupervised_runs / "stored.json")
    assert online["weights_sha256"] == offline["weights_sha256"]


def test_run_without_labels_has_no_goodness_error(unsupervised_runs):
    summary = read_summary(unsupervised_runs / "drawn.json")
    assert summary["test_goodness_error"] is summary["layer_errors"] is None
    assert 0 < summary["test_readout_error"] < 0.9
    assert "by goodness" not in (unsupervised_runs / "drawn.log").read_text()


def test_negatives_show_prints_the_store_and_writes_a_picture(unsupervised_runs, ffdist_in):
    output = ffdist_in(unsupervised_runs, "negatives", "show", "made", "--picture", "samples.png")
    assert "kind hybrid" in output
    assert "\nepoch\tshards\tof\tsamples\tbytes\n0\t" in output
    assert "\t1437\t" in output
    assert "checking" not in output
    assert (unsupervised_runs / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_store_is_reported_before_it_is_used(unsupervised_runs, tmp_path, ffdist_in):
    store = tmp_path / "damaged"
    shutil.copytree(unsupervised_runs / "made", store)
    shard = store / "epoch_0001/shard_000000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    settings = ["digits", "data.label=none", "negatives.kind=hybrid", "training.epochs=2", "model.layers=[40,30]"]
    commands_by_exit_code = {2: ["negatives", "show", str(store)], 1: ["train", *settings, f"negatives.store={store}"]}
    for code, command in commands_by_exit_code.items():
        output = ffdist_in(tmp_path, *command, code=code)
        assert "Traceback" not in output
        assert "epoch_0001/shard_000000.arrow has the wrong size" in output


def test_readout_is_fitted_without_changing_the_weights(unsupervised_runs, ffdist_in):
    summary = read_summary(unsupervised_runs / "drawn.json")
    run_line = next(
        line for line in (unsupervised_runs / "drawn.log").read_text().splitlines() if line.startswith("run  ")
    )
    weights_before = {path: path.read_bytes() for path in unsupervised_runs.rglob("*.safetensors")}
    outputs = {
        ffdist_in(unsupervised_runs, "fit-readout", name) for name in (run_line.split()[1], summary["mlflow_run_id"])
    }
    assert len(outputs) == 1
    assert {path: path.read_bytes() for path in unsupervised_runs.rglob("*.safetensors")} == weights_before
    client = MlflowClient(summary["mlflow_tracking_uri"])
    metrics = client.get_run(summary["mlflow_run_id"]).data.metrics
    histories = [
        client.get_metric_history(summary["mlflow_run_id"], f"test/{kind}readout_error") for kind in ("", "fitted_")
    ]
    assert len({(point.step, point.timestamp) for points in histories for point in points}) == 1  # after two fits
    assert f"test error {metrics['test/fitted_readout_error']:.2%}" in outputs.pop()
    assert metrics["test/fitted_readout_error"] < summary["test_readout_error"]


def test_results_prints_a_table_of_finished_runs(finished_runs, ffdist_in):
    header, values = (line.split("\t") for line in ffdist_in(finished_runs, "results").splitlines())
    summary = read_summary(finished_runs / "serial.json")
    row = dict(zip(header, values, strict=True))
    assert (row["run"], row["network"], row["negatives"], row["epochs"]) == (
        "digits",
        "30-20",
        "wrong_label",
        "2",
    )
    assert row["by goodness"] == f"{summary['test_goodness_error']:.2%}"
    assert row["by readout"] == f"{summary['test_readout_error']:.2%}"


def find_processes(marker: str) -> dict[int, str]:
    commands = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (process / "environ").read_bytes():
                commands[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return commands


def enable_interrupts() -> None:
    """Restores the handler of SIGINT, which background jobs of a shell without job control ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt_group(driver: int, marker: str) -> None:
    """Sends SIGINT to the process group, like Ctrl-C."""
    os.killpg(driver, signal.SIGINT)


def terminate_all(driver: int, marker: str) -> None:
    """Sends SIGTERM to every process of the job, like `timeout`, systemd or Slurm."""
    for pid in find_processes(marker):
        os.kill(pid, signal.SIGTERM)


def kill_cluster(driver: int, marker: str) -> None:
    """Kills the processes of Ray, like `ray stop --force`."""
    for pid, command in find_processes(marker).items():
        if "/gcs_server" in command or "/raylet/raylet " in command:
            os.kill(pid, signal.SIGKILL)


STOPS = {
    interrupt_group: (130, "stopped; resume with: ffdist resume runs/digits-"),
    terminate_all: (130, "stopped; resume with: ffdist resume runs/digits-"),
    kill_cluster: (1, "the Ray cluster was stopped; resume with: ffdist resume runs/digits-"),
}


@pytest.mark.parametrize(
    "stop", [interrupt_group, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (terminate_all, kill_cluster))]
)
def test_stop_saves_a_checkpoint_marks_the_run_as_killed_and_leaves_no_process(tmp_path, stop):
    code, message = STOPS[stop]
    marker = f"FFDIST_TEST_MARK={tmp_path}"
    command = [sys.executable, "-u", "-m", "ffdist.cli", "train", "digits", "training.epochs=100000", "--runs", "runs"]
    environment = os.environ | dict([marker.split("=", 1)])
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=enable_interrupts,
        )
    try:
        deadline = time.monotonic() + 120
        while "layer 1 loss" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        start = time.monotonic()
        stop(process.pid, marker)
        assert process.wait(50) == code, (tmp_path / "log").read_text()  # Ray itself gives up after 60 s
    finally:
        process.kill()
    log_text = (tmp_path / "log").read_text()
    assert "Traceback" not in log_text
    assert message in log_text
    assert list((tmp_path / "runs").glob("digits-*/checkpoints/*/manifest.json")) or stop is kill_cluster
    while find_processes(marker) and time.monotonic() < start + 120:
        time.sleep(0.2)
    assert not find_processes(marker)
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").search_runs(["1"])
    assert run.info.status == "KILLED"
    assert run.data.metrics["layer_1/loss"] > 0


@pytest.mark.slow  # other signals are tested, too
def test_closed_terminal_marks_the_run_as_killed(tmp_path):
    """The command has its own shell, so that both the shell and the kernel send SIGHUP, and its own Ray cluster."""
    pid, terminal = pty.fork()
    if not pid:
        try:
            os.chdir(tmp_path)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
            command = shlex.join([sys.executable, "-m", "ffdist.cli", "train", "digits", "training.epochs=100000"])
            os.execv("/bin/bash", ["bash", "--norc", "-i", "-c", f"{command}; true"])
        finally:
            os._exit(1)
    output, deadline = b"", time.monotonic() + 120
    while b"pairwise" not in output and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            output += os.read(terminal, 65536)
    os.close(terminal)
    os.waitpid(pid, 0)  # until the shell exits
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    while client.search_runs(["1"])[0].info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(list(tmp_path.glob("runs/digits-*/checkpoints/*/manifest.json"))) == 1
    (run,) = client.search_runs(["1"])
    assert run.info.status == "KILLED"


@pytest.mark.slow  # a test in test_access runs two kinds of commands concurrently
def test_concurrent_local_runs_do_not_interfere(tmp_path):
    command = [sys.executable, "-m", "ffdist.cli", "train", "digits", *SHORT, "--summary"]
    runs = [subprocess.Popen([*command, f"{name}.json"], cwd=tmp_path, stdout=subprocess.DEVNULL) for name in "ab"]
    assert [run.wait(250) for run in runs] == [0, 0]
    first, second = read_summary(tmp_path / "a.json"), read_summary(tmp_path / "b.json")
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["mlflow_run_id"] != second["mlflow_run_id"]
    assert len(MlflowClient(first["mlflow_tracking_uri"]).search_runs(["1"])) == 2


def test_version_and_help_exit_with_code_0():
    commands = (["train"], ["negatives", "make"], ["negatives", "show"], ["fit-readout"], ["results"], ["ui"])
    for arguments in (["--version"], ["--help"], *([*command, "--help"] for command in commands)):
        assert run_ffdist(*arguments, cwd=".").returncode == 0


def test_results_rejects_missing_databases_and_experiments_and_hides_passwords(finished_runs, tmp_path, monkeypatch):
    def expect_error(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["results", *arguments])
        assert result.exit_code == 2, result.output
        return result.output

    assert "there is no experiment nope" in expect_error("--runs", str(finished_runs / "runs"), "--experiment", "nope")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@127.0.0.1:9")
    assert "hush" not in expect_error()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/nowhere.db")
    assert "there is no tracking database at" in expect_error()
    assert not (tmp_path / "nowhere.db").exists()
