"""Checks of a GPU, with torch and numpy alone: digests, the time of a step, and a wide convolutional network.

    python tests/gpu.py prepare cifar10.npz       (where ffdist and the dataset are installed)
    python tests/gpu.py check cifar10.npz         (on the GPU)

Rows are printed as they are measured. All digests of a name must be equal: they are those of runs with other numbers of
stages and other chunk sizes. The budget of the wide network includes its evaluation.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # ffdist need not be installed

from ffdist.bench.step import measure_steps
from ffdist.data.order import SampleOrder
from ffdist.ff.architecture import Architecture
from ffdist.ff.encoders import ImageEncoder
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import Update
from ffdist.ff.schedules import lr_scales
from ffdist.ff.specs import Conv, Local
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.evaluation import evaluate
from ffdist.pipeline.partition import partition
from ffdist.pipeline.runner import Evaluated, SnapshotTaken, serial_runner, torch_threads
from ffdist.pipeline.schedule import evaluation_block, schedule
from ffdist.pipeline.source import NegativePlan

CLASSES = 10
ADAMW = Update(learning_rate=0.005, weight_decay=0.0005, optimizer="adamw")
CLASSIFY = {"objective": "class_goodness", "normalization": "none", "peer_strength": 0.0, "update": ADAMW}
LAYERS = (Conv(16, dropout=0.1), Conv(24, norm="group", pool="max"), Conv(32, norm="none", pool="average"), 50)
SMALL = {
    "goodness": ({}, {"label": "append", "jitter": 2}, (200, 150, 100)),
    "local": ({}, {"label": "everywhere"}, (Local(grid=4, field=8, units=40, stride=8), Local(2, 2, 60), 80)),
    "conv": (CLASSIFY, {"label": "none", "flip": True, "jitter": 4}, LAYERS),
    "augmented": (CLASSIFY, {"label": "none", "crop": 0.5, "color": 0.3, "cutout": 8, "flip": True}, LAYERS),
    "groups": (CLASSIFY | {"class_scores": "groups", "label_smoothing": 0.1}, {"label": "none"}, LAYERS),
    "terms": (CLASSIFY | {"similarity": 10.0, "contrast": 0.1}, {"label": "none"}, LAYERS),
    "clipped": (CLASSIFY | {"update": Update(0.01, 0.001, 0.9, "sgd", 0.5)}, {"label": "none"}, LAYERS),
    "label planes": ({}, {"label": "everywhere"}, (Conv(16), Conv(24, pool="max"), 50)),
}
"""Settings of the rule and of the encoder, and layers, by name."""
WIDE = tuple(
    Conv(channels, pool="max" if pooled else "none", dropout=0.1)
    for channels, pooled in ((128, 0), (256, 1), (256, 0), (512, 1), (512, 0), (512, 1), (512, 0))
)
WIDE_RULE = CLASSIFY | {"objective": "classifier", "similarity": 99.0}


class Writer:
    """Keeps the states of snapshots."""

    def write(self, snapshot, *states):
        return states


def run(data, architecture, *, epochs, stages=1, chunk_size=20, num_samples=None, batch_size=128, device="cuda"):
    """Trains a network; yields `(epoch, seconds, None)` after each epoch, and at last the digest and the evaluation."""
    samples = {name: data[name] if name == "test" else data[name][:num_samples] for name in ("train", "test")}
    labels, shows_labels = data["train_labels"][:num_samples], architecture.labels_shown
    order = SampleOrder(0, len(labels), batch_size)
    plan = NegativePlan("wrong_label") if shows_labels else NegativePlan.none()
    blueprint = Blueprint(
        architecture, order, plan, partition(architecture.num_parameters, stages), measure_every=100, device=device
    )
    commands = list(
        schedule(
            lr_scales=lr_scales("cosine", epochs, warmup=epochs // 8),
            minibatches=order.num_minibatches,
            chunk_size=chunk_size,
            validation_samples=0,
            test_samples=len(samples["test"]),
            validate_every_epochs=1,
            evaluation_block=evaluation_block(architecture),
        )
    )
    goodness, predicted, state, start = [], [], {}, time.perf_counter()
    with torch_threads(1):
        for event in serial_runner(blueprint, samples, labels, Writer()).run(commands, commands):
            if isinstance(event, SnapshotTaken):
                for each in event.written(True):
                    state |= each
            elif isinstance(event, Evaluated):
                goodness.append(torch.cat(event.goodness))
                predicted.append(event.predicted)
            elif event.chunk.first + event.chunk.num_minibatches == order.num_minibatches:
                yield event.chunk.epoch, time.perf_counter() - start, None
    digest = hashlib.sha256()
    for owner, tensors in sorted(state.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{owner}/{name}".encode() + tensor.contiguous().numpy().tobytes())
    yield (
        digest.hexdigest(),
        time.perf_counter() - start,
        evaluate(torch.cat(goodness, 1), torch.cat(predicted), data["test_labels"], architecture),
    )


def encode(data, **settings):
    """Returns the encoder of the images."""
    shape = tuple(data["shape"].tolist())
    fitted = ImageEncoder.fit(data["train"], shape, {"standardize": settings.get("standardize", False)})
    return ImageEncoder(shape, CLASSES, **settings, **fitted)


def check_digests(data, device):
    """Prints digests of each small network, each for several distributions."""
    for name, (rule, encoder, layers) in SMALL.items():
        for precision in ("float32", "bfloat16"):
            architecture = Architecture(encode(data, **encoder), layers, rule=Rule(**rule), precision=precision)
            for stages, chunk_size in ((1, 1), (2, 5), (3, 7)):
                settings = {"num_samples": 1280, "epochs": 1, "device": device}
                *_, (digest, seconds, _) = run(data, architecture, stages=stages, chunk_size=chunk_size, **settings)
                print(
                    "digest", name, precision, stages, chunk_size, digest[:16], f"{seconds:.1f} s", sep="\t", flush=True
                )


def train_wide(data, device, budget_s, layers=WIDE, num_samples=None):
    """Trains the wide network for as many epochs as the budget permits, and prints its test errors."""
    encoder = encode(data, label="none", jitter=4, flip=True, cutout=8, standardize=True)
    architecture = Architecture(
        encoder, layers, rule=Rule(**WIDE_RULE), precision="bfloat16", predict_from=len(layers) - 2
    )
    begun = time.perf_counter()
    settings = {"num_samples": num_samples, "device": device}
    epoch_s = [seconds for epoch, seconds, _ in run(data, architecture, epochs=2, **settings) if epoch in (0, 1)]
    left_s = budget_s - (time.perf_counter() - begun)
    epochs = max(1, int(0.9 * left_s / (epoch_s[1] - epoch_s[0])))
    for epoch, seconds, evaluated in run(data, architecture, epochs=epochs, **settings):
        errors = "" if evaluated is None else f"{evaluated.describe()}; layers {evaluated.layer_errors}"
        print("wide", epoch, f"of {epochs} epochs", f"{seconds:.1f} s", errors, sep="\t", flush=True)


def prepare(path):
    """Writes the images and labels of CIFAR-10 as uint8 and int64."""
    from ffdist.config.sections import Data
    from ffdist.data.datasets import load_dataset

    dataset = load_dataset(Data(name="cifar10"), seed=0, validation_samples=0)
    arrays = {f"{name}_labels": dataset.labels[name].numpy() for name in ("train", "test")}
    arrays |= {name: dataset.samples[name].numpy() for name in ("train", "test")}
    np.savez(path, shape=np.array(dataset.shape), **arrays)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "check"])
    parser.add_argument("path")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=300)
    arguments = parser.parse_args()
    if arguments.action == "prepare":
        prepare(arguments.path)
        return
    with np.load(arguments.path) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    check_digests(data, arguments.device)
    for step in measure_steps(arguments.device):
        print("step", step.layer, step.batch, step.precision, f"{step.fraction:.2f} of the floor", sep="\t", flush=True)
    train_wide(data, arguments.device, arguments.budget_s)


if __name__ == "__main__":
    main()
