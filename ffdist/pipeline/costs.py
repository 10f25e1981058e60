"""Measured costs of the actors of a run, and the throughput predicted from them."""

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
"""Minibatches per measured chunk; on a GPU, enough for copies to overlap with computation."""
MAX_CHUNKS, MAX_ACTOR_S, LIMIT_S = 64, 0.25, 10.0
"""Largest number of chunks and time per actor, and the CPU time after which no further layer is measured."""
CALL_S, BYTE_S = 4e-3, 0.35e-9
"""CPU time of a call of an actor, summed over driver and Ray, and of a byte sent to the next actor (Ray 2.60)."""


class Costs(NamedTuple):
    """Time of a minibatch in each actor, in seconds."""

    layers: list[float]
    """Of each layer; the first includes making the input rows."""
    readout: float
    """Of the readout's actor; 0 without one."""
    negatives: float
    device: str
    """Device of layers and readout."""


class Sample(NamedTuple):
    """A few minibatches of a run for measuring its layers, small enough to send to another process."""

    blueprint: Blueprint
    samples: Tensor
    """`[n, D]`."""
    labels: Tensor
    """`[n]`, int64."""
    negatives: Tensor
    """As their kind returns them `[n, ...]`."""
    negatives_s: float
    """Time to make the negatives of a minibatch."""


def draw_sample(blueprint: Blueprint, samples: dict[str, Tensor], labels: Tensor) -> Sample:
    """Returns the first samples of a training set with their negatives, and measures the time to make these.

    Args:
        blueprint: Of the run; its stages do not matter.
        samples: Samples of each split `[N, D]`.
        labels: Labels of the training set `[N]`.
    """
    order, plan = blueprint.order, replace(blueprint.negatives, store=None)
    count = order.batch_size * min(SIZE[blueprint.device], order.num_minibatches)
    negatives, negatives_s = torch.empty(count, 0), 0.0
    if plan.num_actors:
        source = NegativeSource(plan, samples, labels, blueprint.architecture, order)
        since = time.thread_time()
        negatives = source.make(0, 0).negatives
        negatives_s = (time.thread_time() - since) * order.batch_size / len(negatives)
        negatives = negatives[torch.arange(count) % len(negatives)]
    blueprint = blueprint._replace(order=SampleOrder(order.seed, count, order.batch_size), negatives=plan)
    # Cloned, because a view would be sent with its whole base tensor.
    return Sample(blueprint, samples["train"][:count].clone(), labels[:count].clone(), negatives, negatives_s)


def measure_costs(sample: Sample, threads: int) -> Costs:
    """Trains each layer by itself, and then the readout, on a few minibatches, and forgets them.

    Only one layer is in memory at a time. Layers of the same shape are measured once. Layers that are not measured
    within LIMIT_S are estimated by their numbers of parameters.

    Args:
        sample: Of the run.
        threads: torch's threads.
    """
    blueprint, of_shape = sample.blueprint, dict[str, float]()
    architecture, deadline = blueprint.architecture, time.thread_time() + LIMIT_S
    layers = list[float | None]()
    with torch_threads(threads):
        for index, layer in enumerate(architecture.layers):
            is_read = architecture.readout_kind == "per_layer" and index in architecture.read_layers
            shape = str((architecture.forms[index], repr(layer), index == 0, is_read))
            if shape not in of_shape and (not index or time.thread_time() < deadline):
                of_shape[shape] = _layer_s(sample, index)
            layers.append(of_shape.get(shape))
        readout = _readout_s(sample) if architecture.has_readout else 0.0
        if blueprint.device != "cpu":
            torch.cuda.empty_cache()
    known = [index for index, cost in enumerate(layers) if cost is not None]
    counts = architecture.num_parameters
    parameter_s = sum(layers[index] or 0.0 for index in known) / max(1, sum(counts[index] for index in known))
    guesses = (parameter_s * count for count in counts)
    filled = [guess if cost is None else cost for cost, guess in zip(layers, guesses, strict=True)]
    return Costs(filled, readout, sample.negatives_s, blueprint.device)


