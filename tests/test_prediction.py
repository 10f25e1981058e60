"""Which layers predict (`model.predict_from`, `model.predict_to`), and how (`model.readout`)."""

import json

import pytest
import torch
from helpers import digests, image_architecture

from ffdist import Callback, ConfigError, Run, load_config, load_network, resume, train
from ffdist.data.order import SampleOrder
from ffdist.export.network import Names, save_network
from ffdist.ff.classify import best_layers
from ffdist.ff.network import Network
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.costs import draw_sample, measure_costs
from ffdist.pipeline.schedule import Train
from ffdist.pipeline.source import NegativePlan, Shard
from ffdist.pipeline.stage import Stage
from ffdist.runs.export import export_network
from ffdist.runs.readout import fit_readout
from ffdist.runs.results import finished_runs, result_rows
from ffdist.training.callbacks import CallbackFailed
from ffdist.training.precision import make_blueprint
from ffdist.training.prepare import prepare

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


OBJECTIVES = {
    "goodness": ("data.label=overwrite",),
    "class_goodness": (
        "data.label=auto",
        "training.objective=class_goodness",
        "training.optimizer=adamw",
        "training.learning_rate=0.005",
    ),
}
CONV = "model.layers=[{kind: conv, channels: 6, pool: max}, {kind: conv, channels: 8}, 20]"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("readout", ["per_layer", "none"])
def test_results_do_not_depend_on_the_distribution(readout, objective, tmp_path):
    settings = [*SMALL, *OBJECTIVES[objective], f"model.readout={readout}"]
    assert len(digests("digits", settings, PACES, tmp_path)) == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_readouts_of_pooled_layers_do_not_depend_on_the_distribution(precision, tmp_path):
    settings = [*SMALL, *OBJECTIVES["class_goodness"], CONV, "model.readout=per_layer", "training.pooled_features=100"]
    settings += ["model.predict_from=1", f"training.precision={precision}"]
    assert len(digests("digits", settings, PACES, tmp_path)) == 1


@pytest.mark.parametrize("readout", ["per_layer", "none"])
def test_ray_trains_what_the_serial_runner_trains(readout, ray_start_4_cpus, tmp_path):
    settings = [*SMALL, f"model.readout={readout}", "model.predict_from=1", "model.predict_to=2"]
    assert len(digests("digits", settings, (("serial", 1, 7), ("ray", 3, 40)), tmp_path)) == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("readout", ["per_layer", "none"])
def test_exported_network_predicts_as_the_run(readout, objective, tmp_path):
    run = train_small(tmp_path / "runs", *OBJECTIVES[objective], f"model.readout={readout}")
    assert_exported_network_predicts_as(run, tmp_path / "out")
    test = run.evaluate(run.dataset.samples["test"], run.dataset.labels["test"])
    assert (test.goodness_error, test.readout_error) == (
        run.summary["test_goodness_error"],
        run.summary["test_readout_error"],
    )


def test_layers_train_their_readouts_on_their_own_cross_entropy(tmp_path):
    """A readout of a layer is what a joint readout of only that layer would be."""
    run = train_small(tmp_path, "model.readout=per_layer")
    network, samples = run.network, run.dataset.samples["test"]
    for layer in (2, 3):
        alone = train_small(tmp_path, f"model.predict_from={layer}", f"model.predict_to={layer}").network
        own = network.readout[str(layer - 1)]
        assert torch.equal(own.weight, alone.readout.weight)
        assert torch.equal(own.bias, alone.readout.bias)
    read = network.read(network.architecture.neutral_rows(samples))
    logits = sum(readout([part]) for readout, part in zip(network.readout.values(), read, strict=True))
    assert torch.equal(network(samples), logits)


