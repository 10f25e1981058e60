"""Results are bitwise equal to those of a serial run, for any distribution of the work."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch
from helpers import image_architecture
from safetensors.torch import load_file

from ffdist.checkpoint.checkpoints import CheckpointError, CheckpointWriter, checkpoint_name, weights_sha256
from ffdist.config.sections import Data, Pipeline
from ffdist.data.datasets import Dataset, load_dataset
from ffdist.data.negatives_store import Store
from ffdist.data.order import SampleOrder
from ffdist.ff.encoders import ImageEncoder
from ffdist.ff.objectives import RELEASE, Rule
from ffdist.ff.optimizers import Update
from ffdist.ff.schedules import lr_scales
from ffdist.ff.specs import Local
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.partition import partition
from ffdist.pipeline.runner import Evaluated, Runner, SnapshotTaken, Trained, serial_runner, torch_threads
from ffdist.pipeline.schedule import schedule
from ffdist.pipeline.source import NegativePlan
from ffdist.storage.folder import Folder

EPOCHS, BATCH_SIZE = 2, 50
NUM_SHARDED_SAMPLES = {"train": 12_030, "validation": 200, "test": 360}
DENSE = (60, 50, 40)
MIXED = (Local(grid=3, stride=2, field=4, units=6), Local(grid=2, stride=1, field=2, units=12), 40)
CLIPPED = (Local(grid=8, stride=1, field=5, units=2), 50, 40)


class Results(NamedTuple):
    metrics: torch.Tensor
    readout_metrics: torch.Tensor
    goodness: torch.Tensor
    predicted: torch.Tensor
    states: list[dict[str, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(Data(name="digits", label="append"), seed=0, validation_samples=200)


def make_order(digits) -> SampleOrder:
    num_samples = len(digits.labels["train"])
    return SampleOrder(0, num_samples, BATCH_SIZE if num_samples < 5_000 else 250)


def make_blueprint(
    digits,
    stages,
    precision,
    label="append",
    kind="wrong_label",
    layers=DENSE,
    actors=1,
    jitter=0,
    store=None,
    rule=RELEASE,
    thresholds=(),
    subtract_mean=False,
    device="cpu",
) -> Blueprint:
    architecture = image_architecture(
        digits.shape,
        digits.classes,
        layers,
        seed=3,
        precision=precision,
        label=label,
        predict_from=2,
        rule=rule,
        thresholds=thresholds,
        subtract_mean=subtract_mean,
        jitter=jitter,
    )
    plan = NegativePlan(
        kind, num_actors=actors, prefetch_chunks=2, prediction_delay=32 if kind == "hard_label" else None, store=store
    )
    stage_layers = partition(architecture.num_parameters, stages)
    return Blueprint(architecture, make_order(digits), plan, stage_layers, measure_every=5, device=device)


def run_pipeline(
    runner: Runner, digits: Dataset, chunk_size: int, folder: str, greedy_layers: int | None = None
) -> Results:
    metrics, readout, goodness, predicted, states = [], [], [], [], []
    settings = {
        "lr_scales": lr_scales("hinton", EPOCHS),
        "minibatches": make_order(digits).num_minibatches,
        "chunk_size": chunk_size,
        "greedy_layers": greedy_layers,
        "validation_samples": 200,
        "test_samples": 360,
        "validate_every_epochs": 1,
        "evaluation_block": 64,
    }
    for event in runner.run(schedule(**settings), schedule(**settings)):
        match event:
            case Trained():
                metrics.append(torch.cat([report.metrics for report in event.stages], 1))
                readout.append(event.readout.metrics)
            case Evaluated():
                goodness.append(torch.cat(event.goodness))
                predicted.append(event.predicted)
            case SnapshotTaken(snapshot, written):
                files = Path(folder, checkpoint_name(snapshot.position))
                states.append({name.split(".")[0]: load_file(files / name) for name in written(True).files})
    return Results(torch.cat(metrics), torch.cat(readout), torch.cat(goodness, 1), torch.cat(predicted), states)


def run_serial(digits, *, stages=1, chunk_size=24, precision="bfloat16", threads=1, greedy=None, **changes) -> Results:
    blueprint = make_blueprint(digits, stages, precision, **changes)
    with torch_threads(threads), TemporaryDirectory() as folder:
        runner = serial_runner(
            blueprint, digits.samples, digits.labels["train"], CheckpointWriter(Folder(folder, CheckpointError))
        )
        return run_pipeline(runner, digits, chunk_size, folder, greedy)


def assert_equal(expected: Results, actual: Results) -> None:
    for name in ("metrics", "readout_metrics", "goodness", "predicted"):
        torch.testing.assert_close(getattr(expected, name), getattr(actual, name), rtol=0, atol=0, equal_nan=True)
    assert len(expected.states) == len(actual.states) >= EPOCHS
    for expected_state, actual_state in zip(expected.states, actual.states, strict=True):
        assert expected_state.keys() == actual_state.keys() >= {"layer_1", "layer_2", "layer_3", "readout"}
        for layer, tensors in expected_state.items():
            assert all(torch.equal(tensor, actual_state[layer][name]) for name, tensor in tensors.items())


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; set CUDA_VISIBLE_DEVICES=0")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


@on_each_device
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("label", ["append", "overwrite"])
def test_stages_and_chunks_change_no_bit(digits, precision, label, device):
    changes = {"precision": precision, "label": label, "device": device}
    expected = run_serial(digits, **changes)
    for stages, chunk_size in [(1, 1), (2, 7), (3, 32)]:
        assert_equal(expected, run_serial(digits, stages=stages, chunk_size=chunk_size, **changes))


KINDS = [
    ("fixed", "append", DENSE),
    ("hard_label", "append", DENSE),
    ("all_wrong", "overwrite", DENSE),
    ("hybrid", "none", DENSE),
    ("hybrid", "overwrite", DENSE),
    ("noise", "none", MIXED),
    ("hard_label", "everywhere", MIXED),
    ("all_wrong", "everywhere", CLIPPED),
    ("hybrid", "none", CLIPPED),
]


@on_each_device
@pytest.mark.parametrize(("kind", "label", "layers"), KINDS)
def test_stages_and_chunks_change_no_bit_for_any_kind_of_negative_or_layer(digits, kind, label, layers, device):
    changes = {"kind": kind, "label": label, "layers": layers, "jitter": 1, "subtract_mean": True, "device": device}
    expected = run_serial(digits, **changes)
    for stages, chunk_size, actors in [(1, 1, 1), (2, 7, 2), (3, 32, 3)]:
        assert_equal(expected, run_serial(digits, stages=stages, chunk_size=chunk_size, actors=actors, **changes))


ADAMW = Update(0.01, 0.01, optimizer="adamw")
RULE_CASES = {
    "mean of squares": {"rule": Rule("mean_of_squares", "l2"), "thresholds": (2.0, 1.5, 1.0)},
    "minus sum of squares": {"rule": Rule("minus_sum_of_squares", "none")},
    "minus mean of squares": {"rule": Rule("minus_mean_of_squares", loss="margin"), "thresholds": (1.0,) * 3},
    "softmax": {"rule": Rule("softmax"), "thresholds": (5.0,) * 3, "kind": "permuted", "label": "none"},
    "symmetric": {"rule": Rule("mean_of_squares", loss="symmetric", alpha=4.0), "kind": "all_wrong"},
    "alternating": {"rule": Rule(alternating=True, updates_per_minibatch=2), "layers": MIXED, "label": "everywhere"},
    "sgd": {"rule": Rule(update=Update(0.01, 0.01, optimizer="sgd"))},
    "adam": {"rule": Rule(update=Update(0.01, 0.01, optimizer="adam")), "layers": CLIPPED, "label": "everywhere"},
    "adamw": {"rule": Rule(update=ADAMW, updates_per_minibatch=2), "kind": "hard_label"},
    "greedy": {"rule": Rule(update=ADAMW), "greedy": 3, "kind": "hard_label"},
}


@on_each_device
@pytest.mark.parametrize("changes", RULE_CASES.values(), ids=RULE_CASES)
def test_stages_and_chunks_change_no_bit_for_any_rule(digits, changes, device):
    expected = run_serial(digits, device=device, **changes)
    for stages, chunk_size in [(1, 1), (2, 7), (3, 32)]:
        assert_equal(expected, run_serial(digits, device=device, stages=stages, chunk_size=chunk_size, **changes))


ACTOR_CASES = {
    "two threads, which change the sums of the readout": (1, 32, 1, {"threads": 2}),
    "float32 messages, which are not copied and must not be modified": (
        2,
        7,
        4,
        {"actors": 2, "precision": "float32", "label": "overwrite"},
    ),
    "more commands in flight than an epoch has, including evaluation and snapshot": (3, 1, 60, {}),
    "hard labels, which need predictions of the readout": (3, 4, 4, {"kind": "hard_label", "actors": 2}),
    "negative images": (
        2,
        7,
        3,
        {"kind": "hybrid", "label": "none", "layers": MIXED, "actors": 3, "subtract_mean": True},
    ),
    "optimizer of torch and greedy schedule": (3, 5, 4, {"rule": Rule(update=ADAMW), "greedy": 3}),
    "several negatives per positive sample": (2, 5, 4, {"kind": "all_wrong", "label": "everywhere", "layers": CLIPPED}),
}


@pytest.mark.parametrize(("stages", "chunk_size", "max_in_flight", "changes"), ACTOR_CASES.values(), ids=ACTOR_CASES)
def test_actors_change_no_bit(ray_start_4_cpus, digits, stages, chunk_size, max_in_flight, changes, tmp_path):
    from ffdist.runtime.placement import Placement, reserve
    from ffdist.runtime.runner import ray_runner

    changes = {"precision": "bfloat16", "threads": 1} | changes
    threads, greedy = changes.pop("threads"), changes.pop("greedy", None)
    blueprint = make_blueprint(digits, stages, **changes)
    pipeline = Pipeline(chunk_size=chunk_size, max_in_flight=max_in_flight, threads_per_stage=threads)
    images, labels = digits.samples, digits.labels["train"]
    with (
        reserve(Placement(stages, "cpu", 0, 0.5, 0.5).bundles(blueprint.negatives.num_actors)) as group,
        ray_runner(blueprint, group, pipeline, images, labels, Folder(str(tmp_path), CheckpointError)) as runner,
    ):
        actual = run_pipeline(runner, digits, chunk_size, str(tmp_path), greedy)
    assert_equal(run_serial(digits, **changes, threads=threads, greedy=greedy), actual)


@pytest.fixture(scope="module")
def sharded_dataset() -> Dataset:
    """Small colour images of two classes; three shards per epoch, of which the last is only partly used."""
    generator = torch.Generator().manual_seed(0)
    images = {
        split: torch.randint(0, 256, (n, 48), dtype=torch.uint8, generator=generator)
        for split, n in NUM_SHARDED_SAMPLES.items()
    }
    labels = {split: torch.randint(0, 2, (n,), generator=generator) for split, n in NUM_SHARDED_SAMPLES.items()}
    return Dataset(images, labels, ImageEncoder((3, 4, 4), 2))


@pytest.mark.parametrize(
    "kind",
    ["hard_label", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("hybrid", f"{__name__}:permute_pixels"))],
)
def test_shards_that_span_chunks_change_no_bit(ray_start_4_cpus, sharded_dataset, kind, tmp_path):
    """Several actors prefetch consecutive shards, and a second run reads them from a store."""
    from ffdist.runtime.placement import Placement, reserve
    from ffdist.runtime.runner import ray_runner

    store, checkpoints = Store(str(tmp_path / "store")) if kind == "hybrid" else None, str(tmp_path / "checkpoints")
    changes = {"kind": kind, "layers": (20, 15, 10), "jitter": 1, "precision": "float32"}
    expected = run_serial(sharded_dataset, chunk_size=25, **changes)
    for _ in range(2):  # first written to the store, then read
        blueprint = make_blueprint(sharded_dataset, 2, actors=3, store=store, **changes)
        with (
            reserve(Placement(2, "cpu", 0, 0.5, 0.5).bundles(3)) as group,
            ray_runner(
                blueprint,
                group,
                Pipeline(chunk_size=7),
                sharded_dataset.samples,
                sharded_dataset.labels["train"],
                Folder(checkpoints, CheckpointError),
            ) as runner,
        ):
            assert_equal(expected, run_pipeline(runner, sharded_dataset, 7, checkpoints))
        if store is None:
            break
        assert len(list(store.entries())) == EPOCHS * 3


def permute_pixels(data, samples, generator):
    """Custom negatives: images whose pixels are permuted, in the same order for all images."""
    return data.samples[samples][:, torch.randperm(data.samples.shape[1], generator=generator)]


def test_training_changes_weights_and_the_seed_determines_initial_weights(digits):
    """The other tests would prove nothing if training did not change the weights."""
    first, last = run_serial(digits).states
    assert weights_sha256(first) != weights_sha256(last)
    architecture = make_blueprint(digits, 1, "bfloat16").architecture
    assert not torch.equal(architecture.layer(0).weight, last["layer_1"]["weight"])
    assert not torch.equal(
        architecture.layer(0).weight, image_architecture((1, 8, 8), 10, DENSE, label="append").layer(0).weight
    )
