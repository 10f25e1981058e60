"""Convolutional layers: compared with torch's modules, and in runs."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import digests
from torch import nn

from ffdist import ConfigError, load_config, load_network, train
from ffdist.ff.conv import ConvLayer
from ffdist.ff.forms import Form
from ffdist.ff.keyed import generator
from ffdist.ff.layers import Minibatch, Passes
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update
from ffdist.ff.specs import Conv, parse_layer
from ffdist.runs.export import export_network
from ffdist.training.prepare import prepare

B, C = 6, 3
FORM = Form((2, 7, 6))
LAYERS = "[{kind: conv, channels: 8, pool: max}, {kind: conv, channels: 12, norm: group, pool: average}, 20]"
WITH_DROPOUT = LAYERS.replace("pool: max", "pool: max, dropout: 0.3").replace("average", "average, dropout: 0.1")
SHORT = [
    *(f"model.layers={LAYERS}", "training.epochs=4", "training.objective=class_goodness", "tracking.artifacts=[]"),
    *("training.precision=float32", "training.optimizer=adamw", "training.learning_rate=0.005", "data.label=auto"),
    "model.normalization=none",
]
AUGMENTED = ["data.jitter=1", "data.flip=true", "training.epochs=1", f"model.layers={WITH_DROPOUT}"]


def make_layer(spec, rule, form=FORM) -> ConvLayer:
    settings = {"rule": rule, "classes": C, "generator": generator(0, "layer"), "compute_dtype": torch.float64}
    layer = spec.build(form, **settings)
    layer.add_optimizer_state()
    layer = layer.double()
    for name, parameter in layer.named_parameters():
        if name != "weight":
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(1, name)))
    return layer


def random_rows(num_passes, form=FORM):
    rows = torch.randn(num_passes, B, form.width, generator=generator(2, "rows"), dtype=torch.float32)
    return rows.double()


def reference(spec, layer):
    """The same layer of torch's modules, with its own parameters, on images `[R, 2, 7, 6]`."""
    conv = nn.Conv2d(
        layer.weight.shape[1], spec.channels, spec.kernel, spec.stride, spec.border, bias=spec.norm == "none"
    )
    norms = {"batch": nn.BatchNorm2d(spec.channels), "group": nn.GroupNorm(8, spec.channels), "none": nn.Identity()}
    module = nn.Sequential(conv, norms[spec.norm], nn.ReLU() if spec.activation == "relu" else nn.LeakyReLU()).double()
    with torch.no_grad():
        conv.weight.copy_(layer.weight)
        (conv if spec.norm == "none" else module[1]).bias.copy_(layer.bias)
        if spec.norm != "none":
            module[1].weight.copy_(layer.factor)
    return module


def channels_last(maps):
    return maps.permute(0, 2, 3, 1).flatten(1)


@pytest.mark.parametrize(
    "spec",
    [
        Conv(8),
        Conv(8, norm="none", activation="leaky_relu"),
        Conv(8, norm="group", pool="average"),
        Conv(8, kernel=5, stride=2, padding=1, pool="max"),
    ],
)
def test_layer_computes_and_learns_like_modules_of_torch(spec):
    rule = Rule(objective="classifier", normalization="none", peer_strength=0.0, update=Update(0.1, 0.0, 0.0, "sgd"))
    layer = make_layer(spec, rule)
    module, rows, labels = reference(spec, layer), random_rows(1), torch.arange(B) % C
    weight, bias = (layer.objective.get_parameter(name).clone().requires_grad_() for name in ("weight", "bias"))
    maps = module(rows[0].view(B, *FORM.shape))
    features = channels_last(maps)
    loss = F.cross_entropy(F.linear(features, weight, bias), labels)
    parameters = [*module.parameters(), weight, bias]
    gradients = torch.autograd.grad(loss, parameters)
    output, metrics = layer.train_minibatch(Minibatch(rows, Passes(0, False), labels))
    pools = {
        "none": lambda maps: maps,
        "max": lambda maps: F.max_pool2d(maps, 2),
        "average": lambda m: F.avg_pool2d(m, 2),
    }
    torch.testing.assert_close(output.activations[0], channels_last(pools[spec.pool](maps)))
    assert output.activations.shape[-1] == spec.output_form(FORM).size
    assert metrics[0].item() == pytest.approx(loss.item(), rel=1e-6)
    names = {"none": ["weight", "bias"]}.get(spec.norm, ["weight", "factor", "bias"])
    names += ["objective.weight", "objective.bias"]
    for name, before, gradient in zip(names, parameters, gradients, strict=True):
        torch.testing.assert_close(layer.get_parameter(name), before.detach() - 0.1 * gradient)
    if spec.norm == "batch":
        torch.testing.assert_close(layer.running_mean, module[1].running_mean)
        torch.testing.assert_close(layer.running_var, module[1].running_var)
        with torch.no_grad():
            for parameter, name in zip(module.parameters(), names, strict=False):
                parameter.copy_(layer.get_parameter(name))
        expected = channels_last(pools[spec.pool](module.eval()(rows[0].view(B, *FORM.shape))))
        torch.testing.assert_close(layer(rows[0]).activations, expected)