def test_without_a_readout_its_results_are_left_out(tmp_path):
    run = train_small(tmp_path, "model.readout=none", "tracking.artifacts=[plots]", "training.validation_samples=200")
    assert run.summary["test_readout_error"] is None
    assert not [name for name in run.metrics if "readout" in name]
    assert {"test/goodness_error", "validation/goodness_error", "layer_1/loss"} <= run.metrics.keys()
    assert {"errors.png", "errors_over_time.png", "confusion.png", "layers.png"} <= {
        path.name for path in run.folder.iterdir()
    }
    assert not list((run.folder / "checkpoints").rglob("readout*"))
    prediction = run.predict(run.dataset.samples["test"])
    assert torch.equal(prediction.probabilities, prediction.goodness[1:].sum(0).softmax(-1))


class StopsAfterMinibatches(Callback):
    """Raises an error, as a crash would end a run."""

    def __init__(self, count):
        self.count = count

    def on_chunk(self, run, metrics):
        if run.step >= self.count:
            raise RuntimeError("stopped")


@pytest.mark.parametrize("readout", ["joint", "per_layer", "none"])
def test_runs_resume_with_other_stages(readout, tmp_path):
    settings = [*SMALL, f"model.readout={readout}", "checkpoint.every_minibatches=3", "model.predict_to=2"]
    expected = train(load_config("digits", settings), runner="serial", runs=tmp_path / "whole").summary
    with pytest.raises(CallbackFailed):
        train(
            load_config("digits", [*settings, "pipeline.stages=3", "pipeline.chunk_size=1"]),
            runner="serial",
            runs=tmp_path,
            callbacks=[StopsAfterMinibatches(8)],
        )
    (folder,) = (path.parent for path in tmp_path.glob("*/config.yaml"))
    summary = resume(folder, ["pipeline.stages=1", "pipeline.chunk_size=5"], runs=tmp_path).summary
    for name in ("weights_sha256", "test_goodness_error", "test_readout_error", "layer_errors"):
        assert summary[name] == expected[name]


@pytest.mark.parametrize("readout", ["joint", "per_layer", "none"])
@pytest.mark.parametrize("optimizer", ["hinton", "adamw"])
def test_state_bytes_are_those_of_the_state(readout, optimizer):
    rule = Rule(update=Update(0.1, 0.1, optimizer=optimizer))
    architecture = image_architecture((1, 9, 9), 3, (60, 50, 40), rule=rule, readout_kind=readout)
    network = Network(architecture)
    sizes = [
        sum(tensor.nbytes for tensor in network.get_submodule(module).state_dict().values())
        for module in architecture.parts.values()
    ]
    assert sum(architecture.state_bytes) == sum(sizes)
    own = sizes[3:] if readout == "per_layer" else [0, 0]
    expected = [size + of_readout for size, of_readout in zip(sizes[:3], [0, *own], strict=True)]
    assert list(architecture.state_bytes[:3]) == expected


@pytest.mark.parametrize("readout", ["joint", "per_layer", "none"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bytes_out_are_those_of_the_messages(readout, precision):
    architecture = image_architecture((1, 4, 5), 3, (9, 8, 7, 6), precision=precision, readout_kind=readout)
    order, labels = SampleOrder(0, 40, 5), torch.arange(40) % 3
    stage_layers, plan = [range(2), range(2, 4)], NegativePlan("wrong_label")
    blueprint = Blueprint(architecture, order, plan, stage_layers, measure_every=1, device="cpu")
    samples = torch.randint(0, 256, (40, 20), dtype=torch.uint8)
    message = [Shard(0, (labels[order.shard(0, 0)] + 1) % 3, 0.0, 0.0)]
    for layers in stage_layers:
        source = (plan, {"train": samples}, labels) if 0 in layers else ()
        stage = Stage(architecture, layers, order, 1, "cpu", labels, *source)
        _, *outputs = stage.train(Train(0, 0, 2, 0, 1.0), *message)
        assert 2 * blueprint.bytes_out(layers) == sum(part.nbytes for part in outputs if part is not None)
        message = [outputs[0], outputs[-1]] if readout == "joint" else outputs[:1]


def test_costs_are_measured_with_any_readout():
    for readout in ("joint", "per_layer", "none"):
        config = load_config("digits", [*SMALL, f"model.readout={readout}"])
        prepared = prepare(config)
        blueprint = make_blueprint(prepared, config, [range(3)], "cpu")
        sample = draw_sample(blueprint, prepared.dataset.samples, prepared.dataset.labels["train"])
        costs = measure_costs(sample, 1)
        assert (costs.readout > 0) == (readout != "none")
        assert all(cost > 0 for cost in costs.layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["negatives.kind=hard_label"], r"model.readout=none predicts no labels .*kind: hard_label"),
        (["training.stop.metric=readout_error"], r"model.readout=none .*metric: readout_error"),
        (["data.label=none", "negatives.kind=hybrid"], r"readout=none needs layers that predict .*label: none"),
    ],
)
def test_layers_must_predict_what_no_readout_predicts(settings, message):
    with pytest.raises(ConfigError, match=message):
        prepare(load_config("digits", [*SMALL, "model.readout=none", *settings]))


