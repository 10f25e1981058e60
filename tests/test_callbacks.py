"""Callbacks see a run, log metrics and can end it at a validation; they cannot change it in another way."""

import sys
from pathlib import Path

import pytest

from ffdist import Callback, Config, ConfigError, Run, load_config, train
from ffdist.checkpoint.checkpoints import MANIFEST
from ffdist.errors import RunFailed
from ffdist.training.callbacks import load_callbacks

SHORT = [
    *("model.layers=[30,20]", "training.epochs=6", "training.validation_samples=200"),
    *("training.validate_every_epochs=2", "tracking.log_every_minibatches=24", "pipeline.chunk_size=24"),
    *("tracking.artifacts=[]", "checkpoint.every_minibatches=10"),
]
EPOCH_SAMPLES = 24 * 50


def make_config(*changes: str) -> Config:
    return load_config("digits", [*SHORT, *changes])


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Run:
    return train(make_config(), runner="serial", runs=tmp_path_factory.mktemp("runs"))


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def on_chunk(self, run, metrics):
        self.events.append(("chunk", run.step, metrics))

    def on_evaluation(self, run, split, errors):
        self.events.append((split, run.epoch, errors))

    def on_checkpoint(self, run, path):
        assert (Path(path) / MANIFEST).is_file()
        self.events.append(("checkpoint", run.step, path))

    def on_end(self, run, summary):
        assert not (run.folder / "summary.json").exists()
        self.events.append(("end", run.samples, summary))


def test_callback_gets_the_events_with_the_names_and_values_of_the_metrics(tmp_path):
    recorder = Recorder()
    run = train(make_config(), runner="serial", runs=tmp_path, callbacks=[recorder])
    chunks = [event for event in recorder.events if event[0] == "chunk"]
    assert [step for _, step, _ in chunks] == [24 * epoch for epoch in range(1, 7)]  # a chunk is an epoch here
    for _, step, metrics in chunks:
        assert {"layer_1/loss", "layer_2/pairwise_error", "readout/error"} < metrics.keys()
        for name, value in metrics.items():
            assert (step * 50, value) in run.metrics[name]  # which also average over an epoch
    validations = [event for event in recorder.events if event[0] == "validation"]
    assert [epoch for _, epoch, _ in validations] == [2, 4, 6]
    (test,) = (errors for split, _, errors in recorder.events if split == "test")
    for samples, errors in [(2 * EPOCH_SAMPLES, validations[0][2]), (6 * EPOCH_SAMPLES, test)]:
        assert {name: dict(run.metrics[name])[samples] for name in errors} == errors
    assert {"test/balanced_error", "test/class_3_error", "test/layer_1_error"} < test.keys()
    assert [path for name, _, path in recorder.events if name == "checkpoint"][-1].endswith("0006-000000")
    name, samples, summary = recorder.events[-1]
    assert (name, samples, summary) == ("end", 6 * EPOCH_SAMPLES, run.summary)


class Vandal(Callback):
    """Changes everything that it gets."""

    def on_chunk(self, run, metrics):
        run.config.model.layers.clear()
        metrics.clear()

    def on_evaluation(self, run, split, errors):
        errors.update(dict.fromkeys(errors, 0.0))

    def on_end(self, run, summary):
        summary.clear()


def test_callback_gets_copies(reference, tmp_path):
    run = train(make_config(), runner="serial", runs=tmp_path, callbacks=[Vandal(), recorder := Recorder()])
    for key in ("weights_sha256", "checkpoint", "test_goodness_error", "class_errors"):
        assert run.summary[key] == reference.summary[key]
    assert run.metrics["validation/goodness_error"] == reference.metrics["validation/goodness_error"]
    assert recorder.events[0][2]


class Logger(Callback):
    def on_chunk(self, run, metrics):
        run.log({"my/double loss": 2 * metrics["layer_1/loss"]})


def test_metrics_of_a_callback_are_logged_like_others(reference, tmp_path):
    run = train(make_config(), runner="serial", runs=tmp_path, callbacks=[Logger()])
    losses = reference.metrics["layer_1/loss"]
    assert run.metrics["my/double loss"] == [(samples, 2 * loss) for samples, loss in losses]


