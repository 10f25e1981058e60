import pytest
import torch
from mlflow import MlflowClient

from ffdist import ConfigError, Run, load_config, load_network, train
from ffdist.data.datasets import load_dataset
from ffdist.runs.folder import checkpoints_of
from ffdist.tracking.server import default_uri

NO_ARTIFACTS = "tracking.artifacts=[]"
SHORT = [
    *(
        "model.layers=[40,30]",
        "training.epochs=6",
        "training.validation_samples=200",
        "training.validate_every_epochs=1",
    ),
    NO_ARTIFACTS,
]


@pytest.fixture(scope="module")
def config_and_run(tmp_path_factory):
    """A run whose layers do not learn: the first checkpoint is the best by goodness, but the readout improves."""
    config = load_config("digits", [*SHORT, "training.learning_rate=0", "tracking.artifacts=[model]"])
    return config, train(config, runner="serial", runs=tmp_path_factory.mktemp("runs"))


def test_best_and_last_checkpoints_are_kept(config_and_run):
    config, run = config_and_run
    best, checkpoints = run.summary["best_checkpoint"], checkpoints_of(config, run.folder)
    errors = {name: checkpoints.read_manifest(name).validation_error for name in checkpoints.names()}
    names = list(errors)
    assert names[-1] == "0006-000000"
    assert best == checkpoints.path(names[0]) != checkpoints.path(names[-1])
    assert errors[names[0]] == min(errors.values())


def test_results_and_model_belong_to_the_best_checkpoint(config_and_run):
    """Commands use the best checkpoint too, unless another one is chosen."""
    _, run = config_and_run
    test_set = run.dataset.samples["test"], run.dataset.labels["test"]
    best, last = Run.find(run.folder), Run.find(run.folder, checkpoint="last")
    assert run.summary["checkpoint"] == best.checkpoint.name == run.checkpoint.name
    assert (best.checkpoint.kind, last.checkpoint.kind, last.checkpoint.name) == ("best", "last", "0006-000000")
    assert best.evaluate(*test_set).readout_error == pytest.approx(run.summary["test_readout_error"], abs=1.5 / 360)
    assert last.evaluate(*test_set).readout_error < run.summary["test_readout_error"] - 0.02
    (network_file,) = run.folder.parent.glob("artifacts/**/network.json")
    images = test_set[0][:50]
    assert torch.equal(load_network(network_file.parent)(images), best.network(images))
    assert not torch.equal(best.network(images), last.network(images))


def test_commands_print_and_accept_the_checkpoint_to_use(config_and_run, tmp_path, ffdist):
    _, run = config_and_run
    runs, best = ["--runs", run.folder.parent], run.summary["checkpoint"]
    outputs = {name: ffdist("evaluate", run.folder, "--checkpoint", name) for name in ("best", "last", best)}
    assert f"checkpoint: best, {run.folder}/checkpoints/{best}" in outputs["best"] == outputs[best]
    assert f"checkpoint: last, {run.folder}/checkpoints/0006-000000" in outputs["last"]
    assert ffdist("evaluate", run.folder) == outputs["best"]
    assert f"best, last or the name of one (given: x, {run.folder}/checkpoints has: {best}, " in ffdist(
        "evaluate", run.folder, "--checkpoint", "x", code=2
    )
    start = ["train", "digits", "model.layers=[40,30]", "--runner", "serial", "training.epochs=1", NO_ARTIFACTS, *runs]
    assert "give" in ffdist("plot", run.folder, "--checkpoint", "last", code=2)
    assert "--checkpoint needs --init-from RUN" in ffdist(*start, "--checkpoint", "last", code=2)
    for name, options in (("best", []), ("last", ["--checkpoint", "last"])):
        output = ffdist(*start, "training.learning_rate=0", "--init-from", run.folder, *options)
        assert f"starting from checkpoint: {name}, " in output
        assert "(last)" in output  # the new run is not validated
        assert "is far worse than the readout" in output  # because its layers never learned


def test_train_prints_the_checkpoint_of_its_results(config_and_run, tmp_path, capsys):
    _, run = config_and_run
    assert run.summary["best_checkpoint"].endswith(run.summary["checkpoint"])
    config = load_config("xor", ["training.epochs=1", NO_ARTIFACTS])
    short_run = train(config, runner="serial", runs=tmp_path)
    assert "checkpoint      0001-000000 (last)" in capsys.readouterr().out
    assert (short_run.summary["checkpoint"], short_run.summary["best_checkpoint"]) == ("0001-000000", None)
    with pytest.raises(ConfigError, match="no best checkpoint, because the run was not validated"):
        _ = Run.find(short_run.folder, checkpoint="best").network


def test_fitted_readout_error_is_saved_only_for_the_reported_checkpoint(config_and_run, ffdist):
    _, run = config_and_run
    output = ffdist("fit-readout", run.folder, "--checkpoint", "last")
    assert "by a readout fitted" in output
    assert Run.find(run.folder).summary["test_fitted_readout_error"] is None
    ffdist("fit-readout", run.folder)
    assert Run.find(run.folder).summary["test_fitted_readout_error"] < 1


