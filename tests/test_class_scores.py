"""Objectives that classify in one pass, without negatives and without a label in the input."""

import pytest
import torch
import torch.nn.functional as F
from helpers import digests, forget_end

from ffdist import ConfigError, Run, load_config, load_network, train
from ffdist.ff.dense import DenseLayer
from ffdist.ff.forms import Form
from ffdist.ff.goodness import squared_norm
from ffdist.ff.keyed import generator
from ffdist.ff.layers import Minibatch, Passes
from ffdist.ff.objectives import ClassGoodness, Classifier, Rule, num_parameters
from ffdist.ff.optimizers import Update
from ffdist.runs.export import export_network
from ffdist.training.prepare import prepare

B, D, H, C = 8, 7, 12, 3
SHORT = [
    *("model.layers=[60,50,40]", "training.epochs=3", "training.objective=class_goodness", "tracking.artifacts=[]"),
    *("training.precision=float32", "training.optimizer=adamw", "training.learning_rate=0.005", "data.label=auto"),
    "training.learning_rate_schedule=cosine",
]


def make_layer(rule) -> DenseLayer:
    layer = DenseLayer(
        Form((H,)), (H, D), rule=rule, classes=C, generator=generator(0, "layer"), compute_dtype=torch.float64
    )
    layer.add_optimizer_state()
    layer = layer.double()
    layer.refresh()
    for name, parameter in layer.objective.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator(1, name)))
    return layer


def expected_loss(rule, rows, labels, parameters):
    """The loss by its formula, from parameters by name."""
    activations = F.linear(rows, parameters["weight"], parameters["bias"]).relu()
    if rule.normalization == "rms":
        activations = activations / activations.square().mean(1, keepdim=True).sqrt()
    features = activations.square() if rule.objective == "class_goodness" else activations
    if rule.class_scores == "groups":
        logits = parameters["objective.factor"] * features.view(len(rows), C, H // C).mean(2)
    else:
        logits = F.linear(features, parameters["objective.weight"], parameters["objective.bias"])
    return F.cross_entropy(logits, labels, label_smoothing=rule.label_smoothing)


@pytest.mark.parametrize("objective", ["class_goodness", "classifier"])
@pytest.mark.parametrize("class_scores", ["learned", "groups"])
@pytest.mark.parametrize("normalization", ["rms", "none"])
def test_update_follows_the_gradient_of_the_cross_entropy(objective, class_scores, normalization):
    update = Update(0.5, 0.0, momentum=0.0, optimizer="sgd")
    rule = Rule(
        objective=objective,
        class_scores=class_scores,
        normalization=normalization,
        label_smoothing=0.1,
        peer_strength=0.0,
        update=update,
    )
    layer = make_layer(rule)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    rows = torch.randn(B, D, generator=generator(2, "rows"), dtype=torch.float32).double()
    labels = torch.arange(B) % C
    (activations, scores), metrics = layer.train_minibatch(Minibatch(rows.unsqueeze(0), Passes(0, False), labels))
    leaves = {name: parameter.requires_grad_() for name, parameter in before.items()}
    loss = expected_loss(rule, rows, labels, leaves)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for (name, parameter), gradient in zip(layer.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter, before[name].detach() - 0.5 * gradient)
    assert activations.shape == (1, B, H)
    assert scores.shape == (1, B, C)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(1, B, dtype=torch.float64))
    assert metrics[0].item() == pytest.approx(loss.item(), rel=1e-5)
    wrong = scores[0].clone()
    wrong[torch.arange(B), labels] = -torch.inf
    expected = (scores[0].argmax(1) != labels).double().mean(), scores[0][torch.arange(B), labels].mean()
    assert metrics[1:4].tolist() == pytest.approx([*map(float, expected), wrong.amax(1).mean().item()], rel=1e-5)


