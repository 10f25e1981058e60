"""Time of one layer's update relative to a lower bound, the floor. `python -m ffdist.bench.step cuda` needs only torch.

The floor is the larger of two times: that of the matrix products alone, and that to move the bytes that an update must
move. These are the weights, their momentum and, if the compute type is not float32, their copy in the compute type,
each read and written once, the input rows, read once, and the output rows, written once. They are moved at the rate of
a repeated copy of so many bytes on the same device, so from the cache that holds them, if there is one.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import torch

from ffdist.ff.forms import Form
from ffdist.ff.layers import Minibatch
from ffdist.ff.objectives import Rule
from ffdist.ff.relu import ReluLayer
from ffdist.ff.specs import Dense, Local
from ffdist.pipeline.executor import CudaGraphs, StepMode
from ffdist.pipeline.runner import keep_memory

UNITS = {"cpu": (500, 1000, 2000, 4000), "cuda": (2000, 8000)}
BATCHES = {"cpu": (50, 100, 250, 1000), "cuda": (128, 512, 1024, 4096)}
PRECISIONS = "float32", "bfloat16"
LOCAL_LAYERS = {  # of the paper (section 3.2)
    "local_4x4x128": (Form((1, 28, 28)), Local(grid=4, field=10, units=128, stride=6)),
    "local_3x3x220": (Form((128, 4, 4), channels_last=True), Local(grid=3, field=2, units=220)),
    "local_2x2x512": (Form((220, 3, 3), channels_last=True), Local(grid=2, field=2, units=512)),
}
MAIN_STEP = "dense_2000", 100, "bfloat16"
"""The step whose fraction is also reported as `step_floor_fraction`, without a suffix."""
NUM_ROUNDS, ROUND_S = 5, 0.1
"""Number of interleaved rounds of a step and its floor, and the minimum duration of each."""


class Step(NamedTuple):
    """Times of one update, in each round."""

    layer: str
    batch: int
    precision: str
    products_s: list[float]
    """Time of the matrix products alone."""
    bytes_s: list[float]
    """Time to move the bytes that an update must move."""
    step_s: list[float]
    """Time of the whole update."""

    @property
    def fractions(self) -> list[float]:
        """Time of the floor divided by the time of the update."""
        rounds = zip(self.products_s, self.bytes_s, self.step_s, strict=True)
        return [max(products_s, bytes_s) / step_s for products_s, bytes_s, step_s in rounds]

    @property
    def fraction(self) -> float:
        """Median of the fractions."""
        return median(self.fractions)


def check_device(device: str) -> None:
    """Checks that a device can be measured.

    Raises:
        ValueError: The device is neither a CPU nor a CUDA device, or torch cannot use it.
    """
    parsed, num_gpus = torch.device(device), torch.cuda.device_count()
    if parsed.type not in UNITS:
        raise ValueError(f"a step is measured on cpu or cuda (device: {device})")
    if parsed.type == "cuda" and (parsed.index or 0) >= num_gpus:
        raise ValueError(f"{device} needs a GPU that torch can use (GPUs: {num_gpus or 'none'}); use cpu")


def measure_steps(
    device: str = "cpu",
    *,
    units: Sequence[int] = (),
    batches: Sequence[int] = (),
    executor: str = "eager",
) -> Iterator[Step]:
    """Measures the update of dense layers with as many inputs as units, and of the paper's local layers, on one thread.

    Args:
        device: Device, as torch names it.
        units: Widths of the dense layers; empty for the default of the device.
        batches: Minibatch sizes, in samples, each with a positive, a negative and a neutral row; empty for the default
                of the device.
        executor: See `Rule.executor`.
    """
    torch.set_num_threads(1)
    keep_memory()
    kind = torch.device(device).type
    units, batches = units or UNITS[kind], batches or BATCHES[kind]
    for precision in PRECISIONS:
        settings = {
            "rule": Rule(executor=executor),
            "compute_dtype": getattr(torch, precision),
            "generator": torch.Generator().manual_seed(0),
        }
        specs = {f"dense_{width}": (Form((width,)), Dense(width)) for width in units} | LOCAL_LAYERS
        for name, (form, spec) in specs.items():
            layer = spec.build(form, **settings).to(device)
            assert isinstance(layer, ReluLayer)
            layer.add_optimizer_state()
            layer.refresh()
            for batch in batches:
                yield _measure(name, layer, form.width, batch, precision, device)


def _measure(name: str, layer: ReluLayer, width: int, batch: int, precision: str, device: str) -> Step:
    dtype, (*grid, units, fan_in) = layer.compute_dtype, layer.weight.shape

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    weight, inputs = random(*layer.weight.shape), random(*grid, 3 * batch, fan_in)
    direction, trained_inputs = random(*grid, 2 * batch, units), random(*grid, 2 * batch, fan_in)
    rows = random(3, batch, width)

    def products() -> None:
        torch.matmul(inputs, weight.mT)
        torch.matmul(direction.mT, trained_inputs)

    def train(tensors: Sequence[torch.Tensor], mode: StepMode) -> list[torch.Tensor]:
        output, metrics = layer.train_minibatch(Minibatch(tensors[0]), lr_scale=mode.lr_scale)
        return [output.activations, metrics]

    graphs = CudaGraphs()

    def step() -> None:
        graphs(train, (rows,), StepMode(1.0))

    weight_bytes = 2 * layer.weight.numel() * (4 + 4 + (dtype.itemsize if dtype != torch.float32 else 0))
    num_bytes = weight_bytes + 3 * batch * (width + len(layer.bias)) * dtype.itemsize
    source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=device)  # each byte is read once and written once
    target = torch.zeros_like(source)
    return Step(name, batch, precision, *_times([products, lambda: target.copy_(source), step], device))


def _times(functions: Sequence[Callable[[], object]], device: str) -> list[list[float]]:
    """Returns the duration of each function in each of several interleaved rounds, in seconds."""
    durations: list[list[float]] = [[] for _ in functions]
    for _ in range(NUM_ROUNDS + 1):
        for function, function_durations in zip(functions, durations, strict=True):
            count, start = 0, _now(device)
            while (end := _now(device)) - start < ROUND_S:
                function()
                count += 1
            function_durations.append((end - start) / count)
    return [function_durations[1:] for function_durations in durations]  # the first round is a warmup


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def print_steps(steps: Iterable[Step]) -> dict[str, float]:
    """Prints a Markdown table of the steps while they are measured, and then one of their fractions.

    Times and fractions are medians over the rounds; the range of a fraction follows it.

    Returns:
        The medians of the fractions, and the lowest and the highest, by name.
    """
    figures, fractions = {}, dict[tuple[str, str], dict[int, float]]()
    print("| layer | minibatch | precision | products | bytes | update | floor / update |\n" + "| --- " * 7 + "|")
    for step in steps:
        times = " | ".join(f"{1000 * median(rounds):.2f} ms" for rounds in step[3:])
        lowest, highest = min(step.fractions), max(step.fractions)
        spread = f"{step.fraction:.2f} ({lowest:.2f} to {highest:.2f})"
        print(f"| {step.layer} | {step.batch} | {step.precision} | {times} | {spread} |", flush=True)
        name = "/".join(map(str, step[:3]))
        figures[f"step_floor_fraction/{name}"] = step.fraction
        figures |= {f"lowest/{name}": lowest, f"highest/{name}": highest}
        if step[:3] == MAIN_STEP:
            figures["step_floor_fraction"] = step.fraction
        fractions.setdefault((step.layer, step.precision), {})[step.batch] = step.fraction
    batches = " | ".join(str(batch) for batch in next(iter(fractions.values()), ()))
    print(f"\n| floor / update | precision | {batches} |\n" + "| --- " * (2 + batches.count("|") + 1) + "|")
    for names, by_batch in fractions.items():
        print("| " + " | ".join((*names, *(f"{fraction:.2f}" for fraction in by_batch.values()))) + " |")
    return figures


if __name__ == "__main__":
    device = "".join(sys.argv[1:]) or "cpu"
    try:
        check_device(device)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    print_steps(measure_steps(device))
