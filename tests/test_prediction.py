"""Which layers predict (`model.predict_from`, `model.predict_to`), and how (`model.readout`)."""

import pytest
import torch
from helpers import digests

from ffdist import load_config, load_network, train
from ffdist.runs.export import export_network

SMALL = ("model.layers=[30, 25, 20]", "training.epochs=1", "training.precision=float32", "tracking.artifacts=[]")
PACES = (("serial", 1, 7), ("serial", 3, 40), ("serial", 2, 1))


def train_small(runs, *settings, runner="serial", **options):
    return train(load_config("digits", [*SMALL, *settings]), runner=runner, runs=runs, **options)


def assert_exported_network_predicts_as(run, folder):
    export_network(run, folder)
    samples = run.dataset.samples["test"][:20]
    expected, network = run.predict(samples), load_network(folder)
    for name, value in network.predict(samples)._asdict().items():
        assert torch.equal(value, getattr(expected, name)), name
    assert torch.equal(network(samples).softmax(-1), expected.probabilities)
    label, probability, *_ = torch.export.load(folder / "classifier.pt2").module()(samples.view(20, 1, 8, 8))
    assert torch.equal(label, expected.label)
    torch.testing.assert_close(probability, expected.probabilities)


def test_only_the_layers_of_the_range_predict(tmp_path):
    run = train_small(tmp_path / "runs", "model.predict_from=1", "model.predict_to=2")
    network, samples = run.network, run.dataset.samples["test"]
    assert network.readout.weight.shape == (10, 30 + 25)
    prediction = run.predict(samples)
    assert torch.equal(prediction.label, prediction.goodness[:2].sum(0).argmax(-1))
    errors = (prediction.label != run.dataset.labels["test"]).double().mean().item()
    assert errors == run.summary["test_goodness_error"]
    assert_exported_network_predicts_as(run, tmp_path / "out")


@pytest.mark.parametrize("predict_to", [1, 2])
def test_results_of_a_range_do_not_depend_on_the_distribution(predict_to, tmp_path):
    settings = [*SMALL, "model.predict_from=1", f"model.predict_to={predict_to}"]
    assert len(digests("digits", settings, PACES, tmp_path)) == 1
