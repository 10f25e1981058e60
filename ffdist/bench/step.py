"""Time of one layer's update relative to a lower bound, the floor. `python -m ffdist.bench.step cuda` needs only torch.

The floor is the time of the matrix products alone, plus the time to read and write the weights, their momentum and, if
the compute type is not float32, their copy in the compute type once, at the rate of a large copy on the same device.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import torch

from ffdist.ff.forms import Form
from ffdist.ff.layers import Minibatch
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
COPY_VALUES = 2**26
"""Number of float32 values in the copy that measures the memory bandwidth; too many for any cache."""
MAIN_STEP = "dense_2000", 100, "bfloat16"
"""The step whose fraction is also reported as `step_floor_fraction`, without a suffix."""
NUM_ROUNDS, ROUND_S = 5, 0.1
"""Number of interleaved rounds of a step and its floor, and the minimum duration of each."""


class Step(NamedTuple):
    """Times of one update."""

    layer: str
    batch: int
    precision: str
    products_s: float
    """Time of the matrix products alone."""
    copy_s: float
    """Time to read and write the parameters once."""
    step_s: float
    """Time of the whole update."""

    @property
    def fraction(self) -> float:
        """Time of the floor divided by the time of the update."""
        return (self.products_s + self.copy_s) / self.step_s


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
) -> Iterator[Step]:
    """Measures the update of dense layers with as many inputs as units, and of the paper's local layers, on one thread.

    Args:
        device: Device, as torch names it.
        units: Widths of the dense layers; empty for the default of the device.
        batches: Minibatch sizes, in samples, each with a positive, a negative and a neutral row; empty for the default
                of the device.
    """
    torch.set_num_threads(1)
    keep_memory()
    kind = torch.device(device).type
    units, batches = units or UNITS[kind], batches or BATCHES[kind]
    byte_s = _measure_byte_s(device)
    for precision in PRECISIONS:
        settings = {"compute_dtype": getattr(torch, precision), "generator": torch.Generator().manual_seed(0)}
        specs = {f"dense_{width}": (Form((width,)), Dense(width)) for width in units} | LOCAL_LAYERS
        for name, (form, spec) in specs.items():
            layer = spec.build(form, **settings).to(device)
            assert isinstance(layer, ReluLayer)
            layer.add_optimizer_state()
            layer.refresh()
            for batch in batches:
                yield _measure(name, layer, form.width, batch, precision, byte_s, device)


def _measure_byte_s(device: str) -> float:
    """Returns the time to read or write one byte, in seconds."""
    source = torch.zeros(COPY_VALUES, device=device)
    target = torch.zeros_like(source)
    return _median_times([lambda: target.copy_(source)], device)[0] / (2 * source.nbytes)


def _measure(name: str, layer: ReluLayer, width: int, batch: int, precision: str, byte_s: float, device: str) -> Step:
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

    products_s, step_s = _median_times([products, step], device)
    num_bytes = 2 * layer.weight.numel() * (4 + 4 + (dtype.itemsize if dtype != torch.float32 else 0))
    return Step(name, batch, precision, products_s, num_bytes * byte_s, step_s)


def _median_times(functions: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Returns the median duration of each function over interleaved rounds, in seconds."""
    durations: list[list[float]] = [[] for _ in functions]
    for _ in range(NUM_ROUNDS + 1):
        for function, function_durations in zip(functions, durations, strict=True):
            count, start = 0, _now(device)
            while (end := _now(device)) - start < ROUND_S:
                function()
                count += 1
            function_durations.append((end - start) / count)
    return [median(function_durations[1:]) for function_durations in durations]  # the first round is a warmup


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def print_steps(steps: Iterable[Step]) -> dict[str, float]:
    """Prints a Markdown table of the steps while they are measured, and then one of their fractions.

    Returns:
        The fractions by name.
    """
    figures, fractions = {}, dict[tuple[str, str], dict[int, float]]()
    print("| layer | minibatch | precision | products | copying | update | floor / update |\n" + "| --- " * 7 + "|")
    for step in steps:
        times = " | ".join(f"{1000 * seconds:.2f} ms" for seconds in (step.products_s, step.copy_s, step.step_s))
        print(f"| {step.layer} | {step.batch} | {step.precision} | {times} | {step.fraction:.2f} |", flush=True)
        figures["/".join(("step_floor_fraction", *map(str, step[:3])))] = step.fraction
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
