import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import image_architecture

import ffdist.ff.specs
from ffdist import ConfigError, load_config, load_network, train
from ffdist.data.datasets import load_dataset
from ffdist.data.order import SampleOrder
from ffdist.export.network import Names, save_network
from ffdist.ff.labels import join
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update
from ffdist.ff.specs import Local
from ffdist.pipeline.backpropagation import Backpropagation
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.runner import SnapshotTaken
from ffdist.pipeline.schedule import Position, Snapshot, Train
from ffdist.pipeline.source import NegativePlan

SAMPLES, BATCH, SHAPE, CLASSES = 30, 10, (1, 6, 6), 3
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (SAMPLES, 36), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.randint(0, CLASSES, (SAMPLES,), generator=GENERATOR)
ORDER = SampleOrder(0, SAMPLES, BATCH)
SGD_UPDATE = Update(0.5, 0.0, momentum=0.0)
ARCHITECTURE = image_architecture(
    SHAPE, CLASSES, (7, 5), seed=1, predict_from=1, readout_update=SGD_UPDATE, rule=Rule(update=SGD_UPDATE)
)
SNAPSHOT = Snapshot(Position(), 0)


class InMemoryWriter:
    """Returns copies of snapshots instead of writing them."""

    def write(self, snapshot, state):
        return copy.deepcopy(state)


def snapshot_states(architecture, *commands):
    blueprint = Blueprint(architecture, ORDER, NegativePlan("wrong_label"), [range(2)], 1, "cpu")
    pipeline = Backpropagation(blueprint, {"train": IMAGES}, LABELS, InMemoryWriter())
    for event in pipeline.run(commands):
        if isinstance(event, SnapshotTaken):
            yield event.written(True)


def test_update_follows_the_cross_entropy_gradient_through_all_layers():
    before, first, second = snapshot_states(
        ARCHITECTURE, SNAPSHOT, Train(0, 0, 1, 0, 1.0), SNAPSHOT, Train(0, 1, 1, 1, 0.5), SNAPSHOT
    )
    for minibatch, (old, new, lr_scale) in enumerate([(before, first, 1.0), (first, second, 0.5)]):
        samples = ORDER.indices(0, minibatch, 1)[0]
        parameters = {
            (layer, name): old[layer][name].clone().requires_grad_() for layer in old for name in ("weight", "bias")
        }
        rows, readout_inputs = join(ARCHITECTURE.neutral_rows(IMAGES[samples])), []
        for layer in ("layer_1", "layer_2"):
            rows = F.linear(rows, parameters[layer, "weight"], parameters[layer, "bias"]).relu()
            rows = rows / (rows.square().mean(1, keepdim=True) + 1e-12).sqrt()
            readout_inputs.append(rows)
        logits = F.linear(torch.cat(readout_inputs, 1), parameters["readout", "weight"], parameters["readout", "bias"])
        F.cross_entropy(logits, LABELS[samples]).backward()
        for (layer, name), parameter in parameters.items():
            torch.testing.assert_close(new[layer][name], parameter.detach() - lr_scale * 0.5 * parameter.grad)
    assert not torch.equal(second["layer_1"]["weight"], first["layer_1"]["weight"])


def test_local_fields_learn_the_same_with_and_without_bands(monkeypatch):
    """With bands, weights are scattered into a larger matrix, and the gradient must be gathered from it."""
    fields = (Local(grid=2, stride=2, field=3, units=4), Local(grid=3, stride=1, field=2, units=3))
    states = []
    for min_units in (0, 100):
        monkeypatch.setattr(ffdist.ff.specs, "MIN_UNITS_PER_FIELD", min_units)
        architecture = replace(ARCHITECTURE, encoder=replace(ARCHITECTURE.encoder, label="everywhere"), layers=fields)
        states += snapshot_states(architecture, Train(0, 0, 3, 0, 1.0), SNAPSHOT)
    for layer, tensors in states[0].items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(states[1][layer][name], tensor)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_chunks_change_no_bit(precision):
    architecture = replace(ARCHITECTURE, precision=precision)
    expected, actual = (
        list(
            snapshot_states(replace(architecture, encoder=replace(architecture.encoder, jitter=1)), *chunks, SNAPSHOT)
        )[-1]
        for chunks in ([Train(0, 0, 3, 0, 1.0)], [Train(0, first, 1, first, 1.0) for first in range(3)])
    )
    assert all(
        torch.equal(tensor, actual[layer][name]) for layer in expected for name, tensor in expected[layer].items()
    )


def test_run_is_tracked_evaluated_and_exported_like_any_other(tmp_path):
    changes = ["training.epochs=10", "training.validation_samples=100", "model.layers=[100, 50]"]
    config = load_config("digits", [*changes, "training.optimizer=adamw", "training.schedule=greedy"])
    run = train(config, runner="backpropagation", runs=tmp_path)
    assert run.summary["epochs"] == 10
    config = load_config(str(run.folder / "config.yaml"))
    assert run.summary["test_readout_error"] < 0.06
    assert run.summary["test_goodness_error"] is None
    dataset = load_dataset(config.data, seed=0, validation_samples=100)
    network = run.network
    error = (network(dataset.samples["test"]).argmax(1) != dataset.labels["test"]).double().mean().item()
    assert error == pytest.approx(run.summary["test_readout_error"], abs=1.5 / 360)
    assert run.summary["best_checkpoint"]
    assert not any("goodness" in path.name for path in [*run.folder.glob("*.png"), *run.plot(tmp_path / "again")])
    evaluation = run.evaluate(dataset.samples["test"], dataset.labels["test"])
    assert (evaluation.goodness_error, evaluation.readout_error) == (None, pytest.approx(error, abs=1.5 / 360))
    save_network(network, tmp_path, Names())
    loaded = load_network(tmp_path).predict(dataset.samples["test"])
    assert (loaded.goodness.shape[-1], (loaded.label != dataset.labels["test"]).double().mean().item()) == (0, error)


def test_baseline_is_resumed_only_with_its_own_algorithm(tmp_path):
    config = load_config("digits", ["training.epochs=2", "model.layers=[20, 10]", "tracking.artifacts=[]"])
    config = config.by_backpropagation()
    run = train(config, runner="backpropagation", runs=tmp_path)
    (run.folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"own algorithm, backpropagation \(given: Forward-Forward\); leave out"):
        train(config, runner="serial", runs=tmp_path, resume=run.folder)
    resumed = train(config, runner="backpropagation", runs=tmp_path, resume=run.folder)
    assert resumed.summary["weights_sha256"] == run.summary["weights_sha256"]


def test_baseline_with_settings_of_another_rule_can_be_opened(tmp_path):
    overrides = ["training.loss=symmetric", "model.goodness=softmax", "training.epochs=1", "model.layers=[20,10]"]
    run = train(load_config("digits", overrides), runner="backpropagation", runs=tmp_path)
    assert run.config.training.loss == "symmetric"