class LogOnce(Callback):
    def __init__(self, metrics):
        self.metrics = metrics

    def on_evaluation(self, run, split, errors):
        run.log(self.metrics)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"layer_1/loss": 1.0}, "ConfigError: ffdist itself may log the metric layer_1/loss; choose another name"),
        ({"samples_per_s": 1.0}, "choose another name, such as my/samples_per_s"),
        ({"a?": 1.0}, r"letters, digits, spaces .*given: 'a\?'"),
        ({"../a": 1.0}, "letters, digits, spaces"),
        ({"x" * 251: 1.0}, "at most 250"),
        ({"my/value": "much"}, "ValueError: could not convert string to float"),
    ],
)
def test_invalid_metric_of_a_callback_ends_the_run_and_names_it(metrics, message, tmp_path):
    with pytest.raises(
        RunFailed, match=rf"^callback test_callbacks:LogOnce failed in on_evaluation \(.*{message}.*ffdist\.resume"
    ):
        train(make_config(), runner="serial", runs=tmp_path, callbacks=[LogOnce(metrics)])


def test_names_that_only_look_like_those_of_ffdist_are_accepted(tmp_path):
    metrics = {"layers": 1.0, "layer_a/loss": 2.0, "samples_per_second": 3.0, "my/test": 4.0}
    run = train(make_config(), runner="serial", runs=tmp_path, callbacks=[LogOnce(metrics)])
    assert {name: run.metrics[name][0][1] for name in metrics} == metrics


class Stopper(Callback):
    """Requests a stop at the first chunk or evaluation after a number of minibatches."""

    def __init__(self, step, method="on_chunk"):
        self.step, self.method = step, method

    def on_chunk(self, run, metrics):
        if self.method == "on_chunk" and run.step >= self.step:
            run.stop("enough")

    def on_evaluation(self, run, split, errors):
        if self.method == "on_evaluation" and run.step >= self.step:
            run.stop("enough")


@pytest.mark.parametrize("pace", ["pipeline.chunk_size=1", "pipeline.chunk_size=7", "pipeline.stages=2"])
def test_stop_takes_effect_at_the_next_validation_for_any_chunks_and_stages(pace, tmp_path):
    run = train(make_config(pace), runner="serial", runs=tmp_path, callbacks=[Stopper(24 * 2 + 1)])
    assert (run.summary["stopped"], run.summary["epochs"]) == ("enough, at epoch 4", 4)
    whole = train(make_config("checkpoint.keep_last=9"), runner="serial", runs=tmp_path)
    files, expected = (
        Run.find(each.folder, checkpoint="0004-000000").checkpoint.manifest.files for each in (run, whole)
    )
    assert files == expected


def test_stop_at_a_validation_takes_effect_there(tmp_path):
    callbacks = [Stopper(24 * 2, "on_evaluation")]
    run = train(make_config(), runner="serial", runs=tmp_path, callbacks=callbacks)
    assert (run.summary["stopped"], run.summary["epochs"]) == ("enough, at epoch 2", 2)


@pytest.mark.slow  # early stopping over Ray is tested elsewhere
def test_stop_over_ray(ray_start_4_cpus, tmp_path):
    serial, ray = (
        train(make_config("pipeline.chunk_size=5"), runner=runner, runs=tmp_path, callbacks=[Stopper(49)])
        for runner in ("serial", "ray")
    )
    assert ray.summary["epochs"] == 4
    for key in ("weights_sha256", "checkpoint", "stopped", "test_goodness_error"):
        assert ray.summary[key] == serial.summary[key]


def test_stop_without_a_validation_is_an_error(tmp_path):
    config = make_config("training.validation_samples=0")
    with pytest.raises(RunFailed, match=r"Stopper failed in on_chunk .*this run has none; set training\.validation"):
        train(config, runner="serial", runs=tmp_path, callbacks=[Stopper(1)])


