"""A resumed run gives bitwise the same result as a run that was never interrupted."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from PIL import Image

from ffdist import Config, ConfigError, Run, load_config, resume, train
from ffdist.runs.folder import checkpoints_of
from ffdist.tracking.server import default_uri
from ffdist.tracking.sync import LOCK

SHORT = [
    *(
        "training.epochs=12",
        "training.validation_samples=200",
        "training.validate_every_epochs=2",
        "model.layers=[60,50,40]",
    ),
    *(
        "checkpoint.every_minibatches=5",
        "checkpoint.keep_last=3",
        "tracking.log_every_minibatches=10",
        "pipeline.chunk_size=7",
    ),
    "tracking.artifacts=[]",
]
HARD_LABEL = ["negatives.kind=hard_label", "negatives.prediction_delay=30"]
CASES = {
    "wrong_label": [],
    "hard_label": HARD_LABEL,
    "hybrid": ["data.label=none", "negatives.kind=hybrid", "data.jitter=1"],
    "greedy": [
        *(
            "training.schedule=greedy",
            "training.epochs=5",
            "training.optimizer=adam",
            "training.updates_per_minibatch=2",
        ),
        "training.precision=bfloat16",
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def make_config(*changes: str) -> Config:
    return load_config("digits", [*SHORT, *changes])


def has_three_checkpoints(names: list[str]) -> bool:
    return len(names) > 2


def train_until_stopped(
    config: Config, runs: Path, stop_signal=signal.SIGINT, condition=has_three_checkpoints, **options
) -> Path:
    """Trains until the names of the checkpoints meet a condition, then sends a signal to this process.

    Returns the folder of the run.
    """
    before = set(runs.glob("*-*/"))

    def send_signal() -> None:
        while not any(condition(checkpoints_of(config, folder).names()) for folder in set(runs.glob("*-*/")) - before):
            time.sleep(0.005)
        os.kill(os.getpid(), stop_signal)

    threading.Thread(target=send_signal, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="stopped; resume with: ffdist resume"):
        train(config, runs=runs, runner="serial", **options)
    (folder,) = set(runs.glob("*-*/")) - before
    return folder


def metric_history(run, runs: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the steps and values of all metrics of a run on the tracking server."""
    client = MlflowClient(default_uri(runs))
    run_id = run.summary["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        for name in client.get_run(run_id).data.metrics
    }


def assert_same_run(run, reference, runs: Path) -> None:
    assert run.summary["weights_sha256"] == reference.summary["weights_sha256"]
    assert run.summary["test_goodness_error"] == reference.summary["test_goodness_error"]
    assert run.summary["layer_errors"] == reference.summary["layer_errors"]
    actual, expected = metric_history(run, runs), metric_history(reference, runs)
    for name, points in expected.items():
        if name.startswith(("layer", "readout", "validation", "test")):
            assert actual[name] == points, name
    for name, points in actual.items():  # includes times, whose values differ
        assert len({step for step, _ in points}) == len(points), f"{name} has doubled points"


@pytest.mark.parametrize(
    ("case", "stop_signal"),
    list(zip(CASES, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP), strict=True)),
)
def test_stopped_run_resumes_with_identical_results(case, stop_signal, runs):
    config = make_config(*CASES[case])
    reference = train(config, runs=runs, runner="serial")
    folder = train_until_stopped(config, runs, stop_signal)
    other_settings = ["pipeline.stages=2", "pipeline.chunk_size=11", "training.precision=auto"]
    other_config = make_config(*CASES[case], *other_settings)
    run = train(other_config, runs=runs, runner="serial", resume=folder)
    assert run.folder == folder
    assert_same_run(run, reference, runs)


def test_serial_run_resumes_over_ray(runs, ray_start_4_cpus, capsys):
    reference = train(make_config(*HARD_LABEL), runs=runs, runner="serial")
    folder = train_until_stopped(make_config(*HARD_LABEL), runs)
    assert_same_run(train(make_config(*HARD_LABEL, "pipeline.stages=2"), runs=runs, resume=folder), reference, runs)
    assert capsys.readouterr().out.count("s with start and evaluation since it was resumed") == 1