@pytest.mark.parametrize("readout", ["per_layer", "none"])
def test_baseline_and_fitted_readout_are_joint(readout, tmp_path):
    run = train_small(tmp_path, f"model.readout={readout}", "tracking.uri=none")
    assert fit_readout(run, runs=tmp_path) < 0.5
    baseline = train_small(tmp_path, f"model.readout={readout}", runner="backpropagation")
    assert baseline.network.architecture.readout_kind == "joint"


def test_another_readout_is_initialized_in_a_warm_start(tmp_path, capsys):
    source = train_small(tmp_path, "model.readout=joint")
    train_small(tmp_path, "model.readout=per_layer", init_from=source.folder)
    assert "the readout_2 of that run does not fit, and is initialized instead" in capsys.readouterr().out


def test_hard_labels_are_drawn_from_the_sum_of_the_readouts(tmp_path):
    settings = [*SMALL, "model.readout=per_layer", "negatives.kind=hard_label", "negatives.prediction_delay=7"]
    assert len(digests("digits", settings, (("serial", 1, 7), ("serial", 3, 2)), tmp_path)) == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("readout", ["joint", "none"])
def test_auto_chooses_the_layers_with_the_least_validation_error(readout, objective, tmp_path):
    settings = [*OBJECTIVES[objective], f"model.readout={readout}", "training.validation_samples=200"]
    settings += ["training.epochs=3", "training.validate_every_epochs=1"]
    run = train_small(tmp_path / "runs", *settings, "model.predict_from=auto")
    default = train_small(tmp_path / "runs", *settings)
    assert run.summary["weights_sha256"] == default.summary["weights_sha256"]
    assert run.summary["test_readout_error"] == default.summary["test_readout_error"]
    goodness = default.predict(run.dataset.samples["validation"]).goodness
    errors = {}
    for first in range(3):
        for last in range(first, 3):
            wrong = goodness[first : last + 1].sum(0).argmax(-1) != run.dataset.labels["validation"]
            errors[first + 1, last + 1] = wrong.sum().item()
    least = [layers for layers, count in errors.items() if count == min(errors.values())]
    first, last = run.summary["chosen_layers"]
    assert (first, last) == min(least, key=lambda layers: (layers[1] - layers[0], -layers[0]))
    prediction = run.predict(run.dataset.samples["test"])
    assert torch.equal(prediction.label, prediction.goodness[first - 1 : last].sum(0).argmax(-1))
    assert run.summary["test_goodness_error"] == (prediction.label != run.dataset.labels["test"]).double().mean().item()
    again = Run.find(run.folder)
    assert again.network.architecture == run.network.architecture
    assert_exported_network_predicts_as(again, tmp_path / "out")