def _layer_s(sample: Sample, index: int) -> float:
    blueprint = sample.blueprint
    architecture, order, device = blueprint.architecture, blueprint.order, blueprint.device
    data: tuple[Any, ...] = ()
    if index == 0:
        data = blueprint.negatives, {"train": sample.samples}, sample.labels
        message: tuple[Any, ...] = (Shard(0, sample.negatives, 0.0, 0.0),)
    else:
        width, passes = architecture.widths[index], blueprint.negatives.per_sample + architecture.has_neutral
        is_joint = architecture.readout_kind == "joint"
        shapes = ((passes,), ()) if is_joint else ((passes + 1,),)
        message = tuple(_values(blueprint, *shape, order.batch_size, width) for shape in shapes)
    labels = sample.labels if architecture.needs_labels else None
    stage = Stage(architecture, range(index, index + 1), order, blueprint.measure_every, device, labels, *data)
    return _minibatch_s(lambda chunk: stage.train(chunk, *message)[0], blueprint)


def _readout_s(sample: Sample) -> float:
    blueprint, labels = sample.blueprint, sample.labels
    architecture, order = blueprint.architecture, blueprint.order
    draws = bool(blueprint.negatives.prediction_delay)
    readout = ReadoutStage(architecture, labels, order, draws, blueprint.device)
    is_joint = architecture.readout_kind == "joint"
    widths = [
        architecture.widths[1 + layer] if is_joint else architecture.classes for layer in architecture.read_layers
    ]
    read = [_values(blueprint, order.batch_size, width) for width in widths]
    return _minibatch_s(lambda chunk: readout.train(chunk, *read)[0], blueprint)


def _values(blueprint: Blueprint, *shape: int) -> Tensor:
    """Returns random activations for every minibatch of the sample `[K, *shape]`."""
    source = generator(blueprint.order.seed, "costs")
    values = torch.rand(blueprint.order.num_minibatches, *shape, generator=source)
    return values.to(blueprint.architecture.compute_dtype)


def _minibatch_s(train: Callable[[Train], Any], blueprint: Blueprint) -> float:
    """Returns the time of a minibatch; `train` trains on a chunk and returns the report.

    The first chunk does not count. It may take ten times as long as the others, because libraries choose their code and
    memory is new to the process.
    """
    size, times, start = blueprint.order.num_minibatches, list[float](), time.perf_counter()
    for number in range(MAX_CHUNKS):
        since, worked_since = time.perf_counter(), time.thread_time()
        report = train(Train(number, 0, size, number * size, 1.0))
        # CPU time only: other processes, such as a starting Ray, may run in between.
        worked, elapsed = time.thread_time() - worked_since, time.perf_counter() - since
        times.append(report.compute_s / size * (worked / elapsed if blueprint.device == "cpu" else 1.0))
        if number and time.perf_counter() - start > MAX_ACTOR_S:
            break
    return median(times[1:])


def send_s(blueprint: Blueprint) -> list[float]:
    """Returns the time to send a minibatch from the stage that ends with each layer, to the next stage and the readout.

    Layers inside a stage that the readout reads are left out: they are sent wherever stages end.
    """
    return [BYTE_S * blueprint.bytes_out([layer]) for layer in range(len(blueprint.architecture.layers))]


def slowest_stage_s(costs: Costs, stage_layers: Sequence[Sequence[int]]) -> float:
    """Returns the time of a minibatch in the slowest of these stages."""
    return max(sum(costs.layers[layer] for layer in layers) for layers in stage_layers)


def predicted_samples_per_s(costs: Costs, blueprint: Blueprint, *, processors: int | None) -> float:
    """Returns the throughput allowed by the slowest actor, or by the CPUs or GPUs that the actors share.

    Args:
        costs: Of the actors.
        blueprint: Assignment of layers to stages, and chunk size.
        processors: Number of CPUs for one thread each, or of GPUs; None for a serial run.
    """
    batch, stages, call_s = blueprint.order.batch_size, blueprint.stage_layers, CALL_S / blueprint.chunk_size
    trained_s = sum(costs.layers) + costs.readout
    if processors is None:
        return batch / (trained_s + costs.negatives)
    transfer_s = [BYTE_S * blueprint.bytes_out(layers) for layers in stages]
    slowest_s = max(slowest_stage_s(costs, [layers]) + out_s for layers, out_s in zip(stages, transfer_s, strict=True))
    if costs.device == "cpu":
        num_calls = len(stages) + 1 + blueprint.architecture.has_readout
        shared_s = trained_s + costs.negatives + call_s * num_calls + sum(transfer_s)
        return batch / max(slowest_s, shared_s / processors)
    # Serialization and negatives run on CPUs while the GPUs compute.
    negatives_s = costs.negatives / max(1, blueprint.negatives.num_actors)
    return batch / max(slowest_s + call_s, trained_s / processors, negatives_s)
