"""Every command and example of every README file is run: shortened by overrides, servers started, queried, stopped."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from torch import nn

from ffdist import train
from ffdist.cli import main
from ffdist.config.loading import load_config
from ffdist.ff import kernels
from ffdist.ff.forms import Form
from ffdist.ff.layers import Layer
from ffdist.ff.specs import LAYERS, LayerSpec
from ffdist.runtime.access import private_ray

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("ffdist/*/README.md")]
READMES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in FILES}
TEXT = "\n".join(READMES.values())
COMMANDS = list(dict.fromkeys("".join(re.findall(r"```sh\n(.*?)```", TEXT, re.S)).splitlines()))
YAML_EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
INLINE_COMMANDS = sorted(set(re.findall(r"`(ffdist [^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))))

RESUMING = ["ffdist resume RUN", "ffdist train digits --init-from RUN"]
OWN_DATA = [
    "ffdist train birds.yaml --dry-run",
    "ffdist train birds.yaml training.epochs=10",
    "ffdist train birds.yaml",
    "ffdist train flowers.yaml",
]
TRAINING = [
    line
    for line in COMMANDS
    if line.startswith(("ffdist train", "ffdist baseline", "python ffdist/run.py"))
    and line not in (*RESUMING, *OWN_DATA)
    and "--dry-run" not in line
]
USING = [line for line in COMMANDS if re.match(r"ffdist (evaluate|predict|plot|export|sync|runs|compare)\b", line)]
REMOVING = ["ffdist rm RUN"]
SHOWING = [
    line for line in COMMANDS if line.startswith("ffdist config") or ("--dry-run" in line and line not in OWN_DATA)
]
NEGATIVES = [line for line in COMMANDS if line.startswith(("ffdist negatives", "ffdist fit-readout", "ffdist results"))]
REPRODUCING = [line for line in COMMANDS if line.startswith("ffdist reproduce")]
BENCHMARKS = {line: line.split()[2] for line in COMMANDS if line.startswith("ffdist bench")}
RAY = [line for line in COMMANDS if line.startswith("ray ")]
UI, TOKEN, SIMULATED = "ffdist ui", "ray get-auth-token --generate", "ffdist chaos --simulated 2000 --seed 0"
PYTEST = [
    "pytest -m slow",
    "CUDA_VISIBLE_DEVICES=0 pytest tests/test_stage.py tests/test_transparency.py tests/test_local.py",
]
RUN_ELSEWHERE = {
    "ffdist chaos digits --faults 60 --seed 0": "test_chaos.py: test_every_kind_of_fault_is_survived",
    "mlflow models serve -m models:/NAME/1 --env-manager local --port 5001": "test_using.py: test_the_registered_model",
    "ray up cluster/local.yaml -y": "test_launching.py: test_ray_up_and_submit",
    "ray submit cluster/local.yaml ffdist/run.py -- digits": "test_launching.py: test_ray_up_and_submit",
    "ray job submit --no-wait -- python -m ffdist.run digits": "test_launching.py: test_a_job_over_two_nodes",
}
"""Commands that other tests run with other arguments."""
CHECKS = "ruff format --check . && ruff check . && lint-imports && mypy && pytest -n 2 --dist worksteal"
ONLY_PARSED = ["ray down cluster/local.yaml -y", "pip install -e '.[dev]'", CHECKS, ".ci/run"]
"""Commands that no test can run; tests/README.md gives the reasons."""
SHORT_BENCHMARKS = {
    "step": ["--units", "30", "--batch", "10"],
    "pipeline": ["model.layers=[20,10]", "--seconds", "0.1"],
    "peers": ["model.layers=[20,10]", "training.epochs=1", "--seconds", "0.1", "--error", "1", "--minutes", "0.01"],
    "growth": ["--units", "20", "--seconds", "0.1"],
    "convergence": ["training.epochs=1", "model.layers=[30,20]", "data.label=overwrite", "--error", "1"],
}


def test_no_command_is_left_untried():
    tried = [TRAINING, RESUMING, OWN_DATA, SHOWING, USING, REMOVING, NEGATIVES, REPRODUCING, BENCHMARKS, PYTEST]
    tried += [[UI, TOKEN, SIMULATED], RUN_ELSEWHERE, ONLY_PARSED]
    assert set(COMMANDS) == set().union(*tried)
    assert len(TRAINING) >= 8
    for where in RUN_ELSEWHERE.values():
        file, test = where.split(": ")
        assert f"def {test}" in (ROOT / "tests" / file).read_text()
    for line in (*RUN_ELSEWHERE, *ONLY_PARSED):
        assert f"`{line}`" in READMES["tests/README.md"]


def skip_without_kernels(line: str) -> None:
    if "fused" in line and not kernels.are_compiled():
        pytest.skip("needs compiled kernels; install a C compiler and then ffdist")


def arguments(line: str) -> list[str]:
    program, *rest = shlex.split(line)
    assert program == "ffdist"
    return [sys.executable, "-m", "ffdist.cli", *rest]


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """A tracking database that several runs share, because creating one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracked')}/mlflow.db"


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=[pytest.mark.slow] * (line.startswith("python") or "pipeline." in line))
        for line in TRAINING
        if "store" not in line
    ],
)
def test_training_commands(line, tmp_path, request, database, monkeypatch, ffdist):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    if "mnist" in line:
        request.getfixturevalue("mnist_root")
    skip_without_kernels(line)
    short = ["training.epochs=1", "model.layers=[40,30,20]", "tracking.artifacts=[]", "--summary", "summary.json"]
    if line.startswith("ffdist train") and "pipeline" not in line:  # one command with Ray is enough
        short += ["--runner", "serial"]
    program, *words = shlex.split(line)
    if program == "ffdist":
        ffdist(*words, *short)
    else:  # python, in a checkout
        for folder in ("ffdist", "configs"):
            shutil.copytree(ROOT / folder, tmp_path / folder)
        subprocess.run([sys.executable, *words, *short], check=True, timeout=250)
    assert 0 < json.loads((tmp_path / "summary.json").read_text())["test_balanced_error"] < 1


