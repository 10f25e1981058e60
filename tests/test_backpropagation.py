import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import image_architecture

import ffdist.ff.specs
from ffdist import ConfigError, load_config, read_network, train
from ffdist.data.datasets import load_dataset
from ffdist.data.order import SampleOrder
from ffdist.export.network import save_network
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update
from ffdist.ff.specs import Local
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.runner import SnapshotTaken
from ffdist.pipeline.schedule import Position, Snapshot, Train
from ffdist.pipeline.source import NegativePlan

SAMPLES, BATCH, SHAPE, CLASSES = 30, 10, (1, 6, 6), 3
DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (SAMPLES, 36), dtype=torch.uint8, generator=DRAW)
LABELS = torch.randint(0, CLASSES, (SAMPLES,), generator=DRAW)
ORDER = SampleOrder(0, SAMPLES, BATCH)
DESCENT = Update(0.5, 0.0, momentum=0.0)
PLAIN = image_architecture(
    SHAPE, CLASSES, (7, 5), seed=1, predict_from=1, readout_update=DESCENT, rule=Rule(update=DESCENT)
)
START = Snapshot(Position(), 0)


class Keeper:
    """Writes nothing, and gives back what it was to write."""

    def write(self, snapshot, state):
        return copy.deepcopy(state)


def states(architecture, *commands):
    blueprint = Blueprint(architecture, ORDER, NegativePlan("wrong_label"), [range(2)], 1, "cpu")
    pipeline = Backpropagation(blueprint, {"train": IMAGES}, LABELS, Keeper())
    for event in pipeline.run(commands):
        if isinstance(event, SnapshotTaken):
            yield event.written(True)


def test_an_update_follows_the_gradient_of_the_cross_entropy_through_all_layers():
    before, first, second = states(PLAIN, START, Train(0, 0, 1, 0, 1.0), START, Train(0, 1, 1, 1, 0.5), START)
    for minibatch, (old, new, lr_scale) in enumerate([(before, first, 1.0), (first, second, 0.5)]):
        samples = ORDER.indices(0, minibatch, 1)[0]
        parameters = {
            (layer, name): old[layer][name].clone().requires_grad_() for layer in old for name in ("weight", "bias")
        }
        rows, read = PLAIN.neutral_rows(IMAGES[samples]), []
        for layer in ("layer_1", "layer_2"):
            rows = F.linear(rows, parameters[layer, "weight"], parameters[layer, "bias"]).relu()
            rows = rows / (rows.square().mean(1, keepdim=True) + 1e-12).sqrt()
            read.append(rows)
        logits = F.linear(torch.cat(read, 1), parameters["readout", "weight"], parameters["readout", "bias"])
        F.cross_entropy(logits, LABELS[samples]).backward()
        for (layer, name), parameter in parameters.items():
            torch.testing.assert_close(new[layer][name], parameter.detach() - lr_scale * 0.5 * parameter.grad)
    assert not torch.equal(second["layer_1"]["weight"], first["layer_1"]["weight"])


def test_fields_learn_the_same_however_they_are_multiplied(monkeypatch):
    """By bands the product's copy of the weights is scattered, and the gradient must come back through it."""
    fields = (Local(grid=2, stride=2, field=3, units=4), Local(grid=3, stride=1, field=2, units=3))
    learned = []
    for threshold in (0, 100):
        monkeypatch.setattr(ffdist.ff.specs, "MIN_UNITS_PER_FIELD", threshold)
        architecture = replace(PLAIN, encoder=replace(PLAIN.encoder, label="everywhere"), layers=fields)
        learned += states(architecture, Train(0, 0, 3, 0, 1.0), START)
    for layer, tensors in learned[0].items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(learned[1][layer][name], tensor)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_chunks_change_no_bit(precision):
    architecture = replace(PLAIN, precision=precision)
    one, other = (
        list(states(replace(architecture, encoder=replace(architecture.encoder, jitter=1)), *chunks, START))[-1]
        for chunks in ([Train(0, 0, 3, 0, 1.0)], [Train(0, first, 1, first, 1.0) for first in range(3)])
    )
    assert all(torch.equal(tensor, other[layer][name]) for layer in one for name, tensor in one[layer].items())


def test_a_run_is_tracked_evaluated_and_kept_as_any_other(tmp_path):
    changes = ["training.epochs=10", "training.validation_samples=100", "model.layers=[100, 50]"]
    config = load_config("digits", [*changes, "training.optimizer=adamw", "training.schedule=greedy"])
    finished = train(config, runner="backpropagation", runs=tmp_path)
    assert finished.summary["epochs"] == 10
    config = load_config(str(finished.folder / "config.yaml"))
    assert finished.summary["test_readout_error"] < 0.06
    assert finished.summary["test_goodness_error"] is None
    dataset = load_dataset(config.data, seed=0, validation_samples=100)
    network = finished.network
    wrong = (network(dataset.samples["test"]).argmax(1) != dataset.labels["test"]).double().mean().item()
    assert wrong == pytest.approx(finished.summary["test_readout_error"], abs=1.5 / 360)
    assert finished.summary["best_checkpoint"]
    assert not any(
        "goodness" in path.name for path in [*finished.folder.glob("*.png"), *finished.plot(tmp_path / "again")]
    )
    test = finished.evaluate(dataset.samples["test"], dataset.labels["test"])
    assert (test.goodness_error, test.readout_error) == (None, pytest.approx(wrong, abs=1.5 / 360))
    save_network(network, tmp_path)
    kept = read_network(tmp_path).predict(dataset.samples["test"])
    assert (kept.goodness.shape[-1], (kept.label != dataset.labels["test"]).double().mean().item()) == (0, wrong)


def test_a_reference_goes_on_as_what_it_is(tmp_path):
    config = load_config("digits", ["training.epochs=2", "model.layers=[20, 10]"]).by_backpropagation()
    first = train(config, runner="backpropagation", runs=tmp_path)
    (first.folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match="resumed with its own algorithm, backpropagation; `ffdist baseline`"):
        train(config, runner="serial", runs=tmp_path, resume=first.folder)
    again = train(config, runner="backpropagation", runs=tmp_path, resume=first.folder)
    assert again.summary["weights_sha256"] == first.summary["weights_sha256"]


def test_a_reference_of_any_rule_can_be_opened_again(tmp_path):
    rule = ["training.loss=symmetric", "model.goodness=softmax", "training.epochs=1", "model.layers=[20,10]"]
    run = train(load_config("digits", rule), runner="backpropagation", runs=tmp_path)
    assert run.config.training.loss == "symmetric"