def test_resuming_with_other_cpu_instructions_prints_one_warning(runs):
    folder = train_until_stopped(make_config(), runs)
    command = [sys.executable, "-m", "ffdist.cli", "resume", str(folder), "--runs", str(runs)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    result = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("warning: the last bits") == 1
    assert re.search(
        r"warning: the last bits may differ .*\(layer 1, layer 2, layer 3, readout, negative actor 1: CPU was .* "
        r"and is .*DEFAULT.*; .*: environment was none and is ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE\)",
        result.stdout,
    )


def test_run_with_killed_driver_resumes_with_identical_results(runs):
    reference = train(make_config(*HARD_LABEL), runs=runs, runner="serial")
    before = set(runs.glob("*-*/"))
    command = [sys.executable, "-m", "ffdist.cli", "train", "digits", *SHORT, *HARD_LABEL, "--runner", "serial"]
    process = subprocess.Popen([*command, "--runs", str(runs)])
    while not (
        (folders := set(runs.glob("run-*")) | set(runs.glob("digits-*")) - before)
        and any(len(checkpoints_of(make_config(), folder).names()) > 2 for folder in folders - before)
    ):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    (folder,) = folders - before
    assert_same_run(train(make_config(*HARD_LABEL), runs=runs, runner="serial", resume=folder), reference, runs)


def test_resuming_with_other_settings_or_a_finished_run_is_refused(runs):
    config = make_config()
    folder = train_until_stopped(config, runs)
    with pytest.raises(ConfigError, match=r"model\.layers: \[60, 50, 40\] then, \[60, 50\] now.*--init-from"):
        train(make_config("model.layers=[60,50]"), runs=runs, runner="serial", resume=folder)
    with pytest.raises(ConfigError, match=r"was trained on other samples|seed: 0 then, 1 now"):
        train(make_config("seed=1"), runs=runs, runner="serial", resume=folder)
    train(config, runs=runs, runner="serial", resume=folder)
    with pytest.raises(ConfigError, match="is finished; train it further as a new run, with --init-from"):
        train(config, runs=runs, runner="serial", resume=folder)


def test_damaged_checkpoint_is_an_error_unless_skip_damaged_is_set(runs):
    config = make_config()
    reference = train(config, runs=runs, runner="serial")
    folder = train_until_stopped(config, runs)
    checkpoints = checkpoints_of(config, folder)
    file = Path(checkpoints.path(checkpoints.names()[-1])) / "layer_2.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"layer_2.*is corrupted.*--skip-damaged"):
        train(config, runs=runs, runner="serial", resume=folder)
    run = train(config, runs=runs, runner="serial", resume=folder, skip_damaged=True)
    assert_same_run(run, reference, runs)


def test_warm_start_uses_the_weights_of_another_run(runs):
    source = train(make_config("training.epochs=4"), runs=runs, runner="serial")
    cold_start = train(make_config("training.epochs=2"), runs=runs, runner="serial")
    warm_start = train(make_config("training.epochs=2"), runs=runs, runner="serial", init_from=source.folder)
    assert warm_start.summary["test_readout_error"] < cold_start.summary["test_readout_error"]
    config_with_uri = make_config("training.epochs=2", f"checkpoint.uri={runs / 'far'}")
    warm_start_with_uri = train(config_with_uri, runs=runs, runner="serial", init_from=source.folder)
    assert warm_start_with_uri.summary["weights_sha256"] == warm_start.summary["weights_sha256"]
    with pytest.raises(ConfigError, match=r"the layers of .* do not fit \(layer_3"):
        train(make_config("model.layers=[60,50,30]"), runs=runs, runner="serial", init_from=source.folder)


def test_each_run_has_its_own_folder_at_a_checkpoint_uri_with_a_query(runs, tmp_path):
    uri_setting = f"checkpoint.uri=file://{tmp_path}/all?one=1"
    finished_runs = [train(make_config(uri_setting, f"seed={seed}"), runs=runs, runner="serial") for seed in (1, 2)]
    assert {path.name for path in (tmp_path / "all").iterdir()} == {run.folder.name for run in finished_runs}


def test_run_resumes_from_checkpoint_uri_after_its_folder_was_deleted(runs, tmp_path, ffdist_in):
    config = make_config(uri_setting := f"checkpoint.uri=file://{tmp_path}/checkpoints")
    reference = train(config, runs=runs, runner="serial")
    assert str(tmp_path) in reference.summary["best_checkpoint"]
    assert not (reference.folder / "checkpoints").exists()
    folder = train_until_stopped(config, runs)
    with FileLock(folder / LOCK):  # held by the tracker while it uploads
        shutil.rmtree(folder)
    output = ffdist_in(tmp_path, "resume", folder.name, uri_setting, "--runs", runs)
    assert "resuming from" in output
    assert Run.find(folder).summary["weights_sha256"] == reference.summary["weights_sha256"]


def test_run_resumes_beside_the_database_of_another_program(tmp_path):
    folder = train_until_stopped(make_config(), tmp_path / "runs")
    moved = folder.rename(tmp_path / folder.name)
    MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()  # MLflow's default name
    run = resume(moved, runs=tmp_path / "runs", runner="serial")
    assert run.summary["mlflow_tracking_uri"] == default_uri(tmp_path / "runs")


def test_run_resumes_with_moved_data_but_not_with_changed_data(runs, tmp_path):
    for split, count in (("train", 40), ("test", 4)):
        for label in range(4):
            (tmp_path / "data" / split / f"class_{label}").mkdir(parents=True)
            for number in range(count):
                image = Image.new("L", (4, 4), 60 * label + number)
                image.save(tmp_path / "data" / split / f"class_{label}" / f"{number}.png")

    def make_data_config(name: str) -> Config:
        settings = ["data.name=image_folder", f"data.path={tmp_path / name}", "training.batch_size=4"]
        return make_config(*settings, "training.validation_samples=0", "training.epochs=40", "model.layers=[9]")

    folder = train_until_stopped(make_data_config("data"), runs)
    (tmp_path / "data").rename(tmp_path / "moved")
    image = tmp_path / "moved" / "test" / "class_0" / "0.png"
    original_bytes = image.read_bytes()
    Image.new("L", (4, 4), 99).save(image)
    with pytest.raises(ConfigError, match=r"was tested on other samples.*set data\.path to the location"):
        train(make_data_config("moved"), runs=runs, runner="serial", resume=folder)
    image.write_bytes(original_bytes)
    run = train(make_data_config("moved"), runs=runs, runner="serial", resume=folder)
    assert 0 <= Run.find(folder).dataset.labels["test"].max() < 4  # loaded from the new location without `data.path`
    assert run.folder == folder


def test_run_with_damaged_best_checkpoint_reports_its_last_checkpoint(runs, capsys):
    config = make_config("training.learning_rate=0", "training.validate_every_epochs=1", "training.epochs=30")
    folder = train_until_stopped(config, runs, condition=lambda names: max(names, default="") > "0002")
    file = folder / "checkpoints" / "0001-000000" / "layer_1.safetensors"  # the best, because the layers do not learn
    file.write_bytes(file.read_bytes()[:-1])
    run = train(config, runs=runs, runner="serial", resume=folder)
    assert "the figures are those of the last checkpoint instead of the best" in capsys.readouterr().out
    assert (run.summary["checkpoint"], run.summary["best_checkpoint"]) == ("0030-000000", None)