@pytest.mark.slow  # .ci/run runs the first line of the front page itself
def test_the_first_command_reaches_its_figures(tmp_path):
    """`ffdist train digits` as it is: at most 3% test error, predicted by goodness and by the readout."""
    assert READMES["README.md"].count("pip install . && ffdist train digits\n") == 1
    command = [*arguments("ffdist train digits"), "--summary", "summary.json"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_goodness_error"] <= 0.03
    assert summary["test_readout_error"] <= 0.03
    assert "ffdist ui" in run.stdout


def test_commands_for_negatives_in_their_order(tmp_path, ffdist):
    """Fills and shows a store, trains from it, fits a readout to the run, and prints the table of results."""
    before = [line for line in COMMANDS if line.startswith("ffdist negatives") or "store" in line]
    for line in [*before, "ffdist fit-readout RUN", "ffdist results"]:
        assert line in COMMANDS
        run_folder = next(tmp_path.glob("runs/digits-*"), Path())
        short = ["training.epochs=1", "model.layers=[40,30,20]"] if "digits" in line else []
        output = ffdist(*shlex.split(line.replace("RUN", str(run_folder)))[1:], *short)
    assert output.count("\ndigits\t") == 1


@pytest.mark.parametrize("line", REPRODUCING)
def test_commands_that_reproduce(line, ffdist):
    output = ffdist(*shlex.split(line)[1:], "--runner", "serial")
    assert "\nxor\t8\tnone\tnoise\t\t20\t\t0.00%, reached\t\t0.00%; 0.00% fitted\t" in output


def test_commands_that_use_a_run(tmp_path, ffdist):
    assert len(USING) == 9
    ffdist("train", "digits", "training.epochs=1", "model.layers=[40,30]", "--runner", "serial")
    run_folder = next(tmp_path.glob("runs/digits-*"))
    for file in ("images/black.png", "labeled/0/black.png"):
        (tmp_path / file).parent.mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / file)
    for line in USING:
        line = line.replace("RUN", str(run_folder)).replace("IMAGES", "images").replace("LABELED", "labeled")
        ffdist(*shlex.split(line)[1:])
    assert {"predictions.parquet", "pictures", "network"} < {path.name for path in tmp_path.iterdir()}
    for line in REMOVING:
        ffdist(*shlex.split(line.replace("RUN", str(run_folder)))[1:], "--yes")
    assert not run_folder.exists()


@pytest.mark.parametrize("line", SHOWING)
def test_commands_that_show_configurations(line, request, ffdist):
    if "--dry-run" in line:
        request.getfixturevalue("mnist_root")
    assert ffdist(*shlex.split(line)[1:]).count("\n") > 2


def test_own_data(tmp_path, ffdist):
    for name in ("birds", "flowers"):
        (example,) = {example for example in YAML_EXAMPLES if example.startswith(f"# {name}.yaml")}
        (tmp_path / f"{name}.yaml").write_text(example)
    (tmp_path / "flowers").mkdir()
    rows = [f"{number},{number % 2},{'iris' if number % 2 else 'rose'}" for number in range(9)]
    for split in ("train", "test"):
        (tmp_path / "flowers" / f"{split}.csv").write_text("\n".join(["height,width,species", *rows]))
    for split in ("train", "test"):
        for color in ("red", "blue"):
            folder = tmp_path / "birds" / split / color
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 30 + number), color).save(folder / f"{number}.png")
    short = ["training.epochs=1", "training.batch_size=4", "model.layers=[30,20]", "tracking.artifacts=[]"]
    for line in OWN_DATA:
        ffdist(*shlex.split(line)[1:], *short, "--runner", "serial")
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == len(OWN_DATA) - 1  # one is a dry run


