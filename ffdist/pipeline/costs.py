"""What the parts of a run cost on this machine, and the throughput to expect from that."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import fmean, median
from typing import NamedTuple

from torch import Tensor

from ffdist.data.order import SHARD_SAMPLES
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.partition import given_partition
from ffdist.pipeline.runner import Trained, serial_runner, torch_threads
from ffdist.pipeline.schedule import Train
from ffdist.pipeline.source import NegativeSource

SIZE, LEAST, MOST, ENOUGH_S = {"cpu": 4, "cuda": 40}, 3, 16, 1.0
"""Minibatches of a chunk that is measured, fewest and most chunks, and when the fewest are enough."""
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


def measure_costs(
    blueprint: Blueprint, images: dict[str, Tensor], labels: Tensor, *, threads: int, side_by_side: int
) -> Costs:
    """Trains networks like the run's for about a second, and forgets them.

    Args:
        blueprint: Of the run, however its layers are cut into stages.
        images: uint8 images of each split `[N, D]`.
        labels: Labels of the training set `[N]`.
        threads: torch's threads, for each network.
        side_by_side: Networks at a time; as many as parts will compute at once, because cores share memory and power.
    """
    with torch_threads(threads), ThreadPoolExecutor(side_by_side) as pool:
        found = list(pool.map(lambda _: _measure_one(blueprint, images, labels), range(side_by_side)))
    layers = [fmean(each) for each in zip(*(costs.layers for costs in found), strict=True)]
    readout, negatives = (fmean(getattr(costs, part) for costs in found) for part in ("readout", "negatives"))
    return Costs(layers, readout, negatives, blueprint.device)


def _measure_one(blueprint: Blueprint, images: dict[str, Tensor], labels: Tensor) -> Costs:
    order, one_each = blueprint.order, given_partition([1] * len(blueprint.architecture.layers))
    alone = blueprint._replace(stage_layers=one_each, negatives=replace(blueprint.negatives, store=None))
    size = min(SIZE[blueprint.device], order.minibatches)
    of_epoch = order.minibatches // size
    places = (divmod(number, of_epoch) for number in range(max(LEAST, min(MOST, of_epoch))))
    chunks = [Train(epoch, size * part, size, epoch * order.minibatches + size * part, 1.0) for epoch, part in places]
    took: list[list[float]] = []  # of each chunk the layers, and the readout
    runner = serial_runner(alone, images, labels, None)
    start = since = time.perf_counter()
    worked_since = time.thread_time()
    for _, trained in runner.run(chunks, chunks):
        assert isinstance(trained, Trained)
        now, worked = time.perf_counter(), time.thread_time()
        # Of the time on a processor: others, such as a Ray that starts, take turns with this thread.
        share = (worked - worked_since) / (now - since) if blueprint.device == "cpu" else 1.0
        took.append([share * report.compute_s for report in (*trained.stages, trained.readout)])
        since, worked_since = now, worked
        if len(took) >= LEAST and now - start > ENOUGH_S:
            break
    *layers, readout = (median(each) / size for each in zip(*(took[1:] or took), strict=True))  # the first warms up
    source = NegativeSource(alone.negatives, images, labels, blueprint.architecture, order)
    worked_since = time.thread_time()
    source.make(0, 0)
    negatives = (time.thread_time() - worked_since) * order.batch_size / min(SHARD_SAMPLES, order.samples)
    return Costs(layers, readout, negatives, blueprint.device)


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
    travels_s = [BYTE_S * _bytes_out(blueprint, layers) for layers in stages]
    if costs.device == "cpu":
        shared_s = trained_s + costs.negatives + call_s * (len(stages) + 2) + sum(travels_s)
        return batch / max(slowest_stage_s(costs, stages), shared_s / processors)
    # There are processors beside the GPUs for what is packed, and for negatives.
    packed_s = max(slowest_stage_s(costs, [layers]) + out_s for layers, out_s in zip(stages, travels_s, strict=True))
    negatives_s = costs.negatives / blueprint.negatives.num_parts
    return batch / max(packed_s + call_s, trained_s / processors, negatives_s)


def _bytes_out(blueprint: Blueprint, layers: Sequence[int]) -> int:
    """Returns the bytes that a stage hands on of a minibatch: the signal to the next, and what the readout reads."""
    architecture, is_last = blueprint.architecture, layers[-1] + 1 == len(blueprint.architecture.layers)
    rows = blueprint.negatives.per_sample + architecture.labels_shown
    values = 0 if is_last else rows * architecture.widths[1 + layers[-1]]
    values += sum(architecture.widths[1 + layer] for layer in layers if layer >= architecture.predict_from - 1)
    return values * blueprint.order.batch_size * architecture.compute_dtype.itemsize