def test_units_that_are_left_over_belong_to_no_group():
    objective = ClassGoodness(Rule(class_scores="groups", normalization="none"), None, Form((11,)), 3)
    activations = torch.ones(2, 11)
    activations[:, 9:] = 100  # three groups of three, and two units
    activations[1, 3:6] = 2
    squares = activations.square().sum(1)
    expected = torch.tensor([[1.0, 1, 1], [1, 4, 1]]).log_softmax(1)
    torch.testing.assert_close(objective.scores(activations, squares), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_groups_of_a_map_are_groups_of_channels(channels_last):
    form = Form((4, 2, 3), channels_last=channels_last)
    objective = Classifier(Rule(class_scores="groups", normalization="none"), None, form, 2)
    maps = torch.rand(5, 4, 2, 3, generator=generator(0, "maps"))
    rows = (maps.permute(0, 2, 3, 1) if channels_last else maps).flatten(1)
    expected = torch.stack((maps[:, :2].mean((1, 2, 3)), maps[:, 2:].mean((1, 2, 3))), 1).log_softmax(1)
    torch.testing.assert_close(objective.scores(rows, rows.square().sum(1)), expected)


def test_maps_are_pooled_to_a_number_of_features():
    shapes = {
        (100,): (100,),
        (32, 8, 8): (32, 8, 8),
        (64, 9, 8): (64, 5, 4),
        (4096, 8, 8): (4096, 1, 1),
        (64, 32, 32): (64, 5, 5),
        (256, 7, 7): (256, 2, 2),
    }
    assert {shape: Form(shape).pooled(2048).shape for shape in shapes} == shapes
    form = Form((3, 4, 4), channels_last=True)
    objective = Classifier(Rule(objective="classifier", normalization="none", pooled_features=12), None, form, 2)
    maps = torch.rand(2, 3, 4, 4, generator=generator(0, "maps"))
    features = objective.features(maps.permute(0, 2, 3, 1).flatten(1))
    torch.testing.assert_close(features, F.avg_pool2d(maps, 2).flatten(1))
    assert objective.weight.shape == (2, 12)
    assert num_parameters(objective.rule, form, 2) == 2 * 13


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "most"), [((3, 4, 6), 20), ((3, 5, 7), 20), ((2, 3, 3), 1), ((3, 2, 2), 12)])
def test_gradient_of_pooling_is_that_of_autograd(shape, most, channels_last):
    form = Form(shape, channels_last=channels_last)
    to = form.pooled(most)
    rows = torch.rand(4, form.size, generator=generator(0, "rows"), dtype=torch.float64).requires_grad_()
    weights = torch.rand(4, to.size, generator=generator(0, "weights"), dtype=torch.float64)
    (expected,) = torch.autograd.grad((form.pool(rows, to) * weights).sum(), rows)
    torch.testing.assert_close(form.unpool(weights, to), expected)


@pytest.mark.parametrize("objective_class", [Classifier, ClassGoodness])
@pytest.mark.parametrize("class_scores", ["learned", "groups"])
@pytest.mark.parametrize("normalization", ["rms", "l2", "none"])
@pytest.mark.parametrize("form", [Form((13,)), Form((7, 4, 6)), Form((7, 5, 3), channels_last=True), Form((4, 5))])
def test_gradients_in_closed_form_are_those_of_autograd(objective_class, class_scores, normalization, form):
    rule = Rule(class_scores=class_scores, normalization=normalization, pooled_features=50, label_smoothing=0.2)
    objective = objective_class(rule, None, form, C).double()
    for name, parameter in objective.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator(1, name))).requires_grad_()
    activations = torch.randn(1, B, form.size, generator=generator(2, "activations")).double().requires_grad_()
    labels = torch.arange(B) % C
    scores = objective.scores(activations, squared_norm(activations))
    expected = F.nll_loss(scores[0], labels) * 0.8 - 0.2 * scores[0].mean()
    leaves = dict(objective.named_parameters())
    gradient, *gradients = torch.autograd.grad(-expected, [activations, *leaves.values()])
    with torch.no_grad():
        loss = objective.loss_of(activations, scores, labels)
        torch.testing.assert_close(loss.direction(slice(0, 1)), gradient)
        torch.testing.assert_close(dict(loss.parameters), dict(zip(leaves, gradients, strict=True)))
        torch.testing.assert_close(loss.metrics[0], expected)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Run:
    return train(load_config("digits", SHORT), runner="serial", runs=tmp_path_factory.mktemp("runs"))


