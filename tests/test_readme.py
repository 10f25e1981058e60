"""Every command of the README, run: shortened by overrides, servers started, asked and stopped."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ffdist.config_file import load_config
from ffdist.runtime.access import private_ray

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = list(dict.fromkeys(line for block in BLOCKS for line in block.splitlines()))
GOING_ON = ["ffdist train digits --resume RUN", "ffdist train digits --from RUN"]
TRAINING = [
    line
    for line in COMMANDS
    if line.startswith(("ffdist train", "ffdist baseline", "python ffdist/run.py")) and line not in GOING_ON
]
USING = [line for line in COMMANDS if line.split()[1] in ("evaluate", "predict", "plot", "export")]
SERVING = [line for line in COMMANDS if line.startswith("mlflow")]
NEGATIVES = [line for line in COMMANDS if line.startswith(("ffdist negatives", "ffdist readout", "ffdist results"))]
REPRODUCING = [line for line in COMMANDS if line.startswith("ffdist reproduce")]
CHAOS = ["ffdist chaos digits --faults 60 --seed 0", "ffdist chaos --simulated 2000 --seed 0"]
BENCH = [line for line in COMMANDS if line.startswith("ffdist bench")]
CLUSTER = [line for line in COMMANDS if line.startswith("ray ")]


def arguments(line: str) -> list[str]:
    program, *rest = shlex.split(line)
    assert program == "ffdist"
    return [sys.executable, "-m", "ffdist.cli", *rest]


@pytest.fixture(scope="module")
def a_database(tmp_path_factory) -> str:
    """It takes seconds to make; runs that are not looked at share one."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracked')}/mlflow.db"


@pytest.mark.parametrize("line", [line for line in TRAINING if "store" not in line])
def test_training_commands(line, tmp_path, request, a_database, monkeypatch, ffdist):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", a_database)
    if "mnist" in line:
        request.getfixturevalue("mnist_root")
    short = ["training.epochs=1", "model.layers=[40,30,20]", "tracking.artifacts=[]", "--summary", "figures.json"]
    if line.startswith("ffdist train") and "pipeline" not in line:  # which has a test of its own with Ray
        short += ["--runner", "serial"]
    program, *words = shlex.split(line)
    if program == "ffdist":
        ffdist(*words, *short)
    else:  # python, in a checkout
        for folder in ("ffdist", "configs"):
            shutil.copytree(ROOT / folder, tmp_path / folder)
        subprocess.run([sys.executable, *words, *short], check=True, timeout=250)
    assert 0 < json.loads((tmp_path / "figures.json").read_text())["test_readout_error"] < 1


@pytest.mark.slow  # the install line of the README runs the command itself
def test_the_first_command_reaches_its_figure(tmp_path):
    """`ffdist train digits` as it stands: at most 3 % test error by either way."""
    assert README.count("pip install . && ffdist train digits\n") == 1
    command = [*arguments("ffdist train digits"), "--summary", "figures.json"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["test_goodness_error"] <= 0.03
    assert figures["test_readout_error"] <= 0.03
    assert "ffdist ui" in run.stdout


def test_commands_around_a_run_in_their_order(tmp_path, ffdist):
    """A store made, shown and trained from; a readout fitted to what was trained; the table of results."""
    before = [line for line in COMMANDS if line.startswith("ffdist negatives") or "store" in line]
    for line in [*before, "ffdist readout RUN", "ffdist results"]:
        assert line in COMMANDS
        run_folder = next(tmp_path.glob("runs/digits-*"), Path())
        short = ["training.epochs=1", "model.layers=[40,30,20]"] if "digits" in line else []
        said = ffdist(*shlex.split(line.replace("RUN", str(run_folder)))[1:], *short)
    assert said.count("\ndigits\t") == 1


@pytest.mark.parametrize("line", REPRODUCING)
def test_commands_that_reproduce(line, ffdist):
    said = ffdist(*shlex.split(line)[1:], "--runner", "serial")
    assert "\nxor\t8\tnone\tnoise\t\t20\t\t0.00%, reached\t\t0.00%; 0.00% fitted\t" in said


def test_commands_that_use_a_run(tmp_path, ffdist):
    """Those that serve have a test of their own, test_using."""
    assert len(USING) == 4
    short = ["training.epochs=1", "model.layers=[40,30]", "--runner", "serial"]
    ffdist("train", "digits", *short)
    run_folder = next(tmp_path.glob("runs/digits-*"))
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "black.png")
    for line in USING:
        ffdist(*shlex.split(line.replace("RUN", str(run_folder)).replace("IMAGES", "images"))[1:])
    assert {"found.parquet", "pictures", "network"} < {path.name for path in tmp_path.iterdir()}


