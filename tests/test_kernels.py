"""Fused kernels compute what torch's operations compute, and give the same bits wherever a run is spread."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import digests, forget_end
from test_labels import FIRST_LAYERS, make_labeled_rows

from ffdist import load_config, train
from ffdist.errors import ConfigError
from ffdist.ff import kernels
from ffdist.ff.dense import DenseLayer
from ffdist.ff.forms import Form
from ffdist.ff.goodness import NORMALIZATIONS
from ffdist.ff.layers import Minibatch, Passes
from ffdist.ff.objectives import GoodnessObjective, Rule
from ffdist.ff.optimizers import Update
from ffdist.ff.relu import ReluLayer
from ffdist.ff.specs import Conv, Dense, Local
from ffdist.training.prepare import prepare

compiled = pytest.mark.skipif(
    not kernels.are_compiled(), reason="needs compiled kernels; install a C compiler and then ffdist"
)
LAYERS = {
    "dense": (Form((70,)), Dense(units=50)),
    "bands": (Form((2, 9, 9)), Local(grid=3, field=3, units=20, stride=2)),
    "windows": (Form((16, 4, 4), channels_last=True), Local(grid=3, field=2, units=30)),
}
FUSED = ["pipeline.executor=fused", "training.epochs=2", "model.layers=[60, 50, 40]", "tracking.artifacts=[]"]


def make_layers(form, spec, rule, precision, **settings):
    """Makes two equal layers, one for each executor."""
    settings = {"compute_dtype": getattr(torch, precision), "generator": torch.Generator().manual_seed(0), **settings}
    layer = spec.build(form, rule=rule, **settings)
    layer.add_optimizer_state()
    fused = deepcopy(layer)
    fused.rule = fused.objective.rule = replace(rule, executor="fused")
    return layer, fused


def check_equal(layer, fused, minibatch, precision):
    """Trains two layers on a minibatch, three times, and compares their outputs, metrics and states."""
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {"rtol": 0.02, "atol": 0.02}
    before = layer.weight.clone()
    for _ in range(3):
        (output, metrics), (fused_output, fused_metrics) = (
            each.train_minibatch(minibatch, measure=True) for each in (layer, fused)
        )
    assert output.activations.dtype == fused_output.activations.dtype
    torch.testing.assert_close(fused_output, output, **tolerance)
    torch.testing.assert_close(fused_metrics, metrics, **tolerance)
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor, **tolerance)
    assert not torch.equal(fused.weight, before)
    if isinstance(layer, ReluLayer):
        torch.testing.assert_close(fused._compute_weight, layer._compute_weight, rtol=0.02, atol=0.02)


@compiled
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "normalization"), [*product(LAYERS, NORMALIZATIONS)])
@pytest.mark.parametrize("goodness", ["sum_of_squares", "minus_mean_of_squares"])
def test_fused_layers_learn_what_others_learn(kind, normalization, goodness, precision):
    form, spec = LAYERS[kind]
    rule = Rule(normalization=normalization, goodness=goodness)
    layer, fused = make_layers(form, spec, rule, precision)
    rows = torch.randn(4, 6, form.width, generator=torch.Generator().manual_seed(1)).to(layer.compute_dtype)
    assert fused._is_fused
    check_equal(layer, fused, Minibatch(rows, Passes(num_negatives=2)), precision)


@compiled
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("label", FIRST_LAYERS)
def test_fused_first_layers_learn_from_samples_and_labels_apart(label, precision):
    form, spec = FIRST_LAYERS[label]
    layer, fused = make_layers(form, spec, Rule(), precision)
    rows = make_labeled_rows(label, 1)
    check_equal(layer, fused, Minibatch(rows, Passes(num_negatives=2)), precision)


CLASSIFY = Rule(
    objective="class_goodness",
    normalization="none",
    peer_strength=0.0,
    label_smoothing=0.1,
    pooled_features=200,
    contrast=0.5,
    update=Update(0.1, 0.001, optimizer="sgd"),
)


def make_convolutions(spec, rule, precision, form):
    """Makes two equal convolutions, one for each executor, and a minibatch."""
    generator = torch.Generator().manual_seed(1)
    layer, fused = make_layers(form, spec, rule, precision, classes=4, objective_generator=generator)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1 or name == "objective.weight":  # otherwise initially 0 or 1
                parameter.uniform_(0.1, 1, generator=generator)
    fused.load_state_dict(layer.state_dict())
    rows = torch.randn(1, 24, form.width, generator=generator).add_(0.5).to(layer.compute_dtype)
    noise = layer.draw(24, generator) if layer.draws else None
    return layer, fused, Minibatch(rows, Passes(0, False), torch.arange(24) % 4, noise)


@compiled
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(11, 13), (8, 7), (2, 3)])
@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (Conv(20, dropout=0.2), {}),
        (Conv(20, pool="max", dropout=0.2), {"objective": "classifier"}),
        (Conv(20, pool="average", kernel=2, padding=1), {"contrast": 0.0}),
    ],
)
def test_fused_convolutions_learn_what_others_learn(spec, settings, size, precision):
    layer, fused, minibatch = make_convolutions(spec, replace(CLASSIFY, **settings), precision, Form((5, *size)))
    assert fused._is_fused
    check_equal(layer, fused, minibatch, precision)
    with torch.no_grad():
        torch.testing.assert_close(fused(minibatch.rows), layer(minibatch.rows), rtol=0.02, atol=0.02)


@compiled
@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (Conv(20, norm="group"), {}),
        (Conv(20, activation="leaky_relu"), {}),
        (Conv(20), {"similarity": 1.0}),
        (Conv(20), {"class_scores": "groups"}),
        (Conv(20), {"normalization": "rms"}),
        (Conv(20), {"updates_per_minibatch": 2}),
    ],
)
def test_convolutions_without_kernels_are_trained_as_before(spec, settings):
    layer, fused, minibatch = make_convolutions(spec, replace(CLASSIFY, **settings), "float32", Form((5, 8, 7)))
    for each in (layer, fused):
        each.train_minibatch(minibatch)
    assert all(torch.equal(tensor, fused.state_dict()[name]) for name, tensor in layer.state_dict().items())


@compiled
def test_not_a_number_is_not_hidden():
    sums = torch.tensor([[[1.0, torch.nan, -1.0], [-torch.nan, 2.0, -3.0]]]).to(torch.bfloat16)
    activated = kernels.activate(sums, torch.zeros(3), 2, normalization="none", dtype=torch.bfloat16)
    assert activated.passed.isnan().tolist() == [[False, True, False], [True, False, False]]
    assert activated.squares.isnan().all()
    assert activated.passed[1, 1:].tolist() == [2, 0]


@compiled
def test_bfloat16_is_rounded_as_torch_rounds_it():
    values = torch.randn(1, 50, 333, generator=torch.Generator().manual_seed(0)).abs() * torch.logspace(-30, 30, 333)
    activated = kernels.activate(values, torch.zeros(333), 1, normalization="none", dtype=torch.bfloat16)
    assert torch.equal(activated.passed, values[0].to(torch.bfloat16))


@compiled
@pytest.mark.parametrize(
    "rule",
    [
        Rule(goodness="softmax"),
        Rule(alternating=True),
        Rule(updates_per_minibatch=2),
        Rule(update=Update(0.01, 0.001, optimizer="adamw")),
        Rule(update=Update(0.01, 0.001, clip_norm=1.0)),
        Rule(similarity=0.5),
    ],
)
def test_layers_without_kernels_are_trained_as_before(rule):
    form, spec = LAYERS["dense"]
    layer, fused = make_layers(form, spec, rule, "float32")
    labels = torch.arange(6) % 2
    rows = torch.randn(2, 6, form.width, generator=torch.Generator().manual_seed(1))
    for each in (layer, fused):
        each.train_minibatch(Minibatch(rows, Passes(1, False), labels))
    assert all(torch.equal(tensor, fused.state_dict()[name]) for name, tensor in layer.state_dict().items())


@compiled
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("training.precision=float32", "negatives.kind=hard_label", "negatives.prediction_delay=20"),
        (
            "data.label=everywhere",
            "model.layers=[{kind: local, grid: 3, field: 4, units: 12, stride: 2}, {kind: local, grid: 2, field: 2, "
            "units: 20}, 30]",
        ),
        ("data.label=none", "negatives.kind=hybrid", "training.schedule=greedy", "training.epochs=1"),
        (
            "model.layers=[{kind: conv, channels: 8}, {kind: conv, channels: 12, pool: max, dropout: 0.1}, 30]",
            "training.objective=class_goodness",
            "training.contrast=0.5",
            "training.optimizer=adamw",
            "training.peer_normalization=0",
            "model.normalization=none",
            "negatives.kind=none",
            "data.label=none",
        ),
    ],
)
def test_runs_with_any_number_of_stages_and_chunks_are_equal(settings, ray_start_4_cpus, tmp_path):
    paces = [("serial", 1, 7), ("serial", 3, 20), ("ray", 2, 5)]
    (fused,) = digests("digits", [*FUSED, *settings], paces, tmp_path)
    (eager,) = digests("digits", [*FUSED, *settings, "pipeline.executor=eager"], [("serial", 1, 7)], tmp_path)
    assert fused != eager, "the kernels are used"


@compiled
def test_a_fused_run_learns_and_is_resumed(tmp_path):
    settings = ["pipeline.executor=fused", "training.epochs=10", "tracking.artifacts=[]"]
    kept = ["checkpoint.every_minibatches=50", "checkpoint.keep_last=50"]
    run = train(load_config("digits", [*settings, *kept]), runner="serial", runs=tmp_path)
    assert run.summary["test_goodness_error"] < 0.1
    forget_end(run, 2)
    resumed = train(load_config("digits", settings), runner="serial", runs=tmp_path, resume=run.folder)
    assert resumed.summary["weights_sha256"] == run.summary["weights_sha256"]


class Doubled(GoodnessObjective):
    """An objective of the user, with other scores."""

    def scores(self, activations, squares):
        return 2 * super().scores(activations, squares)


class OtherLayer(DenseLayer):
    """A layer of the user."""


@compiled
def test_kernels_do_not_train_subclasses_of_the_user():
    form, spec = LAYERS["dense"]
    _, fused = make_layers(form, spec, Rule(), "float32")
    assert fused._is_fused
    fused.objective = Doubled(fused.rule, None, Form((50,)), 2)
    assert not fused._is_fused
    layer = OtherLayer(Form((50,)), (50, 70), rule=Rule(executor="fused"))
    assert not layer._is_fused


@compiled
@pytest.mark.parametrize("content", [b"no library", None])
def test_a_damaged_or_older_library_is_not_used(content, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "LIBRARY" if content else "SOURCE", tmp_path / "file")
    (tmp_path / "file").write_bytes(content or b"another source")
    kernels._library.cache_clear()
    try:
        assert not kernels.are_compiled()
    finally:
        kernels._library.cache_clear()


def test_missing_kernels_are_an_error_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "missing.so")
    kernels._library.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"install a C compiler and then ffdist, or set executor to eager"):
            prepare(load_config("digits", FUSED))
    finally:
        kernels._library.cache_clear()


def test_missing_kernels_of_another_machine_are_named(tmp_path):
    code = (
        "from ffdist.ff import kernels; from pathlib import Path; import torch; kernels.LIBRARY = Path('missing.so'); "
        "kernels.activate(torch.zeros(1, 1, 1), torch.zeros(1), 1, normalization='none', dtype=torch.float32)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "install ffdist on this machine with a C compiler" in result.stderr
