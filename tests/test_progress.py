import re

import pytest

from ffdist.data.order import SampleOrder
from ffdist.training import progress
from ffdist.training.progress import Display


@pytest.fixture
def render_line(monkeypatch, capsys):
    """Function that returns what a display prints if the output is not a terminal, without a delay between lines."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", -1.0)
    display = Display(2, SampleOrder(0, 10, 1))

    def render(step, metrics):
        display.show(metrics)
        display.update(step)
        return capsys.readouterr().out.strip()

    return render


def test_nothing_is_printed_without_training_metrics(render_line):
    assert render_line(5, {"validation/readout_error": 0.1}) == ""


def test_line_shows_layer_metrics_or_else_the_readout_loss(render_line):
    assert render_line(5, {"readout/loss": 0.25}) == "epoch 0.5/2: loss 0.2500"
    layer = {"loss": 0.5, "goodness_positive": 1.31, "goodness_negative": 0.8, "pairwise_error": 0.1}
    metrics = {f"layer_1/{name}": value for name, value in layer.items()} | {"layer_1/active_fraction": 0.5}
    assert render_line(10, metrics) == "epoch 1.0/2: layer 1 loss 0.500, goodness 1.31 positive, 0.8 negative"


def test_terminal_shows_a_progress_bar_and_a_table_of_layers(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich treat the output as a terminal
    monkeypatch.setenv("COLUMNS", "100")
    layer = {"loss": 0.5, "goodness_positive": 1.31, "goodness_negative": 0.8, "pairwise_error": 0.1}
    with Display(2, SampleOrder(0, 10, 1)) as display:
        display.show({f"layer_1/{name}": value for name, value in layer.items()})
        display.update(5)
        display.say("[a line] that stays")
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert re.search(r"epoch 1/2 .* 25 %", output)
    assert re.search(r"layer +loss +goodness: positive +negative +pairwise error *\n", output)
    assert re.search(r"1 +0\.500 +1\.31 +0\.8 +0\.1000", output)
    assert "[a line] that stays" in output
