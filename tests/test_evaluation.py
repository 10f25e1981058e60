import pytest
import torch
from helpers import image_architecture

from ffdist.data.order import SampleOrder
from ffdist.ff.network import Network
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.evaluation import Evaluation, evaluate, format_class_errors
from ffdist.pipeline.runner import serial_runner
from ffdist.pipeline.schedule import evaluation
from ffdist.pipeline.source import NegativePlan


@pytest.mark.parametrize("label", ["overwrite", "none"])
def test_evaluation_by_stages_equals_evaluation_by_the_whole_network(label):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 20), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (37,), generator=generator)
    architecture = image_architecture((1, 4, 5), 4, (30, 25, 15), seed=1, label=label)
    blueprint = Blueprint(
        architecture, SampleOrder(0, 37, 5), NegativePlan("hybrid"), [range(2), range(2, 3)], 1, "cpu"
    )
    runner = serial_runner(blueprint, {"train": images, "test": images}, labels, None)
    blocks = list(runner.run(evaluation("test", 37, 8), []))
    goodness = torch.cat([torch.cat(block.goodness) for block in blocks], 1)
    predictions = torch.cat([block.predicted for block in blocks])
    actual = evaluate(goodness, predictions, labels, architecture)

    expected = Network(architecture).predict(images)
    assert actual.readout_error == (expected.probabilities.argmax(1) != labels).double().mean().item()
    assert actual.confusion.sum() == 37
    if label == "none":
        assert actual.goodness_error is actual.layer_errors is None
        assert actual.chief_error == actual.readout_error == 1 - actual.confusion.trace().item() / 37
    else:
        assert actual.chief_error == actual.goodness_error == (expected.label != labels).double().mean().item()
        assert actual.layer_errors == [
            (layer.argmax(1) != labels).double().mean().item() for layer in expected.goodness
        ]


def test_errors_of_classes_are_fractions_of_their_own_samples():
    confusion = torch.tensor([[90, 0, 0], [1, 0, 3], [0, 0, 0]])  # the third class has no samples
    evaluation = Evaluation(None, 4 / 94, None, confusion, torch.empty(0))
    assert evaluation.class_errors == [0, 1, None]
    assert evaluation.balanced_error == 0.5
    assert evaluation.readout_error < 0.05


def test_worst_classes_are_listed_by_name():
    errors = [0.1, None, 0.3, 0.0, 0.3, 0.2, 0.05, 0.01]
    expected = "; worst classes: 2 30.00%, 4 30.00%, 5 20.00%, 0 10.00%, 6 5.00%"
    assert format_class_errors(errors, []) == expected
    names = [f"class {label}" for label in range(8)]
    assert format_class_errors(errors, names).startswith("; worst classes: class 2 30.00%, class 4 30.00%")
    assert format_class_errors([0.0, None], ["owl", "heron"]) == ""
