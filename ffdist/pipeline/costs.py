"""What the parts of a run cost on this machine, and the throughput to expect from that."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.data.order import SampleOrder
from ffdist.ff.keyed import generator
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.runner import torch_threads
from ffdist.pipeline.schedule import Train
from ffdist.pipeline.source import NegativeSource, Shard
from ffdist.pipeline.stage import ReadoutStage, Stage

SIZE = {"cpu": 1, "cuda": 40}
"""Minibatches of a chunk that is measured; on a GPU, enough for copies to overlap with computation."""
MOST, PART_S, LIMIT_S = 64, 0.25, 10.0
"""Most chunks of a part, the time after which a part is done, and the time after which no other layer is begun."""
CALL_S, BYTE_S = 4e-3, 0.35e-9
"""Processor time of an actor's call, in all processes of driver and Ray, and of a byte that goes from one actor to the
next; measured with Ray 2.60."""


class Costs(NamedTuple):
    """Time that a minibatch takes in each part, in seconds."""

    layers: list[float]
    """Of each layer; making the rows is part of the first."""
    readout: float
    negatives: float
    device: str
    """Where layers and readout were."""


class Sample(NamedTuple):
    """A few minibatches of a run on which its layers are measured, small enough to send to another process."""

    blueprint: Blueprint
    images: Tensor
    """uint8 `[n, D]`."""
    labels: Tensor
    """`[n]`, int64."""
    negatives: Tensor
    """As the kind returns them `[n, ...]`."""
    negatives_s: float
    """Time that those of a minibatch took."""


def draw_sample(blueprint: Blueprint, images: dict[str, Tensor], labels: Tensor) -> Sample:
    """Returns the first samples of a training set, with negatives that are measured as they are made.

    Args:
        blueprint: Of the run, whatever its stages.
        images: uint8 images of each split `[N, D]`.
        labels: Labels of the training set `[N]`.
    """
    order, plan = blueprint.order, replace(blueprint.negatives, store=None)
    source = NegativeSource(plan, images, labels, blueprint.architecture, order)
    since = time.thread_time()
    negatives = source.make(0, 0).negatives
    negatives_s = (time.thread_time() - since) * order.batch_size / len(negatives)
    count = order.batch_size * min(SIZE[blueprint.device], order.minibatches)
    blueprint = blueprint._replace(order=SampleOrder(order.seed, count, order.batch_size), negatives=plan)
    negatives = negatives[torch.arange(count) % len(negatives)]
    # Cloned, because a view is sent with all that it is a view of.
    return Sample(blueprint, images["train"][:count].clone(), labels[:count].clone(), negatives, negatives_s)


def measure_costs(sample: Sample, threads: int) -> Costs:
    """Trains each layer by itself, and then the readout, on a few minibatches, and forgets them.

    Only one layer is in memory at a time. Layers of the same shape are measured once. Layers whose turn does not come
    within LIMIT_S are estimated by their weights.

    Args:
        sample: Of the run.
        threads: torch's threads.
    """
    blueprint, of_shape = sample.blueprint, dict[Any, float]()
    architecture, deadline = blueprint.architecture, time.monotonic() + LIMIT_S
    layers = list[float | None]()
    with torch_threads(threads):
        for index, layer in enumerate(architecture.layers):
            shape = architecture.widths[index], layer, architecture.map_below(index), index == 0
            if shape not in of_shape and (not index or time.monotonic() < deadline):
                of_shape[shape] = _layer_s(sample, index)
            layers.append(of_shape.get(shape))
        readout = _readout_s(sample)
        if blueprint.device != "cpu":
            torch.cuda.empty_cache()
    known = [index for index, cost in enumerate(layers) if cost is not None]
    weight_s = sum(layers[index] or 0.0 for index in known) / sum(architecture.weights[index] for index in known)
    guesses = (weight_s * weights for weights in architecture.weights)
    filled = [guess if cost is None else cost for cost, guess in zip(layers, guesses, strict=True)]
    return Costs(filled, readout, sample.negatives_s, blueprint.device)


def _layer_s(sample: Sample, index: int) -> float:
    blueprint = sample.blueprint
    architecture, order, device = blueprint.architecture, blueprint.order, blueprint.device
    data: tuple[Any, ...] = ()
    if index == 0:
        data = blueprint.negatives, blueprint.jitter, {"train": sample.images}, sample.labels
        message: tuple[Any, ...] = (Shard(0, sample.negatives, 0.0, 0.0),)
    else:
        width = architecture.widths[index]
        rows = order.batch_size * (blueprint.negatives.per_sample + architecture.labels_shown)
        message = _values(blueprint, rows, width), _values(blueprint, order.batch_size, width)
    stage = Stage(architecture, range(index, index + 1), order, blueprint.measure_every, device, *data)
    return _minibatch_s(lambda chunk: stage.train(chunk, *message)[0], blueprint)


def _readout_s(sample: Sample) -> float:
    blueprint, labels = sample.blueprint, sample.labels
    architecture, order = blueprint.architecture, blueprint.order
    draws = bool(blueprint.negatives.prediction_delay)
    readout = ReadoutStage(architecture, labels, order, draws, blueprint.device)
    widths = architecture.widths[architecture.predict_from :]
    read = [_values(blueprint, order.batch_size, width) for width in widths]
    return _minibatch_s(lambda chunk: readout.train(chunk, *read)[0], blueprint)


def _values(blueprint: Blueprint, rows: int, width: int) -> Tensor:
    """Returns numbers in place of activities, for every minibatch of the sample `[K, rows, width]`."""
    draw = generator(blueprint.order.seed, "costs")
    values = torch.rand(blueprint.order.minibatches, rows, width, generator=draw)
    return values.to(blueprint.architecture.compute_dtype)


def _minibatch_s(train: Callable[[Train], Any], blueprint: Blueprint) -> float:
    """Returns the time of a minibatch of a part, of whose chunks `train` returns the report."""
    size, took, start = blueprint.order.minibatches, list[float](), time.perf_counter()
    for number in range(MOST):
        since, worked_since = time.perf_counter(), time.thread_time()
        report = train(Train(number, 0, size, number * size, 1.0))
        # Of the time on a processor: others, such as a Ray that starts, take turns with this thread.
        worked, elapsed = time.thread_time() - worked_since, time.perf_counter() - since
        took.append(report.compute_s / size * (worked / elapsed if blueprint.device == "cpu" else 1.0))
        if time.perf_counter() - start > PART_S:
            break
    return median(took[1:] or took)  # the first warms up


def slowest_stage_s(costs: Costs, stage_layers: Sequence[Sequence[int]]) -> float:
    """Returns the time that the slowest of these stages takes for a minibatch."""
    return max(sum(costs.layers[layer] for layer in layers) for layers in stage_layers)


def predicted_samples_per_s(costs: Costs, blueprint: Blueprint, *, processors: int | None) -> float:
    """Returns the throughput that the slowest part allows, or all that share the processors, or the GPUs.

    Args:
        costs: Of the parts.
        blueprint: How layers are cut into stages, and how many minibatches travel together.
        processors: Of the kind that the stages compute on, each for one thread; None where all is done in turn.
    """
    batch, stages, call_s = blueprint.order.batch_size, blueprint.stage_layers, CALL_S / blueprint.chunk_size
    trained_s = sum(costs.layers) + costs.readout
    if processors is None:
        return batch / (trained_s + costs.negatives)
    travels_s = [BYTE_S * blueprint.bytes_out(layers) for layers in stages]
    if costs.device == "cpu":
        shared_s = trained_s + costs.negatives + call_s * (len(stages) + 2) + sum(travels_s)
        return batch / max(slowest_stage_s(costs, stages), shared_s / processors)
    # There are processors beside the GPUs for what is packed, and for negatives.
    packed_s = max(slowest_stage_s(costs, [layers]) + out_s for layers, out_s in zip(stages, travels_s, strict=True))
    negatives_s = costs.negatives / blueprint.negatives.num_parts
    return batch / max(packed_s + call_s, trained_s / processors, negatives_s)
