import pytest
import torch
from mlflow import MlflowClient

from ffdist import ConfigError, Run, load_config, read_network, train
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
def run(tmp_path_factory):
    """A run whose layers do not learn, so that its first checkpoint is the best by goodness; its readout goes on."""
    config = load_config("digits", [*SHORT, "training.learning_rate=0", "tracking.artifacts=[model]"])
    return config, train(config, runner="serial", runs=tmp_path_factory.mktemp("runs"))


def test_the_best_checkpoint_is_kept_beside_the_newest(run):
    config, finished = run
    best, checkpoints = finished.summary["best_checkpoint"], checkpoints_of(config, finished.folder)
    errors = {name: checkpoints.read_manifest(name).validation_error for name in checkpoints.names()}
    kept = list(errors)
    assert kept[-1] == "0006-000000"
    assert best == checkpoints.path(kept[0]) != checkpoints.path(kept[-1])
    assert errors[kept[0]] == min(errors.values())


def test_figures_and_model_are_of_the_best_checkpoint(run):
    """And so is what every command uses, unless another is named."""
    _, finished = run
    test = finished.dataset.samples["test"], finished.dataset.labels["test"]
    same, last = Run.find(finished.folder), Run.find(finished.folder, checkpoint="last")
    assert finished.summary["checkpoint"] == same.checkpoint.name == finished.checkpoint.name
    assert (same.checkpoint.kind, last.checkpoint.kind, last.checkpoint.name) == ("best", "last", "0006-000000")
    assert same.evaluate(*test).readout_error == pytest.approx(finished.summary["test_readout_error"], abs=1.5 / 360)
    assert last.evaluate(*test).readout_error < finished.summary["test_readout_error"] - 0.02
    (kept,) = finished.folder.parent.glob("artifacts/**/network.json")
    images = test[0][:50]
    assert torch.equal(read_network(kept.parent)(images), same.network(images))
    assert not torch.equal(same.network(images), last.network(images))


def test_a_checkpoint_is_named_and_chosen(run, tmp_path, ffdist):
    _, finished = run
    runs, best = ["--runs", finished.folder.parent], finished.summary["checkpoint"]
    said = {which: ffdist("evaluate", finished.folder, "--checkpoint", which) for which in ("best", "last", best)}
    assert f"checkpoint: best, {finished.folder}/checkpoints/{best}" in said["best"] == said[best]
    assert f"checkpoint: last, {finished.folder}/checkpoints/0006-000000" in said["last"]
    assert ffdist("evaluate", finished.folder) == said["best"]
    assert f"best, last or the name of one (given: x, {finished.folder}/checkpoints has: {best}, " in ffdist(
        "evaluate", finished.folder, "--checkpoint", "x", code=2
    )
    start = ["train", "digits", "model.layers=[40,30]", "--runner", "serial", "training.epochs=1", NO_ARTIFACTS, *runs]
    assert "give" in ffdist("plot", finished.folder, "--checkpoint", "last", code=2)
    assert "--checkpoint needs --init-from RUN" in ffdist(*start, "--checkpoint", "last", code=2)
    for which, options in (("best", []), ("last", ["--checkpoint", "last"])):
        said = ffdist(*start, "training.learning_rate=0", "--init-from", finished.folder, *options)
        assert f"starting from checkpoint: {which}, " in said
        assert "(last)" in said  # of the new run, which is not validated
        assert "is far worse than the readout" in said  # as its layers have never learned


def test_the_last_line_names_the_checkpoint(run, tmp_path, capsys):
    _, finished = run
    assert finished.summary["best_checkpoint"].endswith(finished.summary["checkpoint"])
    config = load_config("xor", ["training.epochs=1", NO_ARTIFACTS])
    short = train(config, runner="serial", runs=tmp_path)
    assert "checkpoint      0001-000000 (last)" in capsys.readouterr().out
    assert (short.summary["checkpoint"], short.summary["best_checkpoint"]) == ("0001-000000", None)
    with pytest.raises(ConfigError, match="no best checkpoint, because the run was not validated"):
        _ = Run.find(short.folder, checkpoint="best").network


def test_a_readout_is_kept_only_with_the_checkpoint_that_the_figures_are_of(run, ffdist):
    _, finished = run
    said = ffdist("readout", finished.folder, "--checkpoint", "last")
    assert "by a readout fitted" in said
    assert Run.find(finished.folder).summary["test_fitted_readout_error"] is None
    ffdist("readout", finished.folder)
    assert Run.find(finished.folder).summary["test_fitted_readout_error"] < 1


