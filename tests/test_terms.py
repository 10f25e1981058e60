"""Losses that are added to an objective, settings of single layers, and gradient clipping."""

import pytest
import torch
import torch.nn.functional as F
from helpers import digests

from ffdist import ConfigError, load_config, train
from ffdist.ff.forms import Form
from ffdist.ff.keyed import generator
from ffdist.ff.layers import Minibatch, Passes
from ffdist.ff.objectives import Rule, num_parameters
from ffdist.ff.optimizers import Update
from ffdist.ff.specs import Conv, Dense, layer_entry, parse_layer
from ffdist.ff.terms import Contrast, Similarity
from ffdist.training.prepare import prepare

B, C = 12, 4
LABELS = torch.arange(B) % C
MAP, VECTOR = Form((3, 4, 4), channels_last=True), Form((20,))
SETTINGS = {"pooled_features": 12, "generator": generator(0, "term")}
CONVOLUTIONS = "[{kind: conv, channels: 8, pool: max}, {kind: conv, channels: 12}, 20]"
SHORT = [
    *("training.epochs=1", "training.objective=class_goodness", "tracking.artifacts=[]", "data.label=auto"),
    *("training.precision=float32", "training.optimizer=adamw", "training.learning_rate=0.005"),
    "model.normalization=none",
]
PACES = [("serial", 1, 1), ("serial", 2, 5), ("serial", 2, 7)]


def random_rows(form):
    return torch.randn(B, form.size, generator=generator(1, "rows"), dtype=torch.float64)


