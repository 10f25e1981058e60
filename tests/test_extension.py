"""The extension points: a layer, an objective and an encoder that are not part of the package."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import mlflow
import numpy as np
import pytest
import ray
import torch
from sklearn.datasets import load_wine
from torch import nn

from ffdist import load_config, load_network, train
from ffdist.data.datasets import READERS
from ffdist.data.readers import Splits
from ffdist.ff.encoders import ENCODERS, Encoder
from ffdist.ff.forms import Form
from ffdist.ff.layers import Layer
from ffdist.ff.objectives import OBJECTIVES, AutogradObjective
from ffdist.ff.specs import LAYERS, LayerSpec
from ffdist.runs.export import export_network
from ffdist.runs.folder import checkpoints_of

CONFIG = [
    "model.layers=[{kind: low_rank, units: 30, rank: 6}, 20, {kind: low_rank, units: 10, rank: 4}]",
    "training.objective=hinge",
    "training.optimizer=adam",
    "training.learning_rate=0.003",
    "training.epochs=80",
    "training.batch_size=20",
    "data.label=append",
    "checkpoint.every_minibatches=20",
    "tracking.artifacts=[]",
]


@dataclass(frozen=True)
class LowRank(LayerSpec):
    """A layer whose weight is the product of two smaller ones."""

    units: int
    rank: int

    def output_form(self, form):
        return Form((self.units,))

    def num_parameters(self, form):
        return self.rank * (form.width + self.units) + self.units

    def build(self, form, **settings):
        return LowRankLayer(self, form, **settings)


class LowRankLayer(Layer):
    """Has nested modules, and a buffer that counts in inference; its gradient is computed by autograd."""

    def __init__(self, spec, form, *, generator=None, **settings):
        super().__init__(spec.output_form(form), **settings)
        self.down, self.up = nn.Linear(form.width, spec.rank, bias=False), nn.Linear(spec.rank, spec.units)
        self.register_buffer("gain", torch.ones(spec.units))
        if generator:
            for parameter in (*self.down.parameters(), *self.up.parameters()):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
            self.gain.uniform_(0.5, 1.5, generator=generator)

    def compute(self, inputs):
        return (self.up(self.down(inputs.to(self.gain.dtype))) * self.gain).relu()


class Hinge(AutogradObjective):
    """The goodness of a sample should exceed that of its negatives by the number of units; class 0 counts twice."""

    needs_labels = True

    def scores(self, activations, squares):
        return squares

    def loss(self, activations, labels):
        goodness = activations.square().sum(-1)
        missing = (self.num_units - goodness[:1] + goodness[1:]).relu().mean(0)
        return (missing * (1 + (labels == 0))).mean()


class Table(Encoder):
    """Rows of a table."""

    dtype = torch.float32

    def values(self, samples):
        return samples


def read_wine(config) -> Splits:
    data = load_wine()
    values, labels = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    values = (values - values.mean(0)) / values.std(0)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[:140], "test": order[140:]}
    return Splits(
        {split: values[part] for split, part in parts.items()},
        {split: labels[part] for split, part in parts.items()},
        encoder="table",
    )


def register() -> None:
    """Adds the entry that workers look up; layers and encoders reach them as objects."""
    from ffdist.ff.objectives import OBJECTIVES  # that of the worker, not a copy

    OBJECTIVES["hinge"] = Hinge


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for registry, name, toy in (
        (LAYERS, "low_rank", LowRank),
        (OBJECTIVES, "hinge", Hinge),
        (ENCODERS, "table", Table),
    ):
        monkeypatch.setitem(registry, name, toy)
    monkeypatch.setitem(READERS, "digits", read_wine)


@pytest.fixture
def ray_with_toys():
    """Actors get the classes by value, because they cannot import this module."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"worker_process_setup_hook": register})
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def stopped_at_a_checkpoint(config, runs):
    """Trains until there are checkpoints, stops, and returns the folder."""

    def stop() -> None:
        while not any(len(checkpoints_of(config, folder).names()) > 2 for folder in runs.glob("toys-*")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(config, runner="serial", runs=runs, name="toys")
    (folder,) = runs.glob("toys-*")
    return folder


@pytest.mark.slow  # modules and objectives that a configuration names are tested in test_module.py
def test_a_layer_an_objective_and_an_encoder_of_a_user(ray_with_toys, tmp_path):
    config = load_config("digits", CONFIG)
    with_model = load_config("digits", [*CONFIG, "tracking.artifacts=[model]"])
    run = train(with_model, runner="serial", runs=tmp_path / "serial")
    digest = run.summary["weights_sha256"]
    assert run.summary["test_goodness_error"] < 0.3  # two of three would be wrong by chance
    assert {"layer_1/loss", "layer_3/active_fraction"} <= run.metrics.keys()

    over_ray = train(config, runner="ray", runs=tmp_path / "ray")
    assert over_ray.summary["stages"] == 3
    assert over_ray.summary["weights_sha256"] == digest

    folder = stopped_at_a_checkpoint(config, tmp_path / "stopped")
    two_stages = load_config("digits", [*CONFIG, "pipeline.stages=2"])
    resumed = train(two_stages, runner="serial", runs=tmp_path / "stopped", resume=folder)
    assert (resumed.summary["stages"], resumed.summary["weights_sha256"]) == (2, digest)
    state = checkpoints_of(config, folder).read(resumed.summary["checkpoint"])[1]["layer_1"]
    assert {"down.weight", "up.bias", "gain", "optimizer.down/weight/mean", "statistics.mean_activity"} <= state.keys()

    samples = run.dataset.samples["test"]
    expected = run.predict(samples)
    export_network(run, tmp_path / "exported")
    assert torch.equal(load_network(tmp_path / "exported").predict(samples).goodness, expected.goodness)
    label, probability, _ = torch.export.load(tmp_path / "exported" / "classifier.pt2").module()(samples)
    assert torch.equal(label, expected.label)
    torch.testing.assert_close(probability, expected.probabilities)
    served = mlflow.pyfunc.load_model(str(next((tmp_path / "exported").glob("*/MLmodel")).parent))
    assert np.array_equal(served.predict(samples.numpy())["label"], expected.label.numpy())
    started = train(config, runner="serial", runs=tmp_path / "warm", init_from=run.folder)
    assert started.summary["weights_sha256"] != digest