def test_statistics_of_the_positive_rows_normalize_all_passes_and_get_gradients_from_all():
    rule = Rule(normalization="none", peer_strength=0.0, loss="symmetric", update=Update(0.1, 0.0, 0.0, "sgd"))
    spec = Conv(8)
    layer, rows = make_layer(spec, rule), random_rows(2)
    leaves = [layer.get_parameter(name).clone().requires_grad_() for name in ("weight", "factor", "bias")]
    weight, factor, bias = leaves
    positive, negative = (F.conv2d(each.view(B, *FORM.shape), weight, padding=1) for each in rows)
    mean, variance = positive.mean((0, 2, 3)), positive.var((0, 2, 3), correction=0)

    def normalize(maps):
        scale = factor / (variance + 1e-5).sqrt()
        return ((maps - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]).relu()

    goodness = [normalize(each).square().flatten(1).sum(1) for each in (positive, negative)]
    loss = F.softplus(goodness[1] - goodness[0]).mean() / 2  # half of the derivative, as in the released code
    gradients = torch.autograd.grad(loss, leaves)
    _, metrics = layer.train_minibatch(Minibatch(rows, Passes(1, False)))
    for leaf, name, gradient in zip(leaves, ("weight", "factor", "bias"), gradients, strict=True):
        torch.testing.assert_close(layer.get_parameter(name), leaf.detach() - 0.1 * gradient)
    assert metrics[0].item() == pytest.approx(2 * loss.item(), rel=1e-6)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean.detach())
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * positive.detach().var((0, 2, 3)))