def test_readout_is_fitted_in_a_folder_named_like_markup(tmp_path, ffdist, monkeypatch):
    config = load_config("xor", ["training.epochs=1", NO_ARTIFACTS])
    run = train(config, runner="serial", runs=tmp_path / "m[" / "x]")
    assert f"fitted to the layers of {run.folder} (" in ffdist("fit-readout", run.folder)
    monkeypatch.setattr("ffdist.host_memory.available_bytes", lambda: 9)
    assert "the activations that a readout is fitted to must fit into" in ffdist("fit-readout", run.folder, code=2)


def test_network_of_a_checkpoint_has_the_errors_of_the_summary(config_and_run):
    config, run = config_and_run
    dataset = load_dataset(config.data, seed=0, validation_samples=200)
    network = run.network
    prediction, labels = network.predict(dataset.samples["test"]), dataset.labels["test"]
    error = (prediction.label != labels).double().mean().item()
    assert error == pytest.approx(run.summary["test_goodness_error"], abs=1.5 / 360)
    error = (prediction.probabilities.argmax(1) != labels).double().mean().item()
    assert error == pytest.approx(run.summary["test_readout_error"], abs=1.5 / 360)


def test_training_with_one_layer_and_two_classes_works(tmp_path):
    overrides = ["data.label=append", "negatives={kind: wrong_label}", "model.layers=[20]", "training.epochs=1"]
    run = train(load_config("xor", [*overrides, "pipeline.chunk_size=1000"]), runner="serial", runs=tmp_path)
    assert (run.summary["stages"], run.summary["classes"]) == (1, 2)
    assert len(run.summary["layer_errors"]) == 1
    assert (run.folder / "goodness.png").is_file()


def test_training_does_not_change_the_number_of_torch_threads(tmp_path):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads + 1)
    train(
        load_config("digits", ["model.layers=[9]", "training.epochs=1", NO_ARTIFACTS]), runner="serial", runs=tmp_path
    )
    assert torch.get_num_threads() == num_threads + 1
    torch.set_num_threads(num_threads)


def test_greedy_schedule_trains_layers_one_after_the_other(tmp_path):
    """The first layer gets the same weights as in a network of one layer, because it stops learning after its turn."""
    overrides = ["training.epochs=2", "training.schedule=greedy", NO_ARTIFACTS]
    weights = []
    for layers in ("[20]", "[20, 15]"):
        config = load_config("digits", [*overrides, f"model.layers={layers}"])
        run = train(config, runner="serial", runs=tmp_path)
        weights.append(run.network.layers[0].state_dict())
    assert run.summary["epochs"] == 4
    assert torch.equal(weights[0]["weight"], weights[1]["weight"])


RULES = [
    "model.goodness=mean_of_squares model.threshold=1 training.alpha=10 training.learning_rate=0.3 "
    "training.peer_normalization=0",
    "model.goodness=minus_sum_of_squares",
    "model.goodness=softmax model.threshold=8 training.optimizer=adam training.learning_rate=0.003 training.epochs=20 "
    "training.weight_decay=0 training.peer_normalization=0",
    "training.optimizer=sgd training.learning_rate=0.003 data.label_scale=3",
    "training.optimizer=adam training.learning_rate=0.002 model.normalization=none data.label_scale=10",
    "training.loss=symmetric training.alpha=0.3 training.learning_rate=0.05",
    "training.optimizer=adamw training.learning_rate=0.002 model.threshold=[units,100,100]",
    "training.updates=alternating training.updates_per_minibatch=2 training.learning_rate=0.005",
]


@pytest.mark.parametrize("rule", RULES)
def test_every_learning_rule_learns(rule, tmp_path):
    """The limit is a third of the error of random guesses; with a wrong sign in an update, the error is larger."""
    overrides = ["training.epochs=8", "model.layers=[100, 100, 100]", NO_ARTIFACTS, *rule.split()]
    summary = train(load_config("digits", overrides), runner="serial", runs=tmp_path).summary
    assert summary["test_goodness_error"] < 0.3
    assert summary["test_readout_error"] < 0.3


def test_xor_is_learned_without_labels_from_any_seed(tmp_path):
    for seed in range(10):
        summary = train(load_config("xor", [f"seed={seed}", NO_ARTIFACTS]), runner="serial", runs=tmp_path).summary
        assert summary["test_readout_error"] == 0


def test_plots_are_drawn_if_the_model_or_timeline_cannot_be_saved(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr("ffdist.tracking.tracker.save_network", fail)
    monkeypatch.setattr("ffdist.pipeline.timeline.Timeline.write", fail)
    run = train(load_config("xor", ["training.epochs=1"]), runner="serial", runs=tmp_path)
    output = capsys.readouterr().out
    assert "warning: the model could not be kept (OSError: the disk is full)" in output
    assert "warning: the timeline could not be written (OSError: the disk is full)" in output
    assert {"errors.png", "timeline.png"} <= {path.name for path in run.folder.glob("*.png")}


def test_a_run_without_artifacts_draws_no_plot_and_logs_no_model(tmp_path):
    overrides = ["model.layers=[9]", "training.epochs=1"]
    run = train(load_config("digits", [*overrides, NO_ARTIFACTS]), runner="serial", runs=tmp_path)
    assert not list(run.folder.glob("*.png"))
    assert not MlflowClient(default_uri(tmp_path)).get_run(run.summary["mlflow_run_id"]).outputs.model_outputs
    with pytest.raises(ConfigError, match=r"tracking.register needs a model .*add model to tracking.artifacts"):
        load_config("digits", ["tracking.register=digits", NO_ARTIFACTS])