@pytest.mark.parametrize("form", [MAP, VECTOR])
def test_similarity_is_that_of_nokland_and_eidnes(form):
    """As in the function `similarity_matrix` of the paper's released code."""
    term, rows = Similarity(form, C, **SETTINGS).double(), random_rows(form)
    term.compute_dtype = torch.float64
    if form.is_map:
        values = F.conv2d(form.values(rows), term.weight, padding=1).flatten(2).std(2, correction=0)
    else:
        values = rows @ term.weight.t()
    cosines = [
        F.cosine_similarity((each - each.mean(1, True))[:, None], (each - each.mean(1, True))[None], dim=2)
        for each in (values, F.one_hot(LABELS, C).double())
    ]
    torch.testing.assert_close(term(rows, LABELS), (cosines[0] - cosines[1]).square().mean(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", [MAP, VECTOR])
def test_contrast_is_the_supervised_contrastive_loss(form):
    term, rows = Contrast(form, C, **SETTINGS).double(), random_rows(form)
    labels = LABELS.clone()
    labels[:3] = torch.tensor([0, 3, 3])  # one of them becomes rarer
    pooled = F.avg_pool2d(form.values(rows), 2).flatten(1) if form.is_map else rows
    projected = F.normalize(pooled @ term.weight.t(), dim=1)
    losses = []
    for sample in range(B):
        others = [each for each in range(B) if each != sample]
        exponentials = {each: (projected[sample] @ projected[each] / 0.1).exp() for each in others}
        same = [each for each in others if labels[each] == labels[sample]]
        if same:
            losses.append(-sum((exponentials[each] / sum(exponentials.values())).log() for each in same) / len(same))
    torch.testing.assert_close(term(rows, labels), sum(losses) / len(losses))


def test_samples_of_their_own_class_give_no_contrast():
    term = Contrast(VECTOR, B, **SETTINGS).double()
    assert term(random_rows(VECTOR), torch.arange(B)) == 0


@pytest.mark.parametrize("spec", [Conv(6), Dense(20)])
@pytest.mark.parametrize("objective", ["class_goodness", "classifier"])
def test_a_layer_with_terms_learns_like_by_autograd(spec, objective):
    form = Form((2, 5, 5))
    rule = Rule(
        objective=objective, similarity=3.0, contrast=0.5, normalization="none", peer_strength=0.0, pooled_features=50
    )
    rule = Rule(**rule.__dict__ | {"update": Update(0.1, 0.0, 0.0, "sgd")})
    settings = {"rule": rule, "classes": C, "compute_dtype": torch.float64, "generator": generator(0, "layer")}
    layer = spec.build(form, **settings, objective_generator=generator(0, "objective"))
    layer.add_optimizer_state()
    layer = layer.double()
    layer.objective.weight.add_(torch.randn(layer.objective.weight.shape, generator=generator(3, "scores")))
    layer.refresh()
    rows = random_rows(form)
    named = dict(layer.named_parameters())
    assert sum(map(torch.numel, named.values())) == spec.num_parameters(form) + num_parameters(
        rule, spec.output_form(form), C
    )
    before = {name: parameter.clone().requires_grad_() for name, parameter in named.items()}

    def loss():
        activations = layer.compute_for_training(layer.prepare(rows), B, None)
        if isinstance(spec, Dense):
            activations = F.linear(rows, before["weight"], before["bias"]).relu()
        scores = F.linear(
            layer.objective.features(activations), *(before[f"objective.{n}"] for n in ("weight", "bias"))
        )
        terms = {
            name: torch.func.functional_call(
                term, {"weight": before[f"objective.terms.{name}.weight"]}, (activations, LABELS)
            )
            for name, term in layer.objective.terms.items()
        }
        return F.cross_entropy(scores, LABELS) + 3 * terms["similarity"] + 0.5 * terms["contrast"], terms

    if isinstance(spec, Dense):
        total, terms = loss()
        gradients = dict(zip(before, torch.autograd.grad(total, [*before.values()]), strict=True))
    else:
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        total, terms = loss()
        inner = [name for name in before if name.startswith("objective.")]
        gradients = dict(
            zip(inner, torch.autograd.grad(total, [before[n] for n in inner], retain_graph=True), strict=True)
        )
        own = [name for name in before if name not in inner]
        gradients |= dict(zip(own, torch.autograd.grad(total, [named[n] for n in own]), strict=True))
        layer.load_state_dict(state)
    expected = {name: before[name].detach() - 0.1 * gradients[name] for name in before}
    _, metrics = layer.train_minibatch(Minibatch(rows.unsqueeze(0), Passes(0, False), LABELS))
    assert layer.metrics[4:6] == ("similarity", "contrast")
    torch.testing.assert_close(metrics[4:6].double(), torch.stack([*terms.values()]).detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "changes",
    [
        (f"model.layers={CONVOLUTIONS}", "training.similarity=10", "training.contrast=0.1", "training.clip_norm=0.5"),
        (
            "model.layers=[{kind: dense, units: 40, objective: classifier, optimizer: sgd, learning_rate: 0.1}, 30]",
            "training.clip_norm=0.5",
        ),
        (
            "training.objective=goodness", "data.label=append", "negatives.kind=wrong_label", "training.contrast=2",
            "model.layers=[40, {kind: dense, units: 30, learning_rate: 0}, 20]", "model.normalization=rms",
        ),
    ],
)  # fmt: skip
def test_runs_are_equal_for_any_distribution(changes, tmp_path):
    assert len(digests("digits", [*SHORT, *changes], PACES, tmp_path)) == 1


def test_each_layer_has_its_own_objective_optimizer_and_learning_rate(tmp_path):
    layers = "[{kind: dense, units: 40, objective: classifier, optimizer: sgd, learning_rate: 0}, 30]"
    config = load_config("digits", [*SHORT, f"model.layers={layers}", "training.weight_decay=0"])
    architecture = prepare(config).architecture
    assert [rule.objective for rule in architecture.rules] == ["classifier", "class_goodness"]
    assert [rule.update.optimizer for rule in architecture.rules] == ["sgd", "adamw"]
    run = train(config, runner="serial", runs=tmp_path)
    initial = architecture.layer(0)
    assert torch.equal(run.network.layers[0].weight, initial.weight)
    assert not torch.equal(run.network.layers[1].weight, architecture.layer(1).weight)
    assert sum(architecture.state_bytes[:1]) == sum(each.numel() * 4 for each in initial.state_dict().values())
    assert run.config.model.layers == config.model.layers


def test_metrics_of_layers_with_different_objectives_have_no_empty_values(tmp_path):
    objective = "def_metrics:Hinge"
    (tmp_path / "def_metrics.py").write_text(
        "from ffdist.ff.objectives import AutogradObjective\n\n\nclass Hinge(AutogradObjective):\n"
        "    def scores(self, activations, squares):\n        return squares\n\n"
        "    def loss(self, activations, labels):\n        goodness = activations.square().sum(-1)\n"
        "        return (self.num_units - goodness[:1] + goodness[1:]).relu().mean()\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        layers = f"[{{kind: dense, units: 40, objective: '{objective}', learning_rate: 0.001}}, 30]"
        changes = ["training.epochs=1", f"model.layers={layers}", "data.label=append", "tracking.artifacts=[]"]
        run = train(load_config("digits", changes), runner="serial", runs=tmp_path)
    names = {name for name in run.metrics if name.startswith("layer_")}
    assert {name for name in names if name.startswith("layer_1/")} == {
        *("layer_1/loss", "layer_1/active_fraction", "layer_1/weight_rms")
    }
    assert "layer_2/goodness_positive" in names


def test_gradients_are_clipped_to_a_norm():
    rule = Rule(normalization="none", peer_strength=0.0, update=Update(1.0, 0.0, 0.0, "sgd", clip_norm=0.01))
    layer = Dense(20).build(VECTOR, rule=rule, generator=generator(0, "layer"))
    layer.add_optimizer_state()
    before = [parameter.clone() for parameter in layer.parameters()]
    rows = torch.stack((random_rows(VECTOR), -random_rows(VECTOR))).float()
    layer.train_minibatch(Minibatch(rows, Passes(1, False)))
    change = torch.cat([(a - b).flatten() for a, b in zip(layer.parameters(), before, strict=True)])
    assert change.norm().item() == pytest.approx(0.01, rel=1e-4)


def test_settings_of_a_layer_are_kept_in_its_entry():
    entry = {"kind": "dense", "units": 5, "optimizer": "adam"}
    assert layer_entry(parse_layer(entry)) == entry
    assert layer_entry(parse_layer({"kind": "dense", "units": 5})) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.layers=[{kind: dense, units: 5, optimizer: adagrad}]"], "optimizer must be one of hinton, sgd"),
        (["model.layers=[{kind: dense, units: 5, learning_rate: -1}]"], "learning_rate must be at least 0"),
        (["model.layers=[5, {kind: dense, units: 5, objective: classifier}]"], "must need negatives, or none"),
        (["model.layers=[5, {kind: dense, units: 5, objective: hinge}]"], "objective must be one of goodness"),
        (["training.clip_norm=0"], r"training\.clip_norm"),
        (["training.similarity=-1"], r"training\.similarity"),
    ],
)
def test_wrong_settings_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(load_config("digits", changes))