def test_python_examples(tmp_path, monkeypatch):
    """One after the other, as in a notebook; the network of the training loop has learned."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n((?:from ffdist|import torch).*?)```", TEXT, re.S)
    assert len(examples) == TEXT.count("```python\n") - 9 == 3  # the others are tested below, and in test_module.py
    (training_loop,) = [example for example in examples if example.startswith("import torch")]
    names: dict[str, Any] = {}
    for example in examples:
        if example != training_loop:
            exec(example, names)
    assert names["run"].metrics["my/gap"]  # logged by the callback
    data = names["run"].dataset
    names |= {"images": data.samples["train"], "labels": data.labels["train"]}
    exec(training_loop, names)
    predicted = names["network"].predict(data.samples["test"]).label
    assert (predicted == data.labels["test"]).double().mean() > 0.9


@pytest.mark.slow  # test_tracker has nested runs, too
def test_a_sweep_in_a_notebook(tmp_path):
    (example,) = re.findall(r"```python\n(import mlflow.*?)```", TEXT, re.S)
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, timeout=250)
    client = MlflowClient(f"sqlite:///{tmp_path}/sweep.db")
    runs = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["alpha", "alpha 0.5", "alpha 1", "alpha 2"]


def test_an_exported_program(tmp_path, ffdist):
    (example,) = re.findall(r"```python\n(import json.*?)```", TEXT, re.S)
    short = ["training.epochs=1", "model.layers=[9,8]", "tracking.uri=none", "tracking.artifacts=[]"]
    ffdist("train", "digits", *short, "--runner", "serial")
    ffdist("export", *(tmp_path / "runs").glob("digits-*"), "--output", "network")
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, timeout=250, capture_output=True)
    assert b"[1, 8, 8]" in run.stdout


def test_own_arrays_and_own_functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (arrays,) = re.findall(r"```python\n(from sklearn.*?)```", TEXT, re.S)
    names: dict[str, Any] = {}
    exec(arrays, names)
    assert names["run"].summary["test_goodness_error"] < 0.2
    (function,) = re.findall(r"```python\n(# clouds.py.*?)```", TEXT, re.S)
    (tmp_path / "clouds.py").write_text(function)
    (data,) = re.findall(r"for data: (\{.*\})", function)
    config = load_config("digits", [f"data={data}", "training.epochs=5", "tracking.artifacts=[]"])
    assert train(config, runner="serial", runs=tmp_path).summary["test_goodness_error"] < 0.3


def test_a_kind_of_layers(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(@dataclass.*?)```", TEXT, re.S)
    names: dict[str, Any] = {"dataclass": dataclass, "LayerSpec": LayerSpec, "Layer": Layer, "Form": Form, "nn": nn}
    exec(example, names)
    monkeypatch.setitem(LAYERS, "low_rank", names["LowRank"])
    layers = "model.layers=[{kind: low_rank, units: 40, rank: 9}, 30]"
    config = load_config("digits", [layers, "training.epochs=10", "training.optimizer=adam", "tracking.artifacts=[]"])
    assert train(config, runner="serial", runs=tmp_path).summary["test_goodness_error"] < 0.5


@pytest.mark.slow  # test_access has a user-defined function, too
def test_a_user_defined_kind_of_negatives(tmp_path):
    """The example is imported from the working directory, by actors as well."""
    (example,) = re.findall(r"```python\n(# mirrors.py.*?)```", TEXT, re.S)
    (tmp_path / "mirrors.py").write_text(example)
    short = ["training.epochs=1", "model.layers=[40,30]", "data.label=none", "negatives.kind=mirrors:mirrored"]
    command = [Path(sys.executable).parent / "ffdist", "train", "digits", *short]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("example", YAML_EXAMPLES)
def test_yaml_examples_are_configurations(example, tmp_path):
    (tmp_path / "example.yaml").write_text(example)
    load_config(str(tmp_path / "example.yaml"))


def test_a_stopped_run_is_resumed_and_another_starts_from_it(tmp_path, ffdist):
    short = ["--runner", "serial", "training.epochs=60", "model.layers=[40,30,20]", "checkpoint.every_minibatches=50"]
    short += ["tracking.artifacts=[]"]
    process = subprocess.Popen([*arguments("ffdist train digits"), *short], cwd=tmp_path)
    while not (manifests := list(tmp_path.glob("runs/digits-*/checkpoints/*/manifest.json"))):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(120) == 130
    for line, text in zip(RESUMING, ("resuming from", "starting from"), strict=True):
        settings = short if "train" in line else []
        assert text in ffdist(*shlex.split(line.replace("RUN", str(manifests[0].parents[2])))[1:], *settings)
    assert len(list(tmp_path.glob("runs/digits-*"))) == 2


def test_simulated_faults(ffdist):
    ffdist(*shlex.split(SIMULATED)[1:], "--simulated", "20")


@pytest.mark.slow
@pytest.mark.parametrize(("line", "name"), BENCHMARKS.items())
def test_benchmarks(line, name, request, monkeypatch, ffdist):
    if "cuda" in line and not torch.cuda.is_available():
        pytest.skip("needs a GPU; set CUDA_VISIBLE_DEVICES=0")
    skip_without_kernels(line)
    if "mnist" in line:
        request.getfixturevalue("mnist_root")
    monkeypatch.setattr("ffdist.bench.step.ROUND_S", 0.001)
    monkeypatch.setattr("ffdist.bench.growth.SIZES", ((1, 1), (2, 1)))
    monkeypatch.setattr("ffdist.bench.growth.NUM_ROUNDS", 1)
    ffdist(*shlex.split(line)[1:], *SHORT_BENCHMARKS[name])


def test_ui_shows_a_finished_run(tmp_path, free_port, ffdist):
    ffdist("train", "digits", "--runner", "serial", "training.epochs=1")
    server = subprocess.Popen(
        [*arguments(UI), "--port", str(free_port)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = server.stdout.readline()
        page = rf"starting at (http://127.0.0.1:{free_port})/#/experiments/(\d+)/runs\?.*viewStateShareKey=(\w+)\n"
        address, experiment, view = re.fullmatch(page, line).groups()
        url, body = f"{address}/api/2.0/mlflow/runs/search", json.dumps({"experiment_ids": [experiment]}).encode()
        deadline = time.monotonic() + 120
        while True:
            try:
                request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
                answer = json.load(urllib.request.urlopen(request, timeout=10))
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(1)
        url = f"{address}/api/2.0/mlflow/experiments/get?experiment_id={experiment}"
        tags = json.load(urllib.request.urlopen(url, timeout=10))["experiment"]["tags"]
    finally:
        server.terminate()
        server.wait(120)
        server.stdout.close()
    assert f"mlflow.sharedViewState.{view}" in {tag["key"] for tag in tags}
    assert answer["runs"][0]["info"]["run_name"].startswith("digits-")


@pytest.mark.parametrize("line", RAY)
def test_ray_commands_are_valid_and_name_existing_files(line):
    from ray.scripts.scripts import cli

    command, words = cli, shlex.split(line)[1:]
    assert all((ROOT / word).is_file() for word in words if word.endswith((".yaml", ".py")))
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


def test_a_token_is_generated(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "ray.scripts.scripts", *TOKEN.split()[1:]]
    run = subprocess.run(
        command, env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=200, check=True
    )
    assert (tmp_path / ".ray" / "auth_token").read_text().strip() == run.stdout.strip() != ""


@pytest.mark.slow
def test_run_py_works_where_ray_submit_copies_it_and_joins_the_cluster(tmp_path, request):
    import ray

    stack = ExitStack()
    request.addfinalizer(stack.close)
    stack.enter_context(private_ray())
    stack.callback(ray.shutdown)
    ray.init("local", num_cpus=4, include_dashboard=False)  # at the machine's address in its network
    shutil.copy(ROOT / "ffdist" / "run.py", tmp_path)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "run.py", "training.epochs=1", "digits", "model.layers=[20,20,20]"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert "0.5 CPU each" in run.stdout  # five actors share the four CPUs of this cluster
    while ray.available_resources().get("CPU", 0) < 4:  # Ray reports a moment later that all are free
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("line", PYTEST)
def test_pytest_commands_find_tests(line):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-euc", f"{line} --collect-only -q -p no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr


def test_commands_for_developers_are_those_of_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for command in CHECKS.split(" && ")[:-1])
    assert "pip install -q '.[dev]'" in ci
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert READMES["README.md"].count("\n    python3 -m venv ") == 2  # which .ci/run runs


@pytest.mark.parametrize("span", INLINE_COMMANDS)
def test_commands_in_sentences_exist(span):
    command, words = main, shlex.split(span)[1:]
    while isinstance(command, click.Group) and words:
        command = command.commands[words.pop(0)]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= options


@pytest.mark.parametrize("name", READMES)
def test_links_lead_to_existing_files_and_headings(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", READMES[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, target