class Broken(Callback):
    def __init__(self, method, step=0):
        setattr(self, method, self.fail)
        self.step = step

    def fail(self, run, *args):
        if run.step >= self.step:
            raise KeyError("a mistake")


@pytest.mark.parametrize(
    ("method", "step"), [("on_chunk", 100), ("on_evaluation", 96), ("on_checkpoint", 60), ("on_end", 0)]
)
def test_run_with_a_failed_callback_can_be_resumed_without_it(method, step, reference, tmp_path):
    config = make_config("pipeline.chunk_size=5")
    with pytest.raises(
        RunFailed, match=rf"^callback test_callbacks:Broken failed in {method} \(KeyError: 'a mistake'\); resume with"
    ):
        train(config, runner="serial", runs=tmp_path, callbacks=[Broken(method, step)])
    (config_file,) = tmp_path.glob("*/config.yaml")
    run = train(config, runner="serial", runs=tmp_path, resume=config_file.parent)
    for key in ("weights_sha256", "checkpoint", "test_goodness_error"):
        assert run.summary[key] == reference.summary[key]


MODULE = """
from ffdist import Callback

class Named(Callback):
    def on_evaluation(self, run, split, errors):
        run.log({"named/epoch": run.epoch})

class NeedsArguments(Callback):
    def __init__(self, number):
        pass

class NoCallback:
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user in the working directory."""
    (tmp_path / "user_callbacks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "user_callbacks"
    sys.modules.pop("user_callbacks", None)


def test_configuration_names_callbacks_that_only_training_imports(module, tmp_path, ffdist):
    config = make_config(f"training.callbacks=['{module}:Named']")
    run = train(config, runner="serial", runs=tmp_path)
    assert [value for _, value in run.metrics["named/epoch"]] == [2, 4, 6]
    (tmp_path / "user_callbacks.py").unlink()
    sys.modules.pop(module)
    ffdist("evaluate", run.folder)
    ffdist("plot", run.folder, "--output", "plots")
    assert module not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_callbacks:NeedsArguments", "must be package.module:Class, without arguments .*TypeError"),
        ("user_callbacks:NoCallback", r"an object of a subclass of ffdist\.Callback \(given: <user_callbacks"),
        ("user_callbacks:Missing", "user_callbacks:Missing must be package.module:Class.*AttributeError"),
        ("user_callbacks", "user_callbacks must be package.module:Class"),
        ("nowhere:Class", "ModuleNotFoundError: No module named 'nowhere'"),
        ("", "must be package.module:Class"),
    ],
)
def test_invalid_callback_is_an_error_before_anything_starts(name, message, module, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(make_config(f"training.callbacks=['{name}']"), runner="serial", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


class StopsAtACheckpoint(Callback):
    def on_checkpoint(self, run, path):
        run.stop("saved")


def test_stop_when_a_checkpoint_is_complete_is_refused_because_that_time_depends_on_the_machine(tmp_path):
    with pytest.raises(RunFailed, match=r"failed in on_checkpoint .*depends on the machine; call stop in on_chunk"):
        train(make_config(), runner="serial", runs=tmp_path, callbacks=[StopsAtACheckpoint()])


def test_class_in_place_of_an_object_is_an_error():
    with pytest.raises(ConfigError, match=r"an object of a subclass of ffdist\.Callback .*Recorder"):
        load_callbacks([], [Recorder])


def test_resumed_run_may_have_other_callbacks(module, reference, tmp_path, capsys):
    with pytest.raises(RunFailed):
        train(make_config(), runner="serial", runs=tmp_path, callbacks=[Broken("on_evaluation")])
    (config_file,) = tmp_path.glob("*/config.yaml")
    config = make_config(f"training.callbacks=['{module}:Named']")
    run = train(config, runner="serial", runs=tmp_path, resume=config_file.parent)
    assert "the run was started with the callbacks test_callbacks:Broken; give them" in capsys.readouterr().out
    assert run.summary["weights_sha256"] == reference.summary["weights_sha256"]
    assert run.metrics["named/epoch"]
