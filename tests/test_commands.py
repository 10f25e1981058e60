"""Commands that list, compare, resume and remove runs, that show configurations, and what all commands share."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from contextlib import chdir

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from ffdist import ConfigError, Run, resume, train
from ffdist.cli.options import RUNS_VARIABLE
from ffdist.config.loading import USUAL_NAMES, find_setting, load_config, setting_names
from ffdist.runs.listing import list_runs, remove_run
from ffdist.tracking.sync import LOCK

SHORT = ["training.epochs=2", "model.layers=[30,20]", "tracking.artifacts=[]"]
LONG = ["training.epochs=60", "checkpoint.every_minibatches=28", *SHORT[1:]]


def stop_training(config, runs, **options) -> str:
    """Trains until there is a checkpoint, stops the run, and returns the message."""

    def send_signal() -> None:
        while not list(runs.glob("*/checkpoints/*/manifest.json")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send_signal, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(config, runs=runs, **options)
    return str(stopped.value)


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory, ffdist_in):
    """Two finished runs, a stopped one, a failed one and one without a checkpoint, all trained serially."""
    folder = tmp_path_factory.mktemp("all")
    with chdir(folder):
        runs = folder / "runs"
        stop_training(load_config("digits", LONG), runs, runner="serial", name="stopped")
        for seed in (0, 1):
            train(load_config("digits", [*SHORT, f"seed={seed}"]), runner="serial", runs=runs, name=f"finished_{seed}")
        ffdist_in(folder, "train", "digits", *LONG, "training.learning_rate=1e9", "--runner", "serial", code=1)
        (stopped,) = runs.glob("stopped-*")
        shutil.copytree(stopped, runs / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def rows_by_name(output: str) -> dict[str, dict]:
    """Returns the rows of a list of runs, by the start of their names."""
    return {row["run"].removeprefix("runs/").partition("-")[0]: row for row in json.loads(output)}


def test_list_of_runs_has_the_status_the_reason_and_the_command_that_resumes(runs_folder, ffdist_in):
    rows = rows_by_name(ffdist_in(runs_folder, "runs", "--format", "json"))
    assert {name: row["status"] for name, row in rows.items()} == {
        "stopped": "killed",
        "finished_0": "finished",
        "finished_1": "finished",
        "digits": "failed",
        "empty": "killed",
    }
    assert 0 <= rows["finished_0"]["goodness error"] <= 1
    assert rows["finished_0"]["epochs"] == 2
    assert re.fullmatch(r"\d+ of 60", rows["stopped"]["epochs"])
    assert "is not finite" in rows["digits"]["note"]
    assert rows["stopped"]["resume with"] == f"ffdist resume {rows['stopped']['run']}"
    assert rows["empty"]["resume with"] == rows["finished_0"]["resume with"] == ""
    assert rows["empty"]["note"] == "no checkpoint yet"


def test_list_of_runs_shows_which_are_running_and_which_are_damaged(runs_folder, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(runs_folder / "runs", runs)
    (stopped,), (finished,) = runs.glob("stopped-*"), runs.glob("finished_0-*")
    (finished / "summary.json").write_text("{")
    with FileLock(stopped / LOCK):
        status = {row["run"]: row["status"] for row in list_runs(runs)}
    assert status[str(stopped)] == "running"
    assert status[str(finished)] == "damaged"


def test_runs_folder_is_read_from_the_environment(runs_folder, tmp_path, ffdist, monkeypatch):
    assert "contains no run; train one first, or set --runs DIR" in ffdist("runs", code=2)
    monkeypatch.setenv(RUNS_VARIABLE, str(runs_folder / "runs"))
    lines = ffdist("runs", "--format", "csv").splitlines()
    assert lines[0].startswith("run,status,started,epochs,goodness error")
    assert len(lines) == 6
    assert len(Run.find_all(runs_folder / "runs")) == 2


def test_comparison_has_the_settings_that_differ_and_the_results(runs_folder, ffdist_in):
    names = [str(run.folder) for run in Run.find_all(runs_folder / "runs")]
    rows = {row[""]: row for row in json.loads(ffdist_in(runs_folder, "compare", *names, "--format", "json"))}
    assert [rows["seed"][name] for name in names] == [0, 1]
    assert "training.epochs" not in rows  # equal
    assert all(re.fullmatch(r"\d+\.\d\d%", rows["test_goodness_error"][name]) for name in names)
    assert len({rows["weights_sha256"][name] for name in names}) == 2
    (stopped,) = (runs_folder / "runs").glob("stopped-*")
    rows = {
        row[""]: row for row in json.loads(ffdist_in(runs_folder, "compare", *names[:1], stopped, "--format", "json"))
    }
    assert rows["training.epochs"] == {"": "training.epochs", names[0]: 2, str(stopped): 60}
    assert rows["test_goodness_error"][str(stopped)] is None


def test_removed_run_is_deleted_in_mlflow_and_can_be_restored_there(tmp_path, ffdist):
    folder = train(load_config("digits", SHORT), runner="serial", runs=tmp_path / "runs").folder
    run_id = Run.find(folder).summary["mlflow_run_id"]
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    ffdist("rm", folder, code=1)  # the question is not answered
    assert folder.exists()
    assert f"`mlflow runs restore --run-id {run_id}`" in ffdist("rm", folder, "--yes")
    assert not folder.exists()
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"
    client.restore_run(run_id)
    assert client.get_run(run_id).data.metrics["test/goodness_error"] <= 1


def test_only_folders_of_runs_are_removed(runs_folder, tmp_path, ffdist):
    (tmp_path / "mine").mkdir()
    for file in ("config.yaml", "thesis.tex"):
        (tmp_path / "mine" / file).write_text("data: {name: digits}")
    shutil.copytree(next((runs_folder / "runs").glob("finished_0-*")), tmp_path / "runs" / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "kept")
    for name in ("mine", "link"):
        assert "only the folder of a run is removed" in ffdist("rm", name, "--yes", code=2)
    with chdir(tmp_path / "runs" / "kept"), pytest.raises(ConfigError, match="not a link or the working directory"):
        remove_run(tmp_path / "runs" / "kept", tmp_path / "runs")
    with FileLock(tmp_path / "runs" / "kept" / LOCK):
        assert "is in use by another process" in ffdist("rm", "runs/kept", "--yes", code=2)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert (tmp_path / "runs" / "kept" / "config.yaml").exists()


def test_stopped_run_prints_the_command_that_resumes_it_with_the_same_result(tmp_path, ffdist):
    reference = train(load_config("digits", LONG), runs=tmp_path / "reference", runner="serial")
    message = stop_training(load_config("digits", LONG), tmp_path / "my runs", runner="serial")
    words = shlex.split(message.removeprefix("stopped; resume with: "))
    assert words[:2] == ["ffdist", "resume"]
    output = ffdist(*words[1:], "pipeline.stages=1")  # in another folder, and without --runner
    assert "serial: 1 stage on cpu" in output
    assert Run.find(words[2]).summary["weights_sha256"] == reference.summary["weights_sha256"]
    assert "is finished; train it further as a new run" in ffdist(*words[1:], code=2)


def test_python_resumes_a_run_by_backpropagation_with_its_own_runner(tmp_path):
    config = load_config("digits", LONG)
    reference = train(config, runs=tmp_path / "reference", runner="backpropagation")
    stop_training(config, tmp_path / "runs", runner="backpropagation")
    (folder,) = (tmp_path / "runs").glob("*/checkpoints")
    with pytest.raises(ConfigError, match=r"training\.epochs: 60 then, 7 now"):
        resume(folder.parent, ["training.epochs=7"])
    assert resume(folder.parent).summary["weights_sha256"] == reference.summary["weights_sha256"]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("lr", "training.learning_rate"),
        ("training.lr", "training.learning_rate"),
        ("epochs", "training.epochs"),
        ("hidden-size", "model.layers"),
        ("num_workers", "negatives.actors"),
        ("training.batchsize", "training.batch_size"),
        ("stages", "pipeline.stages"),
        ("dropout", ""),
        ("zzz", ""),
    ],
)
def test_usual_names_lead_to_settings(name, setting, ffdist):
    assert find_setting(name) == setting
    error = ffdist("train", "digits", f"{name}=3", code=2)
    assert (f"did you mean {setting}?" in error) == bool(setting)


def test_every_usual_name_is_of_an_existing_setting():
    assert set(USUAL_NAMES) <= set(setting_names())
    names = [name for names in USUAL_NAMES.values() for name in names]
    assert len(names) == len(set(names))


def test_setting_as_an_option_is_answered_with_how_settings_are_written(ffdist):
    assert "Settings are written without dashes: training.epochs=VALUE" in ffdist(
        "train", "digits", "--epochs", "3", code=2
    )
    assert "No such option" in ffdist("train", "digits", "--zzz", code=2)


def test_shown_configuration_can_be_trained(tmp_path, ffdist):
    (tmp_path / "shown.yaml").write_text(ffdist("config", "show", "digits", "training.epochs=3"))
    assert load_config(str(tmp_path / "shown.yaml")) == load_config("digits", ["training.epochs=3"])


def test_lists_of_configurations_and_settings(ffdist):
    names = {row["config"]: row for row in json.loads(ffdist("config", "list", "--format", "json"))}
    assert names["xor"]["data"] == "xor"
    assert names["mnist_4x2000"]["layers"] == "2000-2000-2000-2000"
    settings = {row["setting"] for row in json.loads(ffdist("config", "keys", "--format", "json"))}
    assert settings == set(setting_names())
    (row,) = [
        row for row in json.loads(ffdist("config", "keys", "model", "--format", "json")) if "layers" in row["setting"]
    ]
    assert row["default"] == "required"
    assert "SECTION must be one of data, model" in ffdist("config", "keys", "modle", code=2)


def test_difference_of_configurations(ffdist):
    rows = json.loads(ffdist("config", "diff", "digits", "training.epochs=3", "--format", "json"))
    assert [(row[""], *list(row.values())[1:]) for row in rows] == [("training.epochs", 60, 3)]
    rows = {row[""] for row in json.loads(ffdist("config", "diff", "mnist", "fashion_mnist", "--format", "json"))}
    assert rows == {"data.name", "reference.target_error"}
    assert "give two configurations" in ffdist("config", "diff", "mnist", code=2)


@pytest.mark.parametrize("runner", ["ray", "serial"])
def test_dry_run_prints_the_plan_and_writes_nothing(runner, tmp_path, ffdist):
    import ray

    output = ffdist("train", "digits", "--dry-run", "--runner", runner)
    for text in (
        "1,437 train",
        "500-500-500; 538,500 parameters",
        f"{runner}: 3 stages on cpu",
        "host memory",
        "about 0:00:",
    ):
        assert text in output
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())
    for arguments, message in (
        (["training.batch_size=5000"], "batch_size: 5000"),
        (["training.callbacks=['nowhere:Callback']"], "training.callbacks: nowhere:Callback must be"),
        (["--init-from", "nowhere"], "(given: nowhere)"),
        (["--checkpoint", "best"], "--checkpoint needs --init-from"),
    ):
        assert message in ffdist("train", "digits", "--dry-run", "--runner", runner, *arguments, code=2)


def test_quiet_command_prints_only_results(tmp_path, ffdist):
    output = ffdist("train", "digits", *SHORT, "--runner", "serial", "--quiet")
    assert output.startswith("test error ")
    assert "checkpoint:" not in ffdist("evaluate", next(tmp_path.glob("runs/digits-*")), "--quiet")
    assert "data: digits" in ffdist("train", "digits", *SHORT, "--runner", "serial")


def test_debug_prints_the_traceback_of_an_error(ffdist, monkeypatch):
    assert "Traceback" not in ffdist("train", "nothing", code=2)
    assert "Traceback" in ffdist("train", "nothing", "--debug", code=2)
    monkeypatch.setenv("FFDIST_DEBUG", "1")
    assert "Traceback" in ffdist("train", "nothing", code=2)


def test_reproduction_lists_the_configurations_and_continues_after_a_failed_run(tmp_path, ffdist):
    assert "mnist_hard_label" in ffdist("reproduce")
    assert not list(tmp_path.iterdir())
    network = "data: {name: xor, label: none}\nmodel: {layers: [8]}\nnegatives: {kind: noise}\n"
    (tmp_path / "good.yaml").write_text(network + "training: {epochs: 1, batch_size: 20}")
    (tmp_path / "bad.yaml").write_text(network + "training: {epochs: 1, batch_size: 20, learning_rate: 1e+9}")
    output = ffdist("reproduce", "bad.yaml", "good.yaml", "--runner", "serial", code=1)
    assert "1 runs failed: bad.yaml, seed 0: a number in layer 1 is not finite" in output
    assert "\ngood\t8\tnone\tnoise\t" in output


def test_shell_completes_configurations_settings_and_runs(runs_folder, ffdist_in, monkeypatch):
    def complete(words: str) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setenv("_MAIN_COMPLETE", "bash_complete")
            patch.setenv("COMP_WORDS", f"main {words}")
            patch.setenv("COMP_CWORD", str(len(words.split(" "))))
            return [line.partition(",")[2] for line in ffdist_in(runs_folder).splitlines()]

    assert "digits" in complete("train di")
    assert "training.epochs=" in complete("train digits training.")
    assert any(name.startswith("runs/finished_0-") for name in complete("evaluate runs/fin"))
    assert complete("config s") == ["show"]


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("data={name: 'os:system', options: {command: 'touch code-ran'}}", "data.name, data.options"),
        ("negatives={kind: 'custom:negatives'}", "negatives.kind"),
        ("training.callbacks=['custom:Callback']", "training.callbacks"),
        ("tracking.uri=http://127.0.0.1:9", "tracking.uri"),
    ],
)
def test_resuming_imports_no_code_and_calls_no_server_that_only_the_folder_names(
    override, name, runs_folder, tmp_path, ffdist
):
    shutil.copytree(next((runs_folder / "runs").glob("stopped-*")), tmp_path / "stopped")
    (tmp_path / "custom.py").write_text("open('code-ran', 'w')")
    sys.modules.pop("custom", None)
    config = load_config(str(tmp_path / "stopped" / "config.yaml"), [override])
    (tmp_path / "stopped" / "config.yaml").write_text(config.to_yaml())
    error = ffdist("resume", "stopped", code=2)
    assert f"names code to import or a tracking server ({name}); if you trust it, repeat that: ffdist resume" in error
    assert not (tmp_path / "code-ran").exists()
    command = shlex.split(error.rpartition("repeat that: ")[2])
    assert "names code to import" not in ffdist(*command[1:], code=2)  # another error: it is a different run now
    assert (tmp_path / "code-ran").exists() == (name != "tracking.uri")


def test_interrupted_run_with_a_tracking_server_prints_a_command_that_repeats_it(tmp_path, ffdist):
    uri = f"sqlite:///{tmp_path}/other.db"
    message = stop_training(load_config("digits", [*LONG, f"tracking.uri={uri}"]), tmp_path / "runs", runner="serial")
    words = shlex.split(message.removeprefix("stopped; resume with: "))
    assert words[3:] == [f"tracking.uri={uri}"]
    assert "weights_sha256" in ffdist(*words[1:])


def test_copy_of_a_run_is_removed_without_its_mlflow_run(runs_folder, tmp_path, ffdist):
    shutil.copytree(runs_folder / "runs", tmp_path / "runs")
    (folder,) = (tmp_path / "runs").glob("finished_0-*")
    run_id = Run.find(folder).summary["mlflow_run_id"]
    assert "its MLflow run" in ffdist("rm", folder, "--yes")  # its folder is the original one
    assert not folder.exists()
    assert MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").get_run(run_id).info.lifecycle_stage == "active"


def test_predictions_do_not_replace_their_input(tmp_path, runs_folder, ffdist):
    (tmp_path / "birds.csv").write_text("a,b\n1,2\n")
    (folder,) = (runs_folder / "runs").glob("finished_0-*")
    assert "--output must not replace an input" in ffdist("predict", folder, "birds.csv", "-o", "birds.csv", code=2)
    assert (tmp_path / "birds.csv").read_text() == "a,b\n1,2\n"