def test_label_is_shown_as_constant_planes():
    form, spec = Form((2, 4, 4), shared=3), Conv(5, norm="none", kernel=1)
    layer = make_layer(spec, Rule(normalization="none"), form)
    rows = random_rows(1, form)[0]
    planes = rows[:, 32:, None, None].expand(-1, -1, 4, 4)
    maps = F.conv2d(torch.cat((rows[:, :32].view(B, 2, 4, 4), planes), 1), layer.weight) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(rows).activations, channels_last(maps.relu()))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "conv", "channels": 0}, "channels must be a whole number from 1"),
        ({"kind": "conv", "channels": 4, "padding": -1}, "padding must be a whole number from 0"),
        ({"kind": "conv", "channels": 4, "norm": "layer"}, "norm must be one of batch, group, none"),
        ({"kind": "conv", "channels": 4, "pool": True}, "pool must be one of none, max, average"),
        ({"kind": "conv", "channels": 4, "dropout": 1}, "dropout must be at least 0 and less than 1"),
    ],
)
def test_invalid_settings_are_errors(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_layer(entry)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        ("[20, {kind: conv, channels: 4}]", [], "layer 2 is a convolution and needs a map"),
        ("[{kind: conv, channels: 4, kernel: 9, padding: 0}]", [], "layer 1 leaves nothing of its 8 x 8 input map"),
        ("[{kind: conv, channels: 4}]", ["training.objective=goodness", "data.label=append"], "set it to everywhere"),
    ],
)
def test_layers_that_do_not_fit_are_errors(layers, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(
            load_config(
                "digits",
                [*SHORT, *changes, f"model.layers={layers}", *(["negatives.kind=wrong_label"] * bool(changes))],
            )
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(load_config("digits", SHORT), runner="serial", runs=tmp_path_factory.mktemp("runs"))


def test_network_of_convolutions_learns(run):
    assert run.summary["test_goodness_error"] < 0.15
    assert run.network.readout.weight.shape == (10, 12 * 2 * 2 + 20)


def test_state_has_as_many_bytes_as_the_architecture_says(run):
    architecture = run.network.architecture
    for index, num_bytes in enumerate(architecture.state_bytes[:-1]):
        state = architecture.layer(index).state_dict()
        assert abs(sum(tensor.nbytes for tensor in state.values()) - num_bytes) <= 4 * len(state)  # step counters


GOODNESS = ["training.objective=goodness", "negatives.kind=wrong_label", "data.label=everywhere"]


@pytest.mark.parametrize(("changes", "runner"), [([], "ray"), ([*GOODNESS, "model.normalization=rms"], "serial")])
def test_runs_with_any_number_of_stages_and_chunks_are_equal(ray_start_4_cpus, changes, runner, tmp_path):
    settings = [*SHORT, *AUGMENTED, *changes]
    assert len(digests("digits", settings, [("serial", 1, 7), (runner, 3, 20)], tmp_path)) == 1


def test_run_is_resumed_with_other_stages(run, tmp_path):
    settings = [*SHORT, "checkpoint.every_minibatches=10", "checkpoint.keep_last=50", "pipeline.chunk_size=5"]
    stopped = train(load_config("digits", settings), runner="serial", runs=tmp_path)
    (stopped.folder / "summary.json").unlink()  # as if it had been stopped
    for checkpoint in sorted((stopped.folder / "checkpoints").iterdir())[3:]:
        shutil.rmtree(checkpoint)
    config = load_config("digits", [*SHORT, "pipeline.stages=1"])
    resumed = train(config, runner="serial", runs=tmp_path, resume=stopped.folder)
    assert resumed.summary["weights_sha256"] == run.summary["weights_sha256"]


def test_exported_network_predicts_the_same(run, tmp_path):
    export_network(run, tmp_path / "out")
    samples = run.dataset.samples["test"][:20]
    expected = run.predict(samples)
    assert torch.equal(load_network(tmp_path / "out").predict(samples).goodness, expected.goodness)
    program = torch.export.load(tmp_path / "out" / "classifier.pt2").module()
    label, probability, _ = program(samples.view(20, 1, 8, 8))
    assert torch.equal(label, expected.label)
    torch.testing.assert_close(probability, expected.probabilities)


def test_baseline_trains_convolutions_by_backpropagation(tmp_path):
    config = load_config("digits", [*SHORT, "model.normalization=rms", "training.epochs=10"])
    run = train(config, runner="backpropagation", runs=tmp_path)
    assert run.summary["test_readout_error"] < 0.2
    assert run.network.layers[0].running_mean.abs().max() > 0.01  # with the statistics of minibatches


def test_images_are_mirrored_with_probability_one_half():
    encoder = prepare(load_config("digits", [*SHORT, "data.flip=true"])).architecture.encoder
    samples = torch.arange(64, dtype=torch.uint8).expand(1, 1000, 64)
    drawn = encoder.draw_augmentation(1000, generator(0, "jitter", 0)).unsqueeze(0)
    images = encoder.augment(samples, drawn)[0].view(1000, 8, 8)
    is_mirrored = images[:, 0, 0] == 7
    assert 400 < is_mirrored.sum() < 600
    expected = torch.arange(64, dtype=torch.uint8).view(8, 8)
    assert (images[is_mirrored] == expected.flip(1)).all()
    assert (images[~is_mirrored] == expected).all()


def test_dropout_sets_channels_of_what_is_passed_on_to_zero_in_training_only():
    rule = Rule(objective="classifier", normalization="none", update=Update(0.1, 0.0, 0.0, "sgd"))
    plain, layer = (make_layer(Conv(8, pool="max", dropout=dropout), rule) for dropout in (0.0, 0.5))
    rows, labels = random_rows(1), torch.arange(B) % C
    noise = layer.draw(B, generator(0, "noise"))
    assert set(noise.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(layer(rows).activations, plain(rows).activations)
    expected, metrics = plain.train_minibatch(Minibatch(rows, Passes(0, False), labels))
    output, same_metrics = layer.train_minibatch(Minibatch(rows, Passes(0, False), labels, noise.double()))
    maps = expected.activations.view(B, -1, 8) * noise.unsqueeze(1)
    torch.testing.assert_close(output.activations.view(B, -1, 8), maps)
    assert torch.equal(output.scores, expected.scores)
    assert same_metrics[0] == metrics[0]
    assert torch.equal(layer.weight, plain.weight)  # the objective reads all channels
    assert not plain.draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_by_adamw_is_that_of_torch(dtype):
    """Gradients of convolutions are channels-last, which the fused kernel of torch would read in the wrong order."""
    update = Update(0.01, 0.1, 0.9, "adamw")
    rule = Rule(objective="classifier", normalization="none", peer_strength=0.0, update=update)
    settings = {"rule": rule, "classes": C, "generator": generator(0, "layer"), "compute_dtype": dtype}
    layer = Conv(8).build(FORM, **settings)
    layer.add_optimizer_state()
    weight, rows, labels = layer.weight.clone(), random_rows(1).to(dtype), torch.arange(B) % C
    seen = {}
    gradients = layer.gradients
    layer.gradients = lambda *args: seen.setdefault("gradients", gradients(*args))
    for _ in range(2):  # the map of class scores is 0 at first, and sends no gradient
        weight = layer.weight.clone()
        seen.clear()
        moments = [layer.optimizer.get_buffer(f"weight/{name}").clone() for name in ("mean", "mean_square")]
        layer.train_minibatch(Minibatch(rows, Passes(0, False), labels))
    gradient = seen["gradients"]["weight"].float()
    assert gradient.abs().max() > 0
    mean, square = moments[0] * 0.9 + 0.1 * gradient, moments[1] * 0.999 + 0.001 * gradient**2
    step = (mean / (1 - 0.9**2)) / ((square / (1 - 0.999**2)).sqrt() + 1e-8)
    torch.testing.assert_close(layer.weight, weight * (1 - 0.01 * 0.1) + 0.01 * step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        ("training.schedule=greedy", "training.epochs=1"),
        ("training.updates_per_minibatch=2", "training.epochs=1"),
        (
            *("training.objective=goodness", "negatives.kind=noise", "model.normalization=rms", "data.flip=true"),
            "training.epochs=1",
        ),
    ],
)
def test_other_ways_of_training_are_equal_in_one_and_in_several_stages(changes, tmp_path):
    digests = set()
    for stages in (1, 2, 3):
        config = load_config("digits", [*SHORT, *changes, f"pipeline.stages={stages}", "data.label=none"])
        digests.add(train(config, runner="serial", runs=tmp_path).summary["weights_sha256"])
    assert len(digests) == 1
