"""Idea 2 of the design: however the work is spread, the results are bitwise those of the serial run."""

from typing import NamedTuple

import pytest
import torch

from ffdist.checkpoint import weights_sha256
from ffdist.config import Data, Pipeline
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.data.order import SampleOrder
from ffdist.ff.network import Architecture
from ffdist.pipeline.partition import layer_costs, partition
from ffdist.pipeline.runner import Blueprint, Runner, serial_runner
from ffdist.pipeline.schedule import Evaluate, Train, schedule

EPOCHS, BATCH_SIZE = 2, 50


class Results(NamedTuple):
    metrics: torch.Tensor
    readout_metrics: torch.Tensor
    goodness: torch.Tensor
    predicted: torch.Tensor
    states: list[dict[str, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(Data(name="digits", label="append"), seed=0, validation_samples=200)


def an_order(digits) -> SampleOrder:
    return SampleOrder(0, len(digits.labels["train"]), BATCH_SIZE)


def a_blueprint(digits, stages, precision, label="append", actors=1) -> Blueprint:
    architecture = Architecture(
        digits.pixels, digits.classes, (60, 50, 40), seed=3, precision=precision, label=label, predict_from=2
    )
    cut = partition(layer_costs(architecture.widths), stages)
    return Blueprint(architecture, an_order(digits), "wrong_label", actors, cut, measure_every=5, device="cpu")


def results(runner: Runner, digits: Dataset, chunk_size: int) -> Results:
    metrics, readout, goodness, predicted, states = [], [], [], [], []
    orders = schedule(
        epochs=EPOCHS,
        minibatches=an_order(digits).minibatches,
        chunk_size=chunk_size,
        gain=lambda epoch: 1 / (epoch + 1),
        validation_samples=200,
        test_samples=360,
        evaluate_every=1,
        evaluation_block=64,
    )
    for order, result in runner.run(orders):
        if isinstance(order, Train):
            metrics.append(torch.cat([report.metrics for report in result.stages], 1))
            readout.append(result.readout.metrics)
        elif isinstance(order, Evaluate):
            goodness.append(torch.cat(result.goodness))
            predicted.append(result.predicted)
        else:
            states.append(result())
    return Results(torch.cat(metrics), torch.cat(readout), torch.cat(goodness, 1), torch.cat(predicted), states)


def serial(digits, *, stages=1, chunk_size=24, precision="bfloat16", threads=1, **changes) -> Results:
    blueprint = a_blueprint(digits, stages, precision, **changes)
    with serial_runner(blueprint, digits.images, digits.labels["train"], threads=threads) as runner:
        return results(runner, digits, chunk_size)


def assert_equal(one: Results, other: Results) -> None:
    for name in ("metrics", "readout_metrics", "goodness", "predicted"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)
    assert len(one.states) == len(other.states) == EPOCHS
    for state, twin in zip(one.states, other.states, strict=True):
        assert state.keys() == twin.keys() == {"layer_1", "layer_2", "layer_3", "readout"}
        for layer, tensors in state.items():
            assert all(torch.equal(tensor, twin[layer][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("label", ["append", "overwrite"])
def test_stages_and_chunks_change_no_bit(digits, precision, label):
    truth = serial(digits, precision=precision, label=label)
    for stages, chunk_size in [(1, 1), (2, 7), (3, 32)]:
        other = serial(digits, stages=stages, chunk_size=chunk_size, precision=precision, label=label)
        assert_equal(truth, other)


@pytest.mark.parametrize(
    ("stages", "chunk_size", "window", "actors", "precision", "label", "threads"),
    [
        (1, 32, 1, 1, "bfloat16", "append", 2),  # the readout's sums depend on threads as well
        (2, 7, 4, 2, "float32", "overwrite", 1),  # float32 messages are read without a copy, and must not be written to
        (
            3,
            1,
            60,
            1,
            "bfloat16",
            "append",
            1,
        ),  # more in flight than an epoch has, its evaluation and snapshot included
    ],
)
def test_actors_change_no_bit(ray_start_4_cpus, digits, stages, chunk_size, window, actors, precision, label, threads):
    from ffdist.runtime.placement import Placement, reserve
    from ffdist.runtime.runner import ray_runner

    blueprint = a_blueprint(digits, stages, precision, label=label, actors=actors)
    pipeline = Pipeline(chunk_size=chunk_size, max_in_flight=window, threads_per_stage=threads)
    images, labels = digits.images, digits.labels["train"]
    with (
        reserve(Placement(stages, "cpu", 0, 0.5, 0.5, actors).bundles) as group,
        ray_runner(blueprint, group, pipeline, images=images, labels=labels) as runner,
    ):
        spread = results(runner, digits, chunk_size)
    assert_equal(serial(digits, precision=precision, label=label, threads=threads), spread)


def test_training_changes_the_weights_and_the_seed_decides_them(digits):
    """Equality above would be worth nothing if nothing had been learned."""
    first, last = serial(digits).states
    assert weights_sha256(first) != weights_sha256(last)
    start = a_blueprint(digits, 1, "bfloat16").architecture
    assert not torch.equal(start.layer(0).weight, last["layer_1"]["weight"])
    assert not torch.equal(start.layer(0).weight, Architecture(64, 10, (60, 50, 40), label="append").layer(0).weight)