def test_layers_learn_to_classify_and_predict_by_the_sum_of_their_scores(reference):
    summary, labels = reference.summary, reference.dataset.labels["test"]
    assert summary["test_goodness_error"] < 0.06
    prediction = reference.predict(reference.dataset.samples["test"])
    assert prediction.goodness.shape == (3, len(labels), 10)
    assert torch.equal(prediction.label, prediction.goodness[1:].sum(0).argmax(1))
    assert (prediction.label != labels).double().mean().item() == pytest.approx(summary["test_goodness_error"])
    names = {name.partition("/")[2] for name in reference.metrics if name.startswith("layer_2/")}
    assert names == {"loss", "class_error", "score_true", "score_wrong", "active_fraction", "weight_rms"}
    assert reference.config.negatives.kind == reference.config.data.label == "none"
    assert reference.config.training.peer_normalization == 0


def test_runs_with_any_number_of_stages_and_chunks_are_equal(reference, ray_start_4_cpus, tmp_path):
    paces = [("serial", 1, 7), ("ray", 3, 5)]
    assert digests("digits", SHORT, paces, tmp_path) == {reference.summary["weights_sha256"]}


@pytest.mark.parametrize("change", ["training.class_scores=groups", "training.objective=classifier"])
def test_other_class_scores_are_equal_in_one_and_in_several_stages(change, tmp_path):
    settings = [*SHORT, change, "training.epochs=1"]
    assert len(digests("digits", settings, [("serial", 1, 7), ("serial", 3, 20)], tmp_path)) == 1


def test_run_without_negatives_is_resumed_with_other_stages(reference, tmp_path):
    settings = [*SHORT, "checkpoint.every_minibatches=10", "checkpoint.keep_last=50", "pipeline.chunk_size=5"]
    run = train(load_config("digits", settings), runner="serial", runs=tmp_path)
    forget_end(run, 4)
    config = load_config("digits", [*SHORT, "pipeline.stages=1", "pipeline.chunk_size=9"])
    resumed = train(config, runner="serial", runs=tmp_path, resume=run.folder)
    assert resumed.summary["weights_sha256"] == reference.summary["weights_sha256"]


def test_exported_network_predicts_by_class_scores(reference, tmp_path):
    export_network(reference, tmp_path / "out")
    samples = reference.dataset.samples["test"][:20]
    expected = reference.predict(samples)
    network = load_network(tmp_path / "out")
    assert torch.equal(network.predict(samples).goodness, expected.goodness)
    program = torch.export.load(tmp_path / "out" / "classifier.pt2").module()
    label, _, goodness = program(samples.view(20, 1, 8, 8))
    assert torch.equal(label, expected.label)
    torch.testing.assert_close(goodness, expected.goodness[1:].sum(0))


def test_classes_without_samples_are_not_predicted(tmp_path):
    images = torch.randint(0, 256, (60, 5, 5), generator=generator(0, "images"), dtype=torch.uint8)
    labels = torch.arange(60) % 2 * 2  # classes 0 and 2
    config = {
        "data": {"name": "arrays", "classes": 3},
        "model": {"layers": [9, 8]},
        "training": {"objective": "classifier", "epochs": 1, "batch_size": 10},
        "tracking": {"artifacts": []},
    }
    run = train(config, data=(images, labels), runner="serial", runs=tmp_path)
    prediction = run.predict(images)
    assert (prediction.goodness[:, :, 1] == -torch.inf).all()
    assert set(prediction.label.tolist()) <= {0, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["negatives.kind=none"], "training.objective=goodness needs negatives; set negatives.kind"),
        (["training.objective=classifier", "negatives.kind=hybrid"], r"needs no negatives .*kind: hybrid"),
        (["training.objective=classifier", "data.label=append"], r"shows no label .*data\.label: append"),
        (["training.objective=classifier", "training.updates=alternating"], "alternating is for negatives"),
        (["training.warmup_epochs=60"], r"warmup_epochs must be fewer than all epochs .*60, epochs: 60"),
        (["training.objective=classifier", "negatives.store=folder"], "kind=none makes no negatives"),
    ],
)
def test_settings_that_contradict_the_objective_are_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", ["data.label=auto", *settings])


def test_groups_need_a_unit_for_each_class():
    settings = [
        "data.label=auto",
        "training.objective=classifier",
        "training.class_scores=groups",
        "model.layers=[20,9]",
    ]
    with pytest.raises(
        ConfigError, match=r"class_scores=groups needs a unit .* each of the 10 classes \(a layer has 9\)"
    ):
        prepare(load_config("digits", settings))