def test_a_readout_is_fitted_where_a_folder_is_named_like_markup(tmp_path, ffdist, monkeypatch):
    config = load_config("xor", ["training.epochs=1", NO_ARTIFACTS])
    run = train(config, runner="serial", runs=tmp_path / "m[" / "x]")
    assert f"fitted to the layers of {run.folder} (" in ffdist("readout", run.folder)
    monkeypatch.setattr("ffdist.host_memory.available_bytes", lambda: 9)
    assert "the activations that a readout is fitted to must fit into" in ffdist("readout", run.folder, code=2)


def test_a_checkpoint_is_a_network_that_predicts_as_the_run_says(run):
    config, finished = run
    dataset = load_dataset(config.data, seed=0, validation_samples=200)
    network = finished.network
    prediction, labels = network.predict(dataset.samples["test"]), dataset.labels["test"]
    error = (prediction.label != labels).double().mean().item()
    assert error == pytest.approx(finished.summary["test_goodness_error"], abs=1.5 / 360)
    error = (prediction.probabilities.argmax(1) != labels).double().mean().item()
    assert error == pytest.approx(finished.summary["test_readout_error"], abs=1.5 / 360)


def test_one_layer_and_two_classes_are_enough(tmp_path):
    words = ["data.label=append", "negatives={kind: wrong_label}", "model.layers=[20]", "training.epochs=1"]
    run = train(load_config("xor", [*words, "pipeline.chunk_size=1000"]), runner="serial", runs=tmp_path)
    assert (run.summary["stages"], run.summary["classes"]) == (1, 2)
    assert len(run.summary["layer_errors"]) == 1
    assert (run.folder / "goodness.png").is_file()


def test_training_leaves_torchs_threads_as_they_were(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    train(
        load_config("digits", ["model.layers=[9]", "training.epochs=1", NO_ARTIFACTS]), runner="serial", runs=tmp_path
    )
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_greedy_layers_are_trained_one_after_the_other(tmp_path):
    """The first layer ends as it does alone, because it stops learning when its turn ends."""
    short = ["training.epochs=2", "training.schedule=greedy", NO_ARTIFACTS]
    weights = []
    for layers in ("[20]", "[20, 15]"):
        config = load_config("digits", [*short, f"model.layers={layers}"])
        finished = train(config, runner="serial", runs=tmp_path)
        weights.append(finished.network.layers[0].state_dict())
    assert finished.summary["epochs"] == 4
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
def test_rules_learn(rule, tmp_path):
    """A third as wrong as chance is nothing to be proud of, and more than any mistake in a sign allows."""
    changes = ["training.epochs=8", "model.layers=[100, 100, 100]", NO_ARTIFACTS, *rule.split()]
    summary = train(load_config("digits", changes), runner="serial", runs=tmp_path).summary
    assert summary["test_goodness_error"] < 0.3
    assert summary["test_readout_error"] < 0.3


def test_xor_is_learned_without_labels_from_any_seed(tmp_path):
    for seed in range(10):
        summary = train(load_config("xor", [f"seed={seed}", NO_ARTIFACTS]), runner="serial", runs=tmp_path).summary
        assert summary["test_readout_error"] == 0


def test_a_model_or_a_timeline_that_fails_costs_no_plot(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr("ffdist.tracking.tracker.save_network", fail)
    monkeypatch.setattr("ffdist.pipeline.timeline.Timeline.write", fail)
    run = train(load_config("xor", ["training.epochs=1"]), runner="serial", runs=tmp_path)
    told = capsys.readouterr().out
    assert "warning: the model could not be kept (OSError: the disk is full)" in told
    assert "warning: the timeline could not be written (OSError: the disk is full)" in told
    assert {"errors.png", "timeline.png"} <= {path.name for path in run.folder.glob("*.png")}


def test_a_run_without_artifacts_draws_no_plot_and_logs_no_model(tmp_path):
    words = ["model.layers=[9]", "training.epochs=1"]
    run = train(load_config("digits", [*words, NO_ARTIFACTS]), runner="serial", runs=tmp_path)
    assert not list(run.folder.glob("*.png"))
    assert not MlflowClient(default_uri(tmp_path)).get_run(run.summary["mlflow_run_id"]).outputs.model_outputs
    with pytest.raises(ConfigError, match=r"tracking.register needs a model .*add model to tracking.artifacts"):
        load_config("digits", ["tracking.register=digits", NO_ARTIFACTS])
