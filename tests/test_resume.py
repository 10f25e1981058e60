"""What was saved is never lost, what was not is done again, and the end is bitwise as if nothing had happened."""

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

from ffdist import Config, ConfigError, Run, load_config, train
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
HARD = ["negatives.kind=hard_label", "negatives.prediction_delay=30"]
CASES = {
    "wrong_label": [],
    "hard_label": HARD,
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


def a_config(*changes: str) -> Config:
    return load_config("digits", [*SHORT, *changes])


def three_checkpoints(names: list[str]) -> bool:
    return len(names) > 2


def stopped(config: Config, runs: Path, stop=signal.SIGINT, when=three_checkpoints, **how) -> Path:
    """Trains until there are checkpoints, then asks this very process to stop, as Ctrl-C or a cluster does."""
    before = set(runs.glob("*-*/"))

    def ask() -> None:
        while not any(when(checkpoints_of(config, folder).names()) for folder in set(runs.glob("*-*/")) - before):
            time.sleep(0.005)
        os.kill(os.getpid(), stop)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="stopped in order; resume with --resume"):
        train(config, runs=runs, runner="serial", **how)
    (folder,) = set(runs.glob("*-*/")) - before
    return folder


def series(run, runs: Path) -> dict[str, list[tuple[int, float]]]:
    """Every learning metric that the server has, with its steps."""
    client = MlflowClient(default_uri(runs))
    run_id = run.summary["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        for name in client.get_run(run_id).data.metrics
    }


def assert_same_run(run, truth, runs: Path) -> None:
    assert run.summary["weights_sha256"] == truth.summary["weights_sha256"]
    assert run.summary["test_goodness_error"] == truth.summary["test_goodness_error"]
    assert run.summary["layer_errors"] == truth.summary["layer_errors"]
    found, expected = series(run, runs), series(truth, runs)
    for name, points in expected.items():
        if name.startswith(("layer", "readout", "validation", "test")):
            assert found[name] == points, name
    for name, points in found.items():  # times among them, which differ
        assert len({step for step, _ in points}) == len(points), f"{name} has doubled points"


@pytest.mark.parametrize(
    ("case", "number"),
    list(zip(CASES, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP), strict=True)),
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(case, number, runs):
    config = a_config(*CASES[case])
    truth = train(config, runs=runs, runner="serial")
    folder = stopped(config, runs, number)
    now = ["pipeline.stages=2", "pipeline.chunk_size=11", "training.precision=auto"]
    elsewhere = a_config(*CASES[case], *now)
    run = train(elsewhere, runs=runs, runner="serial", resume=folder)
    assert run.folder == folder
    assert_same_run(run, truth, runs)


def test_a_run_goes_on_over_ray(runs, ray_start_4_cpus, capsys):
    truth = train(a_config(*HARD), runs=runs, runner="serial")
    folder = stopped(a_config(*HARD), runs)
    assert_same_run(train(a_config(*HARD, "pipeline.stages=2"), runs=runs, resume=folder), truth, runs)
    assert capsys.readouterr().out.count("s with start and evaluation since it was resumed") == 1


