import pytest
import torch
from helpers import image_architecture

from ffdist.data.order import SampleOrder
from ffdist.ff.network import Network
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.evaluation import evaluate
from ffdist.pipeline.runner import serial_runner
from ffdist.pipeline.schedule import evaluation
from ffdist.pipeline.source import NegativePlan


@pytest.mark.parametrize("label", ["overwrite", "none"])
def test_evaluation_through_stages_equals_the_whole_network(label):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 20), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 4, (37,), generator=draw)
    architecture = image_architecture((1, 4, 5), 4, (30, 25, 15), seed=1, label=label)
    blueprint = Blueprint(
        architecture, SampleOrder(0, 37, 5), NegativePlan("hybrid"), [range(2), range(2, 3)], 1, "cpu"
    )
    runner = serial_runner(blueprint, {"train": images, "test": images}, labels, None)
    blocks = list(runner.run(evaluation("test", 37, 8), []))
    goodness = torch.cat([torch.cat(block.goodness) for block in blocks], 1)
    predicted = torch.cat([block.predicted for block in blocks])
    found = evaluate(goodness, predicted, labels, classes=4, predict_from=2)

    expected = Network(architecture).predict(images)
    assert found.readout_error == (expected.probabilities.argmax(1) != labels).double().mean().item()
    assert found.confusion.sum() == 37
    if label == "none":
        assert found.goodness_error is found.layer_errors is None
        assert found.chief_error == found.readout_error == 1 - found.confusion.trace().item() / 37
    else:
        assert found.chief_error == found.goodness_error == (expected.label != labels).double().mean().item()
        assert found.layer_errors == [(layer.argmax(1) != labels).double().mean().item() for layer in expected.goodness]
