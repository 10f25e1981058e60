import copy
import gc
import time
import weakref
from functools import partial

import pytest
import torch
from helpers import image_architecture

from ffdist.data.order import SampleOrder
from ffdist.ff.objectives import Rule
from ffdist.ff.optimizers import OPTIMIZERS, Update
from ffdist.pipeline.blueprint import Blueprint
from ffdist.pipeline.executor import CudaGraphs, OverlappedExecutor
from ffdist.pipeline.schedule import Train
from ffdist.pipeline.source import NegativePlan, Shard
from ffdist.pipeline.stage import ReadoutStage, Stage, _Clock


def waited(make_s: float, made_ago_s: float, wait_s: float) -> float:
    """The time that a stage says it waited for negatives, had it been free for `wait_s` before its call."""
    clock = _Clock()
    clock._free_since = time.perf_counter() - wait_s, 0.0, 0.0
    clock.begin()
    shard = Shard(0, torch.zeros(1).long(), time.time() - made_ago_s, make_s)
    return clock.report(torch.zeros(1), [shard]).negatives_wait_s


@pytest.mark.parametrize(
    ("make_s", "made_ago_s", "wait_s", "expected"),
    [
        (2.0, 0.0, 5.0, 2.0),  # it waited for other things before, as in one process
        (2.0, 0.5, 1.5, 1.0),  # they were being made when it got free, and it went on half a second later
        (2.0, 9.0, 1.5, 0.0),  # made long ago
        (2.0, 0.0, 0.0, 0.0),
    ],
)
def test_waiting_for_negatives_is_the_time_in_which_they_were_made(make_s, made_ago_s, wait_s, expected):
    assert waited(make_s, made_ago_s, wait_s) == pytest.approx(expected, abs=0.2)


def test_only_the_layer_whose_turn_it_is_learns():
    """Whatever runs compare, they compare with each other; this holds which layer a chunk is meant for."""
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (20, 20), dtype=torch.uint8, generator=draw), torch.arange(20) % 3
    order, architecture = SampleOrder(0, 20, 5), image_architecture((1, 4, 5), 3, (9, 8, 7))
    plan = NegativePlan("wrong_label")
    stage = Stage(architecture, range(3), order, 1, "cpu", None, plan, {"train": images}, labels)
    shard = Shard(0, (labels[order.shard(0, 0)] + 1) % 3, 0.0, 0.0)
    for layer in (0, 1, 2, None):
        before = copy.deepcopy(stage.state())
        stage.train(Train(0, 0, 4, 0, 1.0, layer), shard)
        learned = [
            not torch.equal(before[name]["weight"], now["weight"]) or not torch.equal(before[name]["bias"], now["bias"])
            for name, now in stage.state().items()
        ]
        assert learned == [layer in (number, None) for number in range(3)]


def a_stage(label: str, layers: range, device: str) -> Stage:
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (40, 20), dtype=torch.uint8, generator=draw), torch.arange(40) % 3
    architecture = image_architecture((1, 4, 5), 3, (9, 8, 7), label=label, precision="bfloat16")
    source = (NegativePlan("wrong_label" if label != "none" else "noise"), {"train": images}, labels)
    return Stage(architecture, layers, SampleOrder(0, 40, 5), 3, device, None, *(source if 0 in layers else ()))


def trained(stage: Stage, label: str) -> list[torch.Tensor]:
    """What a stage makes of four chunks at two rates, and what it has learned."""
    made, draw = [], torch.Generator().manual_seed(1)
    first = 0 in stage._layers
    for number in range(4):
        chunk = Train(0, 2 * number, 2, 2 * number, 1.0 if number < 3 else 0.5)
        signal = torch.randn(2, 2 if label != "none" else 1, 5, 9, generator=draw).bfloat16()
        message = [signal, torch.randn(2, 5, 9, generator=draw).bfloat16()]
        if first:
            negatives = torch.arange(40) % 2 if label != "none" else torch.arange(800).view(40, 20).to(torch.uint8)
            message = [Shard(0, negatives, 0.0, 0.0)]
        report, *passed = stage.train(chunk, *message)
        made += [report.metrics, *(part for part in passed if part is not None)]
    return made + [tensor for tensors in stage.state().values() for tensor in tensors.values()]


def read_out(device: str) -> list[torch.Tensor]:
    """What a readout makes of four chunks at two rates, and what it has learned."""
    made, draw = [], torch.Generator().manual_seed(1)
    architecture = image_architecture((1, 4, 5), 3, (9, 8, 7), precision="bfloat16")
    readout = ReadoutStage(architecture, torch.arange(40) % 3, SampleOrder(0, 40, 5), draws=True, device=device)
    for number in range(4):
        read = [torch.randn(2, 5, units, generator=draw).bfloat16() for units in (8, 7)]
        report, drawn = readout.train(Train(0, 2 * number, 2, 2 * number, 1.0 if number < 3 else 0.5), *read)
        made += [report.metrics, drawn.labels]
    return [*made, readout.evaluate(*(part[0] for part in read)), *readout.state()["readout"].values()]