def test_best_layers_are_the_fewest_and_last_of_those_with_the_least_error():
    right, wrong = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.5, 0.0]])
    labels = torch.tensor([1])
    assert best_layers(torch.stack((right, wrong)), labels) == range(1)
    assert best_layers(torch.stack((wrong, right, right)), labels) == range(2, 3)
    assert best_layers(torch.stack((wrong, wrong)), labels) == range(1, 2)


def test_chosen_layers_do_not_depend_on_the_distribution(tmp_path, capsys):
    settings = [*SMALL, "model.predict_from=auto", "training.validation_samples=200", "training.epochs=2"]
    summaries = []
    for stages, chunk in ((1, 7), (3, 40)):
        config = load_config("digits", [*settings, f"pipeline.stages={stages}", f"pipeline.chunk_size={chunk}"])
        summaries.append(train(config, runner="serial", runs=tmp_path).summary)
    for name in ("chosen_layers", "test_goodness_error", "weights_sha256"):
        assert summaries[0][name] == summaries[1][name]
    text = "predicted by    layers {} to {}, with the least validation error".format(*summaries[0]["chosen_layers"])
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("layers", [[2, 9], [3, 2], [1], ["a", "b"], "12"])
def test_damaged_choice_of_layers_is_an_error(layers, tmp_path):
    run = train_small(tmp_path / "runs")
    summary = json.loads((run.folder / "summary.json").read_text())
    (run.folder / "summary.json").write_text(json.dumps(summary | {"chosen_layers": layers}))
    with pytest.raises(ConfigError, match=r"summary.json is missing or damaged .*chosen_layers"):
        _ = Run.find(run.folder).network
    (tmp_path / "out").mkdir()
    save_network(run.network, tmp_path / "out", Names())
    architecture = json.loads((tmp_path / "out" / "network.json").read_text())
    (tmp_path / "out" / "network.json").write_text(json.dumps(architecture | {"chosen_layers": layers}))
    with pytest.raises(ValueError, match=r"."):
        load_network(tmp_path / "out")


def test_run_that_resumes_at_its_end_chooses_the_same_layers(tmp_path):
    settings = [*SMALL, "model.predict_from=auto", "training.validation_samples=200", "training.epochs=2"]
    expected = train(load_config("digits", settings), runner="serial", runs=tmp_path / "whole").summary

    class Fails(Callback):
        def on_evaluation(self, run, split, errors):
            if split == "test":
                raise RuntimeError("stopped")

    with pytest.raises(CallbackFailed):
        train(load_config("digits", settings), runner="serial", runs=tmp_path, callbacks=[Fails()])
    (folder,) = (path.parent for path in tmp_path.glob("*/config.yaml"))
    summary = resume(folder, ["pipeline.stages=2"], runs=tmp_path).summary
    for name in ("chosen_layers", "test_goodness_error", "layer_errors"):
        assert summary[name] == expected[name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.validation_samples=0"], r"predict_from=auto chooses layers on validation samples, but none"),
        (["data.label=none", "negatives.kind=hybrid"], r"predict_from=auto needs layers that predict .*label: none"),
        (["model.predict_to=2"], r"predict_from=auto chooses the last predicting layer as well \(predict_to: 2\)"),
    ],
)
def test_auto_needs_layers_that_predict_validation_samples(settings, message):
    with pytest.raises(ConfigError, match=message):
        prepare(
            load_config("digits", [*SMALL, "training.validation_samples=200", "model.predict_from=auto", *settings])
        )


def test_baseline_of_chosen_layers_reads_the_default(tmp_path):
    settings = ["model.predict_from=auto", "training.validation_samples=200"]
    baseline = train_small(tmp_path, *settings, runner="backpropagation")
    assert baseline.network.architecture.read_layers == range(1, 3)
    run = train_small(tmp_path, *settings)
    (row,) = result_rows(finished_runs(run.summary["mlflow_tracking_uri"], None))
    assert row["backprop"]
    assert row["by goodness"]
