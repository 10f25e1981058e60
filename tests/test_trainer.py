import pytest
import torch

from ffdist import load_config, train
from ffdist.data.datasets import load_dataset
from ffdist.start import commits_of, newest

SHORT = ["model.layers=[40,30]", "training.epochs=6", "training.validation_samples=200", "training.evaluate_every=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose learning rate grows far too large, so that its best commit is not its last."""
    config = load_config("digits", [*SHORT, "training.learning_rate=0.3", "training.precision=float32"])
    return config, train(config, runner="serial", runs=tmp_path_factory.mktemp("runs"))


def test_the_best_commit_is_kept_beside_the_newest(run):
    config, finished = run
    best, commits = finished.summary["best_commit"], commits_of(config, finished.folder)
    errors = {name: commits.read_manifest(name).validation_error for name in commits.names()}
    kept = list(errors)
    assert kept[-1] == "0006-000000"
    assert best == commits.path(kept[0])
    assert errors[kept[0]] == min(errors.values())
    assert len(kept) == (1 if best == commits.path(kept[-1]) else 2)


def test_a_commit_is_a_network_that_predicts_as_the_run_says(run):
    config, finished = run
    dataset = load_dataset(config.data, seed=0, validation_samples=200)
    network = finished.network
    prediction, labels = network.predict(dataset.images["test"]), dataset.labels["test"]
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
    train(load_config("digits", ["model.layers=[9]", "training.epochs=1"]), runner="serial", runs=tmp_path)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_greedy_layers_are_trained_one_after_the_other(tmp_path):
    """The first layer ends as it does alone, because it stops learning when its turn ends."""
    short = ["training.epochs=2", "training.schedule=greedy"]
    weights = []
    for layers in ("[20]", "[20, 15]"):
        config = load_config("digits", [*short, f"model.layers={layers}"])
        finished = train(config, runner="serial", runs=tmp_path)
        weights.append(newest(commits_of(config, finished.folder))[1]["layer_1"])
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
    "training.updates=alternating training.repeats=2 training.learning_rate=0.005",
]


@pytest.mark.parametrize("rule", RULES)
def test_rules_learn(rule, tmp_path):
    """A third as wrong as chance is nothing to be proud of, and more than any mistake in a sign allows."""
    changes = ["training.epochs=8", "model.layers=[100, 100, 100]", *rule.split()]
    summary = train(load_config("digits", changes), runner="serial", runs=tmp_path).summary
    assert summary["test_goodness_error"] < 0.3
    assert summary["test_readout_error"] < 0.3


def test_xor_is_learned_without_labels_from_any_seed(tmp_path):
    for seed in range(10):
        summary = train(load_config("xor", [f"seed={seed}"]), runner="serial", runs=tmp_path).summary
        assert summary["test_readout_error"] == 0