def test_resuming_with_other_instructions_is_one_warning(runs):
    folder = stopped(a_config(), runs)
    command = [sys.executable, "-m", "ffdist.cli", "train", "digits", *SHORT, "--runner", "serial"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    resumed = subprocess.run(
        [*command, "--resume", str(folder), "--runs", str(runs)], env=environment, text=True, capture_output=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("warning: ") == 1
    assert re.search(
        r"warning: the last bits may differ .*\(layer 1, layer 2, layer 3, readout, negative actor 1: CPU was .* "
        r"and is .*DEFAULT.*; .*: environment was none and is ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE\)",
        resumed.stdout,
    )


def test_a_killed_driver_loses_nothing(runs):
    truth = train(a_config(*HARD), runs=runs, runner="serial")
    before = set(runs.glob("*-*/"))
    command = [sys.executable, "-m", "ffdist.cli", "train", "digits", *SHORT, *HARD, "--runner", "serial"]
    process = subprocess.Popen([*command, "--runs", str(runs)])
    while not (
        (new := set(runs.glob("run-*")) | set(runs.glob("digits-*")) - before)
        and any(len(checkpoints_of(a_config(), folder).names()) > 2 for folder in new - before)
    ):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    (folder,) = new - before
    assert_same_run(train(a_config(*HARD), runs=runs, runner="serial", resume=folder), truth, runs)


def test_resuming_twice_at_once_finished_or_as_another_run_is_refused(runs):
    config = a_config()
    folder = stopped(config, runs)
    with pytest.raises(ConfigError, match=r"model\.layers: \[60, 50, 40\] then, \[60, 50\] now.*--init-from"):
        train(a_config("model.layers=[60,50]"), runs=runs, runner="serial", resume=folder)
    with pytest.raises(ConfigError, match=r"was trained on other samples|seed: 0 then, 1 now"):
        train(a_config("seed=1"), runs=runs, runner="serial", resume=folder)
    train(config, runs=runs, runner="serial", resume=folder)
    with pytest.raises(ConfigError, match="is finished; train it further as a new run, with --init-from"):
        train(config, runs=runs, runner="serial", resume=folder)


def test_a_damaged_checkpoint_is_told_and_passed_over_only_when_asked(runs):
    config = a_config()
    truth = train(config, runs=runs, runner="serial")
    folder = stopped(config, runs)
    checkpoints = checkpoints_of(config, folder)
    file = Path(checkpoints.path(checkpoints.names()[-1])) / "layer_2.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"layer_2.*is corrupted.*--skip-damaged"):
        train(config, runs=runs, runner="serial", resume=folder)
    run = train(config, runs=runs, runner="serial", resume=folder, skip_damaged=True)
    assert_same_run(run, truth, runs)


def test_a_run_starts_from_the_weights_of_another(runs):
    first = train(a_config("training.epochs=4"), runs=runs, runner="serial")
    fresh = train(a_config("training.epochs=2"), runs=runs, runner="serial")
    longer = train(a_config("training.epochs=2"), runs=runs, runner="serial", init_from=first.folder)
    assert longer.summary["test_readout_error"] < fresh.summary["test_readout_error"]
    far = a_config("training.epochs=2", f"checkpoint.uri={runs / 'far'}")
    same = train(far, runs=runs, runner="serial", init_from=first.folder)
    assert same.summary["weights_sha256"] == longer.summary["weights_sha256"]
    with pytest.raises(ConfigError, match=r"the layers of .* do not fit \(layer_3"):
        train(a_config("model.layers=[60,50,30]"), runs=runs, runner="serial", init_from=first.folder)


def test_checkpoints_elsewhere_are_each_runs_own_whatever_the_uri_asks(runs, tmp_path):
    where = f"checkpoint.uri=file://{tmp_path}/all?one=1"
    finished = [train(a_config(where, f"seed={seed}"), runs=runs, runner="serial") for seed in (1, 2)]
    assert {path.name for path in (tmp_path / "all").iterdir()} == {run.folder.name for run in finished}


def test_checkpoints_elsewhere_outlive_the_runs_folder(runs, tmp_path, ffdist_in):
    config = a_config(where := f"checkpoint.uri=file://{tmp_path}/checkpoints")
    truth = train(config, runs=runs, runner="serial")
    assert str(tmp_path) in truth.summary["best_checkpoint"]
    assert not (truth.folder / "checkpoints").exists()
    folder = stopped(config, runs)
    with FileLock(folder / LOCK):  # the tracker may still upload
        shutil.rmtree(folder)
    words = ["train", truth.folder / "config.yaml", where, "--resume", folder, "--runs", runs, "--runner", "serial"]
    output = ffdist_in(tmp_path, *words)
    assert "resuming from" in output
    assert Run.find(folder).summary["weights_sha256"] == truth.summary["weights_sha256"]


def test_a_run_goes_on_with_data_that_moved_but_not_with_other_data(runs, tmp_path):
    for split, count in (("train", 40), ("test", 4)):
        for shade in range(4):
            (tmp_path / "data" / split / f"class_{shade}").mkdir(parents=True)
            for number in range(count):
                image = Image.new("L", (4, 4), 60 * shade + number)
                image.save(tmp_path / "data" / split / f"class_{shade}" / f"{number}.png")

    def config_at(place: str) -> Config:
        own = ["data.name=image_folder", f"data.path={tmp_path / place}", "training.batch_size=4"]
        return a_config(*own, "training.validation_samples=0", "training.epochs=40", "model.layers=[9]")

    folder = stopped(config_at("data"), runs)
    (tmp_path / "data").rename(tmp_path / "moved")
    image = tmp_path / "moved" / "test" / "class_0" / "0.png"
    kept = image.read_bytes()
    Image.new("L", (4, 4), 99).save(image)
    with pytest.raises(ConfigError, match=r"was tested on other samples.*set data\.path to the location"):
        train(config_at("moved"), runs=runs, runner="serial", resume=folder)
    image.write_bytes(kept)
    run = train(config_at("moved"), runs=runs, runner="serial", resume=folder)
    assert 0 <= Run.find(folder).dataset.labels["test"].max() < 4  # found at its new place without being told again
    assert run.folder == folder


def test_a_run_whose_best_checkpoint_is_damaged_ends_with_its_last(runs, capsys):
    config = a_config("training.learning_rate=0", "training.validate_every_epochs=1", "training.epochs=30")
    folder = stopped(config, runs, when=lambda names: max(names, default="") > "0002")
    file = folder / "checkpoints" / "0001-000000" / "layer_1.safetensors"  # the best, as the layers do not learn
    file.write_bytes(file.read_bytes()[:-1])
    run = train(config, runs=runs, runner="serial", resume=folder)
    assert "the figures are those of the last checkpoint instead of the best" in capsys.readouterr().out
    assert (run.summary["checkpoint"], run.summary["best_checkpoint"]) == ("0030-000000", None)
