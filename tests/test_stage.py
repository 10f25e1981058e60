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


def negatives_wait_s(make_s: float, made_ago_s: float, wait_s: float) -> float:
    """Returns the reported wait for negatives of a stage that was idle for `wait_s` before the call."""
    clock = _Clock()
    clock._free_since = time.perf_counter() - wait_s, 0.0, 0.0
    clock.begin()
    shard = Shard(0, torch.zeros(1).long(), time.time() - made_ago_s, make_s)
    return clock.report(torch.zeros(1), [shard]).negatives_wait_s


@pytest.mark.parametrize(
    ("make_s", "made_ago_s", "wait_s", "expected"),
    [
        (2.0, 0.0, 5.0, 2.0),  # the rest of the wait had other causes, as in a serial run
        (2.0, 0.5, 1.5, 1.0),  # the stage became idle while they were being made, and got them half a second later
        (2.0, 9.0, 1.5, 0.0),  # made before the stage became idle
        (2.0, 0.0, 0.0, 0.0),
    ],
)
def test_negatives_wait_is_the_part_of_the_wait_in_which_negatives_were_made(make_s, made_ago_s, wait_s, expected):
    assert negatives_wait_s(make_s, made_ago_s, wait_s) == pytest.approx(expected, abs=0.2)


def test_greedy_chunk_trains_only_its_layer():
    """Other tests compare runs with each other. This one checks which layer a chunk trains."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (20, 20), dtype=torch.uint8, generator=generator), torch.arange(20) % 3
    order, architecture = SampleOrder(0, 20, 5), image_architecture((1, 4, 5), 3, (9, 8, 7))
    plan = NegativePlan("wrong_label")
    stage = Stage(architecture, range(3), order, 1, "cpu", None, plan, {"train": images}, labels)
    shard = Shard(0, (labels[order.shard(0, 0)] + 1) % 3, 0.0, 0.0)
    for layer in (0, 1, 2, None):
        before = copy.deepcopy(stage.state())
        stage.train(Train(0, 0, 4, 0, 1.0, layer), shard)
        is_trained = [
            not torch.equal(before[name]["weight"], after["weight"])
            or not torch.equal(before[name]["bias"], after["bias"])
            for name, after in stage.state().items()
        ]
        assert is_trained == [layer in (number, None) for number in range(3)]


def make_stage(label: str, layers: range, device: str) -> Stage:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (40, 20), dtype=torch.uint8, generator=generator), torch.arange(40) % 3
    architecture = image_architecture((1, 4, 5), 3, (9, 8, 7), label=label, precision="bfloat16")
    source = (NegativePlan("wrong_label" if label != "none" else "noise"), {"train": images}, labels)
    return Stage(architecture, layers, SampleOrder(0, 40, 5), 3, device, None, *(source if 0 in layers else ()))


def train_stage(stage: Stage, label: str) -> list[torch.Tensor]:
    """Trains on four chunks at two learning rates; returns the outputs and the state of the stage."""
    results, generator = [], torch.Generator().manual_seed(1)
    is_first = 0 in stage._layers
    for number in range(4):
        chunk = Train(0, 2 * number, 2, 2 * number, 1.0 if number < 3 else 0.5)
        signal = torch.randn(2, 2 if label != "none" else 1, 5, 9, generator=generator).bfloat16()
        message = [signal, torch.randn(2, 5, 9, generator=generator).bfloat16()]
        if is_first:
            negatives = torch.arange(40) % 2 if label != "none" else torch.arange(800).view(40, 20).to(torch.uint8)
            message = [Shard(0, negatives, 0.0, 0.0)]
        report, *outputs = stage.train(chunk, *message)
        results += [report.metrics, *(part for part in outputs if part is not None)]
    return results + [tensor for tensors in stage.state().values() for tensor in tensors.values()]


def train_readout(device: str) -> list[torch.Tensor]:
    """Trains on four chunks at two learning rates; returns the outputs and the state of the readout."""
    results, generator = [], torch.Generator().manual_seed(1)
    architecture = image_architecture((1, 4, 5), 3, (9, 8, 7), precision="bfloat16")
    readout = ReadoutStage(architecture, torch.arange(40) % 3, SampleOrder(0, 40, 5), draws=True, device=device)
    for number in range(4):
        activations = [torch.randn(2, 5, units, generator=generator).bfloat16() for units in (8, 7)]
        report, hard_labels = readout.train(
            Train(0, 2 * number, 2, 2 * number, 1.0 if number < 3 else 0.5), *activations
        )
        results += [report.metrics, hard_labels.labels]
    return [*results, readout.evaluate(*(part[0] for part in activations)), *readout.state()["readout"].values()]


@pytest.mark.parametrize("label", ["overwrite", "none"])
@pytest.mark.parametrize("layers", [range(2), range(1, 3)])
def test_overlapped_executor_equals_sequential_executor(label, layers):
    """On the CPU, where streams have no effect and copies are synchronous. Graphs need a GPU."""
    overlapped = make_stage(label, layers, "cpu")
    overlapped._execute = OverlappedExecutor("cpu", inputs_on_device=0 in layers)
    pairs = zip(train_stage(make_stage(label, layers, "cpu"), label), train_stage(overlapped, label), strict=True)
    assert all(torch.equal(expected.nan_to_num(), actual.nan_to_num()) for expected, actual in pairs)


def test_overlapped_executor_equals_sequential_executor_for_the_readout(monkeypatch):
    sequential = train_readout("cpu")
    monkeypatch.setattr("ffdist.pipeline.stage.make_executor", partial(OverlappedExecutor, inputs_on_device=False))
    assert all(torch.equal(expected, actual) for expected, actual in zip(sequential, train_readout("cpu"), strict=True))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; set CUDA_VISIBLE_DEVICES=0")


@needs_gpu
@pytest.mark.parametrize(
    ("label", "layers"),
    [("overwrite", range(2)), ("overwrite", range(1, 3)), ("none", range(2)), ("none", range(1, 3)), ("readout", None)],
)
def test_cuda_graphs_change_no_bit(label, layers, monkeypatch):
    def train(device: str) -> list[torch.Tensor]:
        return train_stage(make_stage(label, layers, device), label) if layers else train_readout(device)

    graph_results = train("cuda")
    monkeypatch.setattr(CudaGraphs, "__call__", lambda self, step, parts, mode: step(parts, mode))
    for captured, direct, cpu_result in zip(graph_results, train("cuda"), train("cpu"), strict=True):
        assert torch.equal(captured.nan_to_num(), direct.nan_to_num())
        torch.testing.assert_close(captured, cpu_result, rtol=0.05, atol=0.05, equal_nan=True)


@needs_gpu
def test_garbage_collection_of_graphs_does_not_invalidate_a_capture():
    """Graphs may be part of a reference cycle of user objects. Freeing such a graph used to invalidate a capture."""
    thresholds = gc.get_threshold()
    gc.set_threshold(10**9)
    garbage = make_stage("overwrite", range(2), "cuda")
    train_stage(garbage, "overwrite")
    garbage.itself = garbage
    del garbage
    stage = make_stage("overwrite", range(2), "cuda")
    step, captures = stage._step, []

    def step_with_garbage(parts, mode):
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(1)
            captures.append([[] for _ in range(1000)])
        return step(parts, mode)

    stage._step = step_with_garbage
    try:
        train_stage(stage, "overwrite")
    finally:
        gc.set_threshold(*thresholds)
    assert captures


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_in_flight_bound_the_size_of_a_snapshot(optimizer):
    rule = Rule(update=Update(0.1, 0.1, optimizer=optimizer))
    architecture = image_architecture((1, 100, 100), 3, (60, 50), rule=rule)
    order, plan = SampleOrder(0, 5, 5), NegativePlan("wrong_label")
    blueprint = Blueprint(architecture, order, plan, [range(2)], 1, "cpu").with_pace(1, 1)
    snapshot = Stage(architecture, range(2), order, 1, "cpu", None).state()
    size = sum(tensor.nbytes for tensors in snapshot.values() for tensor in tensors.values())
    size += sum(tensor.nbytes for tensor in architecture.readout().state_dict().values())
    assert sum(architecture.state_bytes) == size
    assert 2 * size <= blueprint.bytes_in_flight <= 2.5 * size


@pytest.mark.parametrize("overlapped", [False, True])
def test_stages_are_freed_without_garbage_collection(overlapped, monkeypatch):
    """Reference cycles kept GPU memory until the garbage collector ran, so a second run had too little."""
    if overlapped:
        monkeypatch.setattr(
            "ffdist.pipeline.stage.make_executor", lambda _, **options: OverlappedExecutor("cpu", inputs_on_device=True)
        )
    stage = make_stage("overwrite", range(2), "cpu")
    train_stage(stage, "overwrite")
    readout = ReadoutStage(
        image_architecture((1, 4, 5), 3, (9, 8)), torch.arange(40) % 3, SampleOrder(0, 40, 5), False, "cpu"
    )
    references = [weakref.ref(stage), weakref.ref(readout), weakref.ref(next(iter(stage._layers.values())))]
    gc.disable()
    try:
        del stage, readout
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
