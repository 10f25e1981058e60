"""Layers that are modules of the user; two of them are the examples of the documentation."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import forget_end
from torch import nn

from ffdist import ConfigError, Run, load_config, train
from ffdist.runs.export import export_network
from ffdist.runs.folder import unconfirmed_settings
from ffdist.training.prepare import prepare

README = Path(__file__).parent.parent / "ffdist" / "ff" / "README.md"
SHORT = [
    *("training.epochs=2", "training.objective=classifier", "tracking.artifacts=[]", "training.precision=float32"),
    *("training.optimizer=adamw", "training.learning_rate=0.005", "data.label=none", "negatives.kind=none"),
]
LAYERS = (
    "[{kind: module, name: 'blocks:Residual', options: {inputs: 1, channels: 4}},"
    " {kind: module, name: 'blocks:Patches', options: {inputs: 4, width: 8}}, 30]"
)


@pytest.fixture(scope="module", autouse=True)
def blocks(tmp_path_factory):
    """The examples of the documentation, as an importable module."""
    folder = tmp_path_factory.mktemp("modules")
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "class Patches" in text)
    (folder / "blocks.py").write_text(code)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("blocks", None)


class Mapping(nn.Module):
    def __init__(self, output=None, fails=False):
        super().__init__()
        self.output = output
        if fails:
            raise RuntimeError("no such size")

    def forward(self, samples):
        return (
            samples.flatten(1)
            if self.output is None
            else {"pair": (samples, samples), "scalar": samples.sum()}[self.output]
        )


def make_evil(path):
    Path(path).touch()
    return nn.Identity()


class Residue(nn.Module):
    """Changes its input in place, and has values that are not part of its state."""

    def __init__(self):
        super().__init__()
        self.linear, self.shift = nn.Linear(64, 64), torch.rand(64)

    def forward(self, samples):
        return self.linear(samples.flatten(1).mul_(0.5)) + self.shift.to(samples.device)


class Put(nn.Module):
    """Has an operation without a deterministic implementation."""

    def forward(self, samples):
        places = torch.zeros(64, dtype=torch.int64, device=samples.device)
        return samples.flatten(1).clone().put_(places, torch.ones(64, device=samples.device))


@pytest.fixture(scope="module")
def run(blocks, tmp_path_factory):
    config = load_config("digits", [*SHORT, f"model.layers={LAYERS}"])
    return train(config, runner="serial", runs=tmp_path_factory.mktemp("runs"))


def test_modules_learn_and_their_buffers_are_part_of_the_network(run):
    assert run.summary["test_goodness_error"] < 0.4
    state = run.network.layers[0].state_dict()
    assert state["module.block.0.num_batches_tracked"] == 2 * 28
    assert run.network.layers[1].module.block.linear1.weight.shape == (16, 8)
    architecture = run.network.architecture
    assert [form.shape for form in architecture.forms] == [(1, 8, 8), (4, 8, 8), (16, 8), (30,)]
    for index in range(2):
        assert architecture.layers[index].num_parameters(architecture.forms[index]) == sum(
            each.numel() for each in run.network.layers[index].module.parameters()
        )


def test_runs_with_any_number_of_stages_and_chunks_are_equal(run, ray_start_4_cpus, tmp_path):
    """Dropout and batch norm included."""
    digests = {run.summary["weights_sha256"]}
    for runner, stages, chunk in (("serial", 1, 7), ("ray", 3, 5)):
        pace = [f"pipeline.stages={stages}", f"pipeline.chunk_size={chunk}", f"model.layers={LAYERS}"]
        config = load_config("digits", [*SHORT, *pace])
        digests.add(train(config, runner=runner, address=None, runs=tmp_path).summary["weights_sha256"])
    assert len(digests) == 1


def test_run_is_resumed_with_the_same_result(run, tmp_path):
    settings = [*SHORT, f"model.layers={LAYERS}", "checkpoint.every_minibatches=10", "checkpoint.keep_last=50"]
    stopped = train(load_config("digits", [*settings, "pipeline.chunk_size=5"]), runner="serial", runs=tmp_path)
    forget_end(stopped, 3)
    resumed = train(load_config("digits", settings), runner="serial", runs=tmp_path, resume=stopped.folder)
    assert resumed.summary["weights_sha256"] == run.summary["weights_sha256"]


def test_training_leaves_the_generator_of_torch_as_it_was(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(
        load_config("digits", [*SHORT, "training.epochs=1", f"model.layers={LAYERS}"]), runner="serial", runs=tmp_path
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_exported_program_needs_no_module_of_the_user(run, tmp_path):
    export_network(run, tmp_path / "out")
    samples = run.dataset.samples["test"][:20]
    torch.save((samples.view(20, 1, 8, 8), run.predict(samples).label), tmp_path / "expected.pt")
    program = (
        "import torch; samples, label = torch.load('expected.pt')\n"
        "program = torch.export.load('out/classifier.pt2').module()\n"
        "assert torch.equal(program(samples)[0], label)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_folder_of_a_run_causes_no_import(run, blocks):
    program = (
        "import sys; from ffdist import Run, ConfigError\n"
        "run = Run.find(sys.argv[1])\n"
        "try: run.network\n"
        "except ConfigError as error: print(error)\n"
        "assert 'blocks' not in sys.modules\n"
        "sys.path.insert(0, sys.argv[2]); import blocks\n"
        "print(len(Run.find(sys.argv[1]).network.layers))"
    )
    command = [sys.executable, "-c", program, str(run.folder), str(blocks)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "blocks is not imported, and the folder of a run must not cause imports; import it first" in output
    assert output.endswith("\n3\n")


def test_interrupted_run_has_to_repeat_its_modules(run, tmp_path, ffdist):
    shutil.copytree(run.folder, tmp_path / "half")
    (tmp_path / "half" / "summary.json").unlink()
    assert "names code to import or a tracking server (model.layers)" in ffdist("resume", "half", code=2)


def write_example(folder, name):
    """Writes an example of the documentation, as an importable module."""
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if f"# {name}.py" in text)
    (folder / f"{name}.py").write_text(code)


def test_objective_of_the_user_trains_in_one_and_in_several_stages(blocks, ray_start_4_cpus, tmp_path):
    write_example(blocks, "hinges")
    settings = ["training.epochs=3", "tracking.artifacts=[]", "training.objective=hinges:Hinge", "model.layers=[60,50]"]
    runs = [
        train(
            load_config("digits", [*settings, f"pipeline.stages={stages}"]), runner=runner, address=None, runs=tmp_path
        )
        for runner, stages in (("serial", 1), ("ray", 2))
    ]
    assert len({run.summary["weights_sha256"] for run in runs}) == 1
    program = "import sys; from ffdist import Run; Run.find(sys.argv[1]).network"
    command = [sys.executable, "-c", program, str(runs[0].folder)]
    error = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "training.objective=hinges:Hinge cannot be used (ImportError: hinges is not imported" in error


def test_a_layer_has_its_own_loss_with_parameters(blocks, tmp_path):
    write_example(blocks, "centers")
    layers = "[{kind: conv, channels: 8, objective: 'centers:Centers'}, 100]"
    runs = [
        train(
            load_config("digits", [*SHORT, f"model.layers={layers}", f"pipeline.stages={stages}"]),
            runner="serial",
            runs=tmp_path,
        )
        for stages in (1, 2)
    ]
    assert len({run.summary["weights_sha256"] for run in runs}) == 1
    assert runs[0].network.layers[0].objective.centers.abs().max() > 0
    assert runs[0].summary["layer_errors"][0] < 0.5
    assert unconfirmed_settings(runs[0].config)["model.layers"][0]["objective"] == "centers:Centers"


@pytest.mark.parametrize("name", ["test_module:make_evil", "subprocess:Popen", "builtins:__import__"])
def test_folder_of_a_run_calls_only_modules_of_torch(name, run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "copy")
    config = tmp_path / "copy" / "config.yaml"
    text = config.read_text().replace("blocks:Residual", name)
    config.write_text(text.replace("inputs: 1", f"path: {tmp_path}/ran").replace("channels: 4", "args: [touch, ran]"))
    assert name in config.read_text()
    with pytest.raises(ConfigError, match="must be a subclass of"):
        Run.find(tmp_path / "copy").network  # noqa: B018
    assert not (tmp_path / "ran").exists()


def test_module_that_changes_its_input_and_has_values_beside_its_state(tmp_path):
    layers = "model.layers=[30, {kind: module, name: 'torch.nn:Linear', options: {in_features: 30, out_features: 64}}, "
    layers += "{kind: module, name: 'test_module:Residue'}, 20]"
    runs = []
    for stages in (1, 4):
        config = load_config("digits", [*SHORT, "training.epochs=1", layers, f"pipeline.stages={stages}"])
        runs.append(train(config, runner="serial", runs=tmp_path))
    assert len({run.summary["weights_sha256"] for run in runs}) == 1
    samples, labels = runs[0].dataset.samples["test"], runs[0].dataset.labels["test"]
    assert runs[0].evaluate(samples, labels).layer_errors == runs[0].summary["layer_errors"]


def test_command_line_imports_a_module_that_is_named(run, blocks, tmp_path):
    command = [sys.executable, "-m", "ffdist.cli", "evaluate", str(run.folder)]
    refused = subprocess.run(command, cwd=blocks, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "import it first, on the command line by --import blocks" in refused.stderr
    output = subprocess.run([*command, "--import", "blocks"], cwd=blocks, capture_output=True, text=True, check=True)
    assert f"test error {run.summary['test_goodness_error']:.2%} by goodness" in output.stdout


def test_baseline_with_dropout_is_repeatable(tmp_path):
    config = load_config("digits", [*SHORT, "training.epochs=1", f"model.layers={LAYERS}"])
    digests = {train(config, runner="backpropagation", runs=tmp_path).summary["weights_sha256"] for _ in range(2)}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("hinge", "training.objective must be one of goodness, class_goodness, classifier, or package.module:Class"),
        ("nowhere:Hinge", "training.objective=nowhere:Hinge cannot be used (ModuleNotFoundError"),
        ("test_module:Mapping", "it must be a subclass of ffdist.ff.objectives.Objective"),
    ],
)
def test_errors_of_an_objective_name_it(objective, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(load_config("digits", [f"training.objective={objective}"]))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{kind: module, name: Mapping}", r"name must be package\.module:Class \(given: 'Mapping'\)"),
        ("{kind: module, name: 'a:B', options: [1]}", "options must be the arguments of the class by name"),
        ("{kind: module, name: 'a:B', options: {1: 2}}", "options must be the arguments of the class by name"),
        ("{kind: module, name: '__main__:B'}", "a class in a module file"),
        ("{kind: module, name: 'torch.nn:LazyLinear', options: {out_features: 3}}", "lazy parameters have no size"),
        ("{kind: module, name: 'nowhere:Mapping'}", "layer 1 nowhere:Mapping cannot be created .*No module named"),
        ("{kind: module, name: 'test_module:make_evil'}", r"must be a subclass of torch\.nn\.modules\.module\.Module"),
        ("{kind: module, name: 'test_module:Mapping', options: {fails: true}}", "RuntimeError: no such size"),
        ("{kind: module, name: 'test_module:Mapping', options: {output: pair}}", r"must return a tensor .*B=2: tuple"),
        ("{kind: module, name: 'test_module:Mapping', options: {output: scalar}}", r"returned for B=2: \[\]"),
        ("{kind: module, name: 'blocks:Patches', options: {inputs: 3}}", r"samples of the shape \[1, 8, 8\]"),
    ],
)
def test_errors_of_a_module_name_it(entry, message):
    with pytest.raises(ConfigError, match=message):
        prepare(load_config("digits", [*SHORT, f"model.layers=[{entry}]"]))


def test_module_without_parameters_and_the_label_in_its_input(tmp_path):
    layers = "model.layers=[{kind: module, name: 'test_module:Mapping'}, 20]"
    settings = ["training.epochs=1", "tracking.artifacts=[]", layers]
    with pytest.raises(ConfigError, match=r"cannot read the 10 label values beside its input; set data\.label"):
        prepare(load_config("digits", settings))
    run = train(load_config("digits", [*settings, "data.label=overwrite"]), runner="serial", runs=tmp_path)
    assert run.summary["test_goodness_error"] is not None
    assert isinstance(Run.find(run.folder).network.layers[0].module, Mapping)


@pytest.mark.parametrize("fills", [True, False])
def test_an_operation_that_is_not_deterministic_is_an_error_that_names_it(fills, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fills)
    config = load_config("digits", [*SHORT, "model.layers=[{kind: module, name: 'test_module:Put'}, 20]"])
    with pytest.raises(
        Exception, match="Put uses the operation put_, which has no deterministic implementation on cpu"
    ):
        train(config, runner="serial", runs=tmp_path)
    assert torch.utils.deterministic.fill_uninitialized_memory == fills
    assert not torch.are_deterministic_algorithms_enabled()
