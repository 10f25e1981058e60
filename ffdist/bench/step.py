"""One layer's update against its floor; needs torch alone: `python -m ffdist.bench.step cuda` runs wherever torch does.

The floor is the time of the bare matrix products of the same shapes and type, and that of the bytes that an update must
move: weights, smoothed gradients and the compute copy, where there is one, each read and written once, at the rate at
which the same thread copies memory.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import torch

from ffdist.ff.layers import Dense, Layer
from ffdist.ff.local import Fields, Local, Map
from ffdist.pipeline.device import Graphs, Way
from ffdist.pipeline.runner import keep_memory

UNITS = {"cpu": (500, 1000, 2000, 4000), "cuda": (2000, 8000)}
BATCHES = {"cpu": (50, 100, 250, 1000), "cuda": (128, 512, 1024, 4096)}
PRECISIONS = "float32", "bfloat16"
FIELDS = {  # of the paper's local layers (section 3.2)
    "local_4x4x128": (Map(28, 28, 1, channels_first=True), Fields(4, 6, 10, 128)),
    "local_3x3x220": (Map(4, 4, 128), Fields(3, 1, 2, 220)),
    "local_2x2x512": (Map(3, 3, 220), Fields(2, 1, 2, 512)),
}
COPIED = 2**26
"""Numbers in the copy that measures the memory; more than any cache holds."""
CHIEF = "dense_2000", 100, "bfloat16"
"""The step whose share is the one without a name."""
ROUNDS, ROUND_S = 5, 0.1
"""Rounds in which a step and its floor take turns, and the least time of each."""


class Step(NamedTuple):
    """What one update takes."""

    layer: str
    batch: int
    precision: str
    products_s: float
    """The bare matrix products."""
    copy_s: float
    """Moving the bytes that must be moved."""
    step_s: float
    """The whole update."""

    @property
    def fraction(self) -> float:
        """How close it comes to its floor."""
        return (self.products_s + self.copy_s) / self.step_s


def check_device(device: str) -> None:
    """Refuses a device that cannot be measured.

    Raises:
        ValueError: It is none of torch's that there are widths for, or not there.
    """
    asked, there = torch.device(device), torch.cuda.device_count()
    if asked.type not in UNITS:
        raise ValueError(f"a step is measured on cpu or cuda (device: {device})")
    if asked.type == "cuda" and (asked.index or 0) >= there:
        raise ValueError(f"{device} needs a GPU that torch can use, and it finds {there or 'none'}; measure cpu")


def measure_steps(
    device: str = "cpu",
    *,
    units: Sequence[int] = (),
    batches: Sequence[int] = (),
) -> Iterator[Step]:
    """Measures one thread's update of dense layers, each as wide as its input, and of the paper's local ones.

    Args:
        device: Where, as torch names it.
        units: Widths of the dense layers; without any, those that suit the device.
        batches: Samples a minibatch, each in a positive, a negative and a neutral row; likewise.
    """
    torch.set_num_threads(1)
    keep_memory()
    kind = torch.device(device).type
    units, batches = units or UNITS[kind], batches or BATCHES[kind]
    byte_s = _byte_s(device)
    for precision in PRECISIONS:
        settings = {"compute_dtype": getattr(torch, precision), "generator": torch.Generator().manual_seed(0)}
        layers: dict[str, Layer] = {f"dense_{width}": Dense(width, width, **settings) for width in units}
        layers |= {name: Local(below, fields, **settings) for name, (below, fields) in FIELDS.items()}
        for name, layer in layers.items():
            layer.to(device).refresh()
            for batch in batches:
                yield _measure(name, layer, batch, precision, byte_s, device)


def _byte_s(device: str) -> float:
    """Returns the time to read or write a byte."""
    numbers = torch.zeros(COPIED, device=device)
    target = torch.zeros_like(numbers)
    return _seconds([lambda: target.copy_(numbers)], device)[0] / (2 * numbers.nbytes)


def _measure(name: str, layer: Layer, batch: int, precision: str, byte_s: float, device: str) -> Step:
    width = FIELDS[name][0].values if name in FIELDS else layer.weight.shape[1]
    dtype, (*places, units, fan_in) = layer.compute_dtype, layer.weight.shape

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    weight, inputs = numbers(*layer.weight.shape), numbers(*places, 3 * batch, fan_in)
    direction, trained = numbers(*places, 2 * batch, units), numbers(*places, 2 * batch, fan_in)
    rows = numbers(3 * batch, width)

    def products() -> None:
        torch.matmul(inputs, weight.mT)
        torch.matmul(direction.mT, trained)

    def train(parts: Sequence[torch.Tensor], way: Way) -> list[torch.Tensor]:
        passed, metrics = layer.train_minibatch(parts[0], batch=batch, gain=way.gain)
        return [passed.activity, metrics]

    take = Graphs()

    def step() -> None:
        take(train, (rows,), Way(1.0))

    products_s, step_s = _seconds([products, step], device)
    moved = 2 * layer.weight.numel() * (4 + 4 + (dtype.itemsize if dtype != torch.float32 else 0))
    return Step(name, batch, precision, products_s, moved * byte_s, step_s)


def _seconds(runs: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Returns the median time of each, taking turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS + 1):
        for run, found in zip(runs, times, strict=True):
            count, start = 0, _now(device)
            while (end := _now(device)) - start < ROUND_S:
                run()
                count += 1
            found.append((end - start) / count)
    return [median(found[1:]) for found in times]  # the first warms up


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def print_steps(steps: Iterable[Step]) -> dict[str, float]:
    """Prints steps as they come, and then the share of each that its floor takes, in Markdown.

    Returns:
        Those shares, by name.
    """
    found, shares = {}, dict[tuple[str, str], dict[int, float]]()
    print("| layer | minibatch | precision | products | copying | update | floor / update |\n" + "| --- " * 7 + "|")
    for step in steps:
        times = " | ".join(f"{1000 * seconds:.2f} ms" for seconds in (step.products_s, step.copy_s, step.step_s))
        print(f"| {step.layer} | {step.batch} | {step.precision} | {times} | {step.fraction:.2f} |", flush=True)
        found["/".join(("step_floor_fraction", *map(str, step[:3])))] = step.fraction
        if step[:3] == CHIEF:
            found["step_floor_fraction"] = step.fraction
        shares.setdefault((step.layer, step.precision), {})[step.batch] = step.fraction
    batches = " | ".join(str(batch) for batch in next(iter(shares.values()), ()))
    print(f"\n| floor / update | precision | {batches} |\n" + "| --- " * (2 + batches.count("|") + 1) + "|")
    for names, by_batch in shares.items():
        print("| " + " | ".join((*names, *(f"{share:.2f}" for share in by_batch.values()))) + " |")
    return found


if __name__ == "__main__":
    chosen = "".join(sys.argv[1:]) or "cpu"
    try:
        check_device(chosen)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    print_steps(measure_steps(chosen))