@pytest.mark.parametrize("label", ["overwrite", "none"])
@pytest.mark.parametrize("layers", [range(2), range(1, 3)])
def test_steps_between_copies_are_those_one_by_one(label, layers):
    """On a processor, where streams are none and copies wait; graphs need a GPU."""
    overlapped = a_stage(label, layers, "cpu")
    overlapped._execute = OverlappedExecutor("cpu", inputs_on_device=0 in layers)
    pairs = zip(trained(a_stage(label, layers, "cpu"), label), trained(overlapped, label), strict=True)
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)


def test_steps_of_the_readout_between_copies_are_those_one_by_one(monkeypatch):
    here = read_out("cpu")
    monkeypatch.setattr("ffdist.pipeline.stage.make_executor", partial(OverlappedExecutor, inputs_on_device=False))
    assert all(torch.equal(one, other) for one, other in zip(here, read_out("cpu"), strict=True))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; set CUDA_VISIBLE_DEVICES=0")


@needs_gpu
@pytest.mark.parametrize(
    ("label", "layers"),
    [("overwrite", range(2)), ("overwrite", range(1, 3)), ("none", range(2)), ("none", range(1, 3)), ("readout", None)],
)
def test_graphs_change_no_bit(label, layers, monkeypatch):
    def made(device: str) -> list[torch.Tensor]:
        return trained(a_stage(label, layers, device), label) if layers else read_out(device)

    graphs = made("cuda")
    monkeypatch.setattr(CudaGraphs, "__call__", lambda self, step, parts, mode: step(parts, mode))
    for captured, direct, processor in zip(graphs, made("cuda"), made("cpu"), strict=True):
        assert torch.equal(captured.nan_to_num(), direct.nan_to_num())
        torch.testing.assert_close(captured, processor, rtol=0.05, atol=0.05, equal_nan=True)


@needs_gpu
def test_graphs_that_are_garbage_spoil_no_capture():
    """A user's own objects may refer to graphs and to each other; freeing such a graph ended a capture."""
    thresholds = gc.get_threshold()
    gc.set_threshold(10**9)
    garbage = a_stage("overwrite", range(2), "cuda")
    trained(garbage, "overwrite")
    garbage.itself = garbage
    del garbage
    stage = a_stage("overwrite", range(2), "cuda")
    step, captures = stage._step, []

    def amid_garbage(parts, mode):
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(1)
            captures.append([[] for _ in range(1000)])
        return step(parts, mode)

    stage._step = amid_garbage
    try:
        trained(stage, "overwrite")
    finally:
        gc.set_threshold(*thresholds)
    assert captures


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_bytes_in_flight_bound_what_a_snapshot_takes(optimizer):
    rule = Rule(update=Update(0.1, 0.1, optimizer=optimizer))
    architecture = image_architecture((1, 100, 100), 3, (60, 50), rule=rule)
    order, plan = SampleOrder(0, 5, 5), NegativePlan("wrong_label")
    blueprint = Blueprint(architecture, order, plan, [range(2)], 1, "cpu").with_pace(1, 1)
    snapshot = Stage(architecture, range(2), order, 1, "cpu", None).state()
    size = sum(tensor.nbytes for tensors in snapshot.values() for tensor in tensors.values())
    assert blueprint.state_bytes == size + sum(tensor.nbytes for tensor in architecture.readout().state_dict().values())
    assert 2 * blueprint.state_bytes <= blueprint.bytes_in_flight <= 2.5 * blueprint.state_bytes


@pytest.mark.parametrize("overlapped", [False, True])
def test_stages_are_freed_at_once(overlapped, monkeypatch):
    """They held themselves: a GPU's memory waited for the garbage collector, and a second run found none."""
    if overlapped:
        monkeypatch.setattr(
            "ffdist.pipeline.stage.make_executor", lambda _, **made: OverlappedExecutor("cpu", inputs_on_device=True)
        )
    stage = a_stage("overwrite", range(2), "cpu")
    trained(stage, "overwrite")
    readout = ReadoutStage(
        image_architecture((1, 4, 5), 3, (9, 8)), torch.arange(40) % 3, SampleOrder(0, 40, 5), False, "cpu"
    )
    kept = [weakref.ref(stage), weakref.ref(readout), weakref.ref(next(iter(stage._layers.values())))]
    gc.disable()
    try:
        del stage, readout
        assert [reference() for reference in kept] == [None] * 3
    finally:
        gc.enable()
