import json

import pytest
import torch

from ffdist import load_config, train
from ffdist.checkpoint import commits
from ffdist.data.datasets import load_dataset
from ffdist.offline import load_network
from ffdist.prepare import build_architecture

SHORT = ["model.layers=[40,30]", "training.epochs=6", "training.validation_samples=200", "training.evaluate_every=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose learning rate grows far too large, so that its best commit is not its last."""
    config = load_config("digits", [*SHORT, "training.learning_rate=0.3", "training.precision=float32"])
    return config, train(config, runner="serial", runs=tmp_path_factory.mktemp("runs"))


def validation_errors(folder):
    manifests = [json.loads((commit / "manifest.json").read_text()) for commit in commits(folder / "commits")]
    return {manifest["step"]: manifest["validation_error"] for manifest in manifests}


def test_the_best_commit_is_kept_beside_the_newest(run):
    _, finished = run
    best = finished.summary["best_commit"]
    errors = validation_errors(finished.folder)
    kept = [commit.name for commit in commits(finished.folder / "commits")]
    assert kept[-1] == f"{6 * (1237 // 50):06d}"
    assert best.endswith(kept[0])
    assert errors[int(kept[0])] == min(errors.values())
    assert len(kept) == (1 if best.endswith(kept[-1]) else 2)


def test_a_commit_is_a_network_that_predicts_as_the_run_says(run):
    config, finished = run
    dataset = load_dataset(config.data, seed=0, validation_samples=200)
    network = load_network(build_architecture(config, dataset), commits(finished.folder / "commits")[-1])
    prediction, labels = network.predict(dataset.images["test"]), dataset.labels["test"]
    error = (prediction.label != labels).double().mean().item()
    assert error == pytest.approx(finished.summary["test_goodness_error"], abs=1.5 / 360)
    error = (prediction.probabilities.argmax(1) != labels).double().mean().item()
    assert error == pytest.approx(finished.summary["test_readout_error"], abs=1.5 / 360)


def test_one_layer_and_two_classes_are_enough(tmp_path):
    config = load_config("digits", ["model.layers=[20]", "training.epochs=1", "pipeline.chunk_size=1000"])
    summary = train(config, runner="serial", runs=tmp_path).summary
    assert summary["stages"] == 1
    assert len(summary["layer_errors"]) == 1


def test_training_leaves_torchs_threads_as_they_were(tmp_path):
    before = torch.get_num_threads()
    train(load_config("digits", ["model.layers=[9]", "training.epochs=1"]), runner="serial", runs=tmp_path)
    assert torch.get_num_threads() == before
