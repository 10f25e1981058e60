import re

import pytest

from ffdist.data.order import SampleOrder
from ffdist.training import progress
from ffdist.training.progress import Display


@pytest.fixture
def lines(monkeypatch, capsys):
    """What a display says, where the output is no terminal and a line is always due."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", -1.0)
    display = Display(2, SampleOrder(0, 10, 1))

    def say(step, metrics):
        display.show(metrics)
        display.update(step)
        return capsys.readouterr().out.strip()

    return say


def test_nothing_is_said_before_there_are_learning_metrics(lines):
    assert lines(5, {"validation/readout_error": 0.1}) == ""


def test_layers_are_told_and_without_any_the_loss(lines):
    assert lines(5, {"readout/loss": 0.25}) == "epoch 0.5/2: loss 0.2500"
    layer = {"loss": 0.5, "goodness_positive": 1.31, "goodness_negative": 0.8, "pairwise_error": 0.1}
    metrics = {f"layer_1/{name}": value for name, value in layer.items()} | {"layer_1/active_fraction": 0.5}
    assert lines(10, metrics) == "epoch 1.0/2: layer 1 loss 0.500 goodness 1.31 | 0.8"


def test_a_terminal_shows_a_bar_and_a_table_of_layers(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    monkeypatch.setenv("COLUMNS", "100")
    layer = {"loss": 0.5, "goodness_positive": 1.31, "goodness_negative": 0.8, "pairwise_error": 0.1}
    with Display(2, SampleOrder(0, 10, 1)) as display:
        display.show({f"layer_1/{name}": value for name, value in layer.items()})
        display.update(5)
        display.say("[a line] that stays")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert re.search(r"epoch 1/2 .* 25 %", shown)
    assert re.search(r"layer +loss +goodness: positive +negative +pairwise error +active", shown)
    assert re.search(r"1 +0\.500 +1\.31 +0\.8 +0\.1000", shown)
    assert "[a line] that stays" in shown