def test_python_examples(tmp_path, monkeypatch):
    """One after the other, as in a notebook; the network of the hand-written loop has learned."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n((?:from ffdist|import torch).*?)```", README, re.S)
    assert len(examples) == 2
    kept: dict[str, Any] = {}
    exec(examples[0], kept)
    data = kept["run"].dataset
    kept |= {"images": data.images["train"], "labels": data.labels["train"]}
    exec(examples[1], kept)
    found = kept["network"].predict(data.images["test"]).label
    assert (found == data.labels["test"]).double().mean() > 0.9


def test_a_stopped_run_goes_on_and_another_starts_from_it(tmp_path, ffdist):
    short = ["--runner", "serial", "training.epochs=60", "model.layers=[40,30,20]", "checkpoint.every_minibatches=50"]
    short += ["tracking.artifacts=[]"]
    process = subprocess.Popen([*arguments("ffdist train digits"), *short], cwd=tmp_path)
    while not (found := list(tmp_path.glob("runs/digits-*/commits/*/manifest.json"))):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(120) == 130
    for line in GOING_ON:
        assert line in COMMANDS
        said = ffdist(*shlex.split(line.replace("RUN", str(found[0].parents[2])))[1:], *short)
        assert ("going on from" if "--resume" in line else "starting from") in said
    assert len(list(tmp_path.glob("runs/digits-*"))) == 2


def test_simulated_chaos(ffdist):
    """Real faults and benchmarks have tests of their own, test_chaos and test_bench."""
    ffdist(*shlex.split(CHAOS[1])[1:], "--simulated", "20")


@pytest.mark.slow  # test_access has one, too
def test_a_kind_of_ones_own_beside_the_user(tmp_path):
    """The README's own example, imported by actors as well."""
    (example,) = re.findall(r"```python\n(# mirrors.py.*?)```", README, re.S)
    (tmp_path / "mirrors.py").write_text(example)
    short = ["training.epochs=1", "model.layers=[40,30]", "data.label=none", "negatives.kind=mirrors:mirrored"]
    command = [Path(sys.executable).parent / "ffdist", "train", "digits", *short]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.S))
def test_yaml_examples_are_configurations(block, tmp_path):
    (tmp_path / "example.yaml").write_text(block)
    load_config(str(tmp_path / "example.yaml"))


def test_ui_shows_a_finished_run(tmp_path, free_port, ffdist):
    assert "ffdist ui" in COMMANDS
    ffdist("train", "digits", "--runner", "serial", "training.epochs=1")
    server = subprocess.Popen(
        [*arguments("ffdist ui"), "--port", str(free_port)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        said = server.stdout.readline()
        page = rf"in some seconds: (http://127.0.0.1:{free_port})/#/experiments/(\d+)/runs\?.*viewStateShareKey=(\w+)\n"
        address, experiment, view = re.fullmatch(page, said).groups()
        url, body = f"{address}/api/2.0/mlflow/runs/search", json.dumps({"experiment_ids": [experiment]}).encode()
        deadline = time.monotonic() + 120
        while True:
            try:
                ask = urllib.request.Request(url, body, {"Content-Type": "application/json"})
                answer = json.load(urllib.request.urlopen(ask, timeout=10))
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(1)
        found = f"{address}/api/2.0/mlflow/experiments/get?experiment_id={experiment}"
        tags = json.load(urllib.request.urlopen(found, timeout=10))["experiment"]["tags"]
    finally:
        server.terminate()
        server.wait(120)
        server.stdout.close()
    assert f"mlflow.sharedViewState.{view}" in {tag["key"] for tag in tags}
    assert answer["runs"][0]["info"]["run_name"].startswith("digits-")


@pytest.mark.parametrize("line", CLUSTER)
def test_cluster_commands_name_files_that_exist(line):
    assert all((ROOT / word).is_file() for word in shlex.split(line) if word.endswith((".yaml", ".py")))


def test_no_command_is_left_untried():
    tried = [TRAINING, USING, SERVING, NEGATIVES, REPRODUCING, GOING_ON, CHAOS, BENCH, CLUSTER, ["ffdist ui"]]
    assert set(COMMANDS) == set().union(*tried)
    assert len(TRAINING) >= 4


def test_run_py_works_where_ray_submit_copies_it_and_joins_the_cluster(tmp_path, request):
    import ray

    stack = ExitStack()
    request.addfinalizer(stack.close)
    stack.enter_context(private_ray())
    stack.callback(ray.shutdown)
    ray.init("local", num_cpus=4, include_dashboard=False)  # a plain one, at the machine's address in its network
    shutil.copy(ROOT / "ffdist" / "run.py", tmp_path)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "run.py", "training.epochs=1", "digits", "model.layers=[20,20,20]"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert "0.5 CPU each" in run.stdout  # of this cluster's four for five actors, not of another's
    while ray.available_resources().get("CPU", 0) < 4:  # everything is given back, as Ray tells a moment later
        time.sleep(0.1)
