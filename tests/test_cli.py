"""The command line as a user meets it: in a process of its own wherever that matters."""

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


def ffdist(*arguments, cwd, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ffdist.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200, **more)


def summary(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder in which one short serial run and one over Ray, with validation, have ended."""
    folder = tmp_path_factory.mktemp("finished")
    validated = ["training.validation_samples=200", "training.validate_every_epochs=1", "pipeline.chunk_size=7"]
    validated.append("training.learning_rate=0")  # of the layers, so that the first checkpoint is the best by goodness
    for runner in ("serial", "ray"):
        options = ["--runner", runner, "--summary", f"{runner}.json"]
        run = ffdist("train", *options, "digits", *validated, *SHORT, cwd=folder)
        assert run.returncode == 0, run.stderr
        (folder / f"{runner}.log").write_text(run.stdout)
    return folder


def test_both_runners_end_alike(finished):
    serial, ray = summary(finished / "serial.json"), summary(finished / "ray.json")
    assert serial["checkpoint"] == "0001-000000"  # which both load again before the test set
    for figure in (
        "checkpoint",
        "weights_sha256",
        "test_goodness_error",
        "test_readout_error",
        "layer_errors",
        "epochs",
    ):
        assert serial[figure] == ray[figure]
    assert (serial["runner"], ray["runner"]) == ("serial", "ray")
    assert serial["stages"] == ray["stages"] == 2
    assert 0 < ray["train_s"] < ray["wall_s"]


def test_the_run_tells_where_everything_is(finished):
    facts, log = summary(finished / "ray.json"), (finished / "ray.log").read_text()
    for text in (
        facts["weights_sha256"],
        facts["mlflow_run_id"],
        facts["mlflow_tracking_uri"],
        "ffdist ui",
        f"checkpoint      {facts['checkpoint']} (best on validation)",
    ):
        assert text in log
    folder = next(line for line in log.splitlines() if line.startswith("run  ")).split()[1]
    assert load_config(str(finished / folder / "config.yaml")).training.epochs == 2
    assert len(list((finished / folder / "checkpoints").glob("*/manifest.json"))) in (1, 2)


def test_mlflow_has_every_series_of_both_runners(finished):
    names = {"loss", "goodness_positive", "goodness_negative", "pairwise_error", "active_fraction", "weight_rms"}
    learned = {}
    for runner in ("serial", "ray"):
        facts = summary(finished / f"{runner}.json")
        client = MlflowClient(facts["mlflow_tracking_uri"])
        run = client.get_run(facts["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.params["model.layers"] == "[30, 20]"
        assert run.data.tags["weights_sha256"] == facts["weights_sha256"]
        series = {f"layer_{layer}/{name}" for layer in (1, 2) for name in names} | {"readout/loss", "readout/error"}
        errors = {
            f"{split}/{way}_error" for split in ("validation", "test") for way in ("goodness", "readout", "layer_1")
        }
        times = {f"stage_{stage}/{name}" for stage in (1, 2) for name in ("compute_s", "wait_s", "busy_fraction")}
        assert series | errors | times | {"samples_per_s"} <= set(run.data.metrics)
        learned[runner] = {
            name: [(point.step, point.value) for point in client.get_metric_history(facts["mlflow_run_id"], name)]
            for name in series | errors
        }
        files = {file.path for file in client.list_artifacts(facts["mlflow_run_id"])}
        pictures = ("layers", "negatives", "goodness", "errors", "fields", "confusion", "timeline")
        assert files == {"config.yaml", "timeline.json", "goodness", *(f"{picture}.png" for picture in pictures)}
        validations = {file.path for file in client.list_artifacts(facts["mlflow_run_id"], "goodness")}
        assert "goodness/epoch_0002.png" in validations  # of those that wait, the newest
        assert run.data.tags["mlflow.note.content"].startswith(f"test error {facts['test_goodness_error']:.2%} by good")
        (trained_on,) = run.inputs.dataset_inputs
        assert (trained_on.dataset.name, len(run.outputs.model_outputs)) == ("digits", 1)
        assert run.data.tags["cluster"].startswith("nodes: 1, CPUs: ")
    assert learned["serial"] == learned["ray"]
    assert len(learned["ray"]["validation/goodness_error"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digit"], "did you mean digits"),
        (["train"], "expected exactly one CONFIG (given: none)"),
        (["train", "digits", "mnist"], "(given: digits mnist)"),
        (["train", "digits", "training.epoch=3"], "did you mean epochs"),
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
        (["train", "digits", "--resume", "", *SERIAL], "RUN must be the folder of a run, or the MLflow run id of"),
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
        (["readout", "nowhere"], "RUN must be the folder of a run, or the MLflow run id of a run in runs"),
    ],
)
def test_what_cannot_work_is_one_paragraph_and_exit_code_2(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(main, arguments)  # in this process, which has imported everything
    assert isinstance(run.exception, SystemExit), run.output
    assert run.exit_code == 2
    (told,) = run.output.strip().splitlines()
    assert words in told
    assert told.startswith("Error: ")
    assert not list(tmp_path.glob("runs/digits-*"))


def test_a_configuration_may_lie_where_a_path_has_an_equals_sign(tmp_path):
    (tmp_path / "lr=0.1.yaml").write_text("data: {name: digits}\nmodel: {layers: [9]}\n")
    config, name = load((str(tmp_path / "lr=0.1.yaml"), "training.epochs=3"))
    assert (config.training.epochs, name) == (3, "lr=0.1")


def test_a_file_to_be_written_stays_what_it_is(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "later.json")
    check_writable("--summary", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "later.json").exists()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="--summary must be a file that can be written"):
        check_writable("--summary", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    check_writable("--summary", tmp_path / "pipe")  # and does not wait for a reader


def test_simulated_chaos_ignores_nothing(ffdist, tmp_path):
    assert "--simulated trains nothing and takes no CONFIG (given: mnist)" in ffdist(
        "chaos", "mnist", "--simulated", "3", code=2
    )
    told = ffdist("chaos", "--simulated", "2", "--kind", "stage", "--faults", "3", "--minutes", "1", code=2)
    assert "(given: --faults, --kind, --minutes)" in told
    ffdist("chaos", "--simulated", "3", "--seed", "1", "--json", "found.json")
    assert summary(tmp_path / "found.json")["schedules"] == 3


def test_who_stops_reading_stops_no_run(tmp_path):
    command = [sys.executable, "-u", "-m", "ffdist.cli", "train", "digits", "training.epochs=2", *SERIAL]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 0, told
    assert list(tmp_path.glob("runs/digits-*/summary.json"))


def test_an_error_is_told_without_a_traceback_in_a_process_of_its_own(tmp_path):
    run = ffdist("train", "digits", "pipeline.stages=4", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert "every stage needs a layer" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.fixture(scope="module")
def unsupervised(tmp_path_factory, ffdist_in) -> Path:
    """A folder in which a store was made, and a run without labels trained from it and one that drew its own."""
    folder = tmp_path_factory.mktemp("unsupervised")
    short = ["digits", "data.label=none", "negatives.kind=hybrid", "training.epochs=2", "model.layers=[40,30]"]
    short += ["tracking.artifacts=[]"]
    ffdist_in(folder, "negatives", "make", *short, "negatives.store=made")
    for name, stored in (("drawn", []), ("stored", ["negatives.store=made"])):
        said = ffdist_in(folder, "train", *SERIAL, "--summary", f"{name}.json", *short, *stored)
        (folder / f"{name}.log").write_text(said)
    return folder


def test_a_made_store_trains_to_the_same_weights(unsupervised):
    drawn, stored = summary(unsupervised / "drawn.json"), summary(unsupervised / "stored.json")
    assert drawn["weights_sha256"] == stored["weights_sha256"]


def test_without_labels_there_is_no_error_by_goodness(unsupervised):
    facts = summary(unsupervised / "drawn.json")
    assert facts["test_goodness_error"] is facts["layer_errors"] is None
    assert 0 < facts["test_readout_error"] < 0.9
    assert "by goodness" not in (unsupervised / "drawn.log").read_text()


def test_a_store_is_shown_with_a_picture(unsupervised, ffdist_in):
    said = ffdist_in(unsupervised, "negatives", "show", "made", "--picture", "samples.png")
    assert "kind hybrid" in said
    assert "\nepoch\tshards\tof\tsamples\tbytes\n0\t" in said
    assert "\t1437\t" in said
    assert "checking" not in said
    assert (unsupervised / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_store_is_named_before_it_is_used(unsupervised, tmp_path, ffdist_in):
    store = tmp_path / "damaged"
    shutil.copytree(unsupervised / "made", store)
    shard = store / "epoch_0001/shard_000000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    short = ["digits", "data.label=none", "negatives.kind=hybrid", "training.epochs=2", "model.layers=[40,30]"]
    commands = {2: ["negatives", "show", str(store)], 1: ["train", *short, f"negatives.store={store}"]}
    for code, command in commands.items():
        said = ffdist_in(tmp_path, *command, code=code)
        assert "Traceback" not in said
        assert "epoch_0001/shard_000000.arrow has the wrong size" in said


def test_a_readout_is_fitted_to_layers_as_they_are(unsupervised, ffdist_in):
    facts = summary(unsupervised / "drawn.json")
    run = next(line for line in (unsupervised / "drawn.log").read_text().splitlines() if line.startswith("run  "))
    before = {path: path.read_bytes() for path in unsupervised.rglob("*.safetensors")}
    outputs = {ffdist_in(unsupervised, "readout", name) for name in (run.split()[1], facts["mlflow_run_id"])}
    assert len(outputs) == 1
    assert {path: path.read_bytes() for path in unsupervised.rglob("*.safetensors")} == before
    client = MlflowClient(facts["mlflow_tracking_uri"])
    fitted = client.get_run(facts["mlflow_run_id"]).data.metrics
    histories = [
        client.get_metric_history(facts["mlflow_run_id"], f"test/{kind}readout_error") for kind in ("", "fitted_")
    ]
    assert len({(point.step, point.timestamp) for points in histories for point in points}) == 1  # fitted twice
    assert f"test error {fitted['test/fitted_readout_error']:.2%}" in outputs.pop()
    assert fitted["test/fitted_readout_error"] < facts["test_readout_error"]


def test_results_are_a_table_of_finished_runs(finished, ffdist_in):
    head, row = (line.split("\t") for line in ffdist_in(finished, "results").splitlines())
    figures = summary(finished / "serial.json")
    found = dict(zip(head, row, strict=True))
    assert (found["run"], found["network"], found["negatives"], found["epochs"]) == (
        "digits",
        "30-20",
        "wrong_label",
        "2",
    )
    assert found["by goodness"] == f"{figures['test_goodness_error']:.2%}"
    assert found["by readout"] == f"{figures['test_readout_error']:.2%}"


def processes_of(mark: str) -> dict[int, str]:
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def heed_interrupts() -> None:
    """A shell without job control starts what runs in its background deaf to Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt_group(driver: int, mark: str) -> None:
    """As Ctrl-C does."""
    os.killpg(driver, signal.SIGINT)


def terminate_all(driver: int, mark: str) -> None:
    """As `timeout`, systemd or Slurm do: a signal to every process of the job."""
    for pid in processes_of(mark):
        os.kill(pid, signal.SIGTERM)


def kill_cluster(driver: int, mark: str) -> None:
    """As `ray stop --force` does."""
    for pid, command in processes_of(mark).items():
        if "/gcs_server" in command or "/raylet/raylet " in command:
            os.kill(pid, signal.SIGKILL)


STOPS = {
    interrupt_group: (130, "stopped in order; resume with --resume runs/digits-"),
    terminate_all: (130, "stopped in order; resume with --resume runs/digits-"),
    kill_cluster: (1, "the Ray cluster was stopped; resume the run with --resume runs/digits-"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_leaves_a_checkpoint_a_killed_run_and_no_process(tmp_path, stop):
    code, words = STOPS[stop]
    mark = f"FFDIST_TEST_MARK={tmp_path}"
    command = [sys.executable, "-u", "-m", "ffdist.cli", "train", "digits", "training.epochs=100000", "--runs", "runs"]
    environment = os.environ | dict([mark.split("=", 1)])
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
    try:
        deadline = time.monotonic() + 120
        while "layer 1 loss" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        start = time.monotonic()
        stop(process.pid, mark)
        assert process.wait(50) == code, (tmp_path / "log").read_text()  # Ray itself gives up after 60 s
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    assert words in text
    assert list((tmp_path / "runs").glob("digits-*/checkpoints/*/manifest.json")) or stop is kill_cluster
    while processes_of(mark) and time.monotonic() < start + 120:
        time.sleep(0.2)
    assert not processes_of(mark)
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").search_runs(["1"])
    assert run.info.status == "KILLED"
    assert run.data.metrics["layer_1/loss"] > 0


def test_a_terminal_that_is_gone_leaves_a_killed_run(tmp_path):
    """In a shell of its own, which tells it as well as the kernel does, and with a Ray of its own."""
    pid, terminal = pty.fork()
    if not pid:
        try:
            os.chdir(tmp_path)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have ignored
            line = shlex.join([sys.executable, "-m", "ffdist.cli", "train", "digits", "training.epochs=100000"])
            os.execv("/bin/bash", ["bash", "--norc", "-i", "-c", f"{line}; true"])
        finally:
            os._exit(1)
    said, deadline = b"", time.monotonic() + 120
    while b"pairwise" not in said and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            said += os.read(terminal, 65536)
    os.close(terminal)
    os.waitpid(pid, 0)  # the shell's end
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    while client.search_runs(["1"])[0].info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(list(tmp_path.glob("runs/digits-*/checkpoints/*/manifest.json"))) == 1
    (run,) = client.search_runs(["1"])
    assert run.info.status == "KILLED"


@pytest.mark.slow  # test_access runs two kinds of commands at once
def test_two_local_runs_at_once_do_not_disturb_each_other(tmp_path):
    command = [sys.executable, "-m", "ffdist.cli", "train", "digits", *SHORT, "--summary"]
    runs = [subprocess.Popen([*command, f"{name}.json"], cwd=tmp_path, stdout=subprocess.DEVNULL) for name in "ab"]
    assert [run.wait(250) for run in runs] == [0, 0]
    one, other = summary(tmp_path / "a.json"), summary(tmp_path / "b.json")
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["mlflow_run_id"] != other["mlflow_run_id"]
    assert len(MlflowClient(one["mlflow_tracking_uri"]).search_runs(["1"])) == 2


def test_help_is_there():
    commands = (["train"], ["negatives", "make"], ["negatives", "show"], ["readout"], ["results"], ["ui"])
    for arguments in (["--version"], ["--help"], *([*command, "--help"] for command in commands)):
        assert ffdist(*arguments, cwd=".").returncode == 0


def test_results_want_a_store_that_is_there_and_tell_no_password(finished, tmp_path, monkeypatch):
    def refused(*words: str) -> str:
        run = CliRunner().invoke(main, ["results", *words])
        assert run.exit_code == 2, run.output
        return run.output

    assert "there is no experiment nope" in refused("--runs", str(finished / "runs"), "--experiment", "nope")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@127.0.0.1:9")
    assert "hush" not in refused()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/nowhere.db")
    assert "there is no tracking database at" in refused()
    assert not (tmp_path / "nowhere.db").exists()
