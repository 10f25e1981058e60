import pytest

from ffdist.tracking import progress
from ffdist.tracking.progress import Display


@pytest.fixture
def lines(monkeypatch, capsys):
    """What a display says, where the output is no terminal and a line is always due."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", -1.0)
    display = Display(2, 10, 1)

    def say(step, metrics):
        display.update(step, metrics)
        return capsys.readouterr().out.strip()

    return say


def test_nothing_is_said_before_there_are_learning_metrics(lines):
    assert lines(5, {"validation/readout_error": 0.1}) == ""


def test_layers_are_told_and_without_any_the_loss(lines):
    assert lines(5, {"readout/loss": 0.25}) == "epoch 0.5/2: loss 0.2500"
    layer = {"loss": 0.5, "goodness_positive": 1.31, "goodness_negative": 0.8, "pairwise_error": 0.1}
    metrics = {f"layer_1/{name}": value for name, value in layer.items()} | {"layer_1/active_fraction": 0.5}
    assert lines(10, metrics) == "epoch 1.0/2: layer 1 loss 0.500 goodness 1.31 | 0.8"
