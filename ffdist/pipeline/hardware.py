"""The hardware and libraries that determine the last bits of results, and the speed of matrix products."""

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

SIZE = {"cpu": 512, "cuda": 2048}
"""Sides of the matrices that are multiplied. With smaller ones, the overhead of calls dominates."""
MIN_ROUNDS, MIN_MEASURED_S = 5, 0.2


Hardware = dict[str, str | int]
"""Properties of a process that determine the last bits of its results, by name."""

VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)
"""Environment variables that choose among instructions or algorithms."""


def read_hardware(device: str) -> Hardware:
    """Returns what determines the last bits of this process's results.

    Args:
        device: Device of the computation, as torch names it.
    """
    variables = " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    hardware: Hardware = {
        "CPU": processor(),
        "GPU": "none",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "environment": variables or "none",
    }
    if device.startswith("cuda"):
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        libraries = [f"CUDA {torch.version.cuda}", f"cuDNN {cudnn}", f"cuBLAS {_cublas()}"]
        hardware |= {"GPU": torch.cuda.get_device_name(device), "CUDA": ", ".join(libraries)}
    return hardware


def hardware_of_actors(
    stage_layers: Sequence[range], stages: Sequence[Hardware], readout: Hardware | None, negatives: Sequence[Hardware]
) -> dict[str, Hardware]:
    """Returns the hardware of a run by layer, readout and negative actor, for any number of stages.

    Args:
        stage_layers: Layers of each stage, counted from 0.
        stages: Hardware of each stage.
        readout: Hardware of the readout; None if there is none.
        negatives: Hardware of each negative actor.
    """
    layers = {
        f"layer {1 + index}": stage for indices, stage in zip(stage_layers, stages, strict=True) for index in indices
    }
    actors = {f"negative actor {number}": actor for number, actor in enumerate(negatives, 1)}
    return layers | ({"readout": readout} if readout else {}) | actors


def _cublas() -> str:
    for package in ("nvidia-cublas", "nvidia-cublas-cu12"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of the system"


def processor() -> str:
    """Returns the CPU's model and the instructions that its matrix products use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = values.get("model name") or " ".join([platform.machine(), values.get("CPU part", "")]).strip()
    flags = values.get("flags", "").split()
    units = [name for flag, name in (("avx512_bf16", "AVX512_BF16"), ("amx_bf16", "AMX")) if flag in flags]
    return ", ".join([model, torch.backends.cpu.get_cpu_capability(), *units])


def device_name(device: str) -> str:
    """Returns the name of a device of this process, given as torch names it."""
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def bfloat16_speedup(device: str) -> float:
    """Measures how many times faster matrix products are in bfloat16 than in float32, with torch's current threads.

    Both are measured alternately, and the shortest times are compared, because interference only adds time. On a CPU,
    only the CPU time of this thread counts, because other processes and threads may run in between.

    Args:
        device: Device to measure, as torch names it.
    """
    size, clock = SIZE[device], time.thread_time if device == "cpu" else time.perf_counter
    draw = torch.Generator().manual_seed(0)  # so that the global generator is not changed
    operands = torch.rand(2, size, size, generator=draw).to(device)
    rounds, start = list[list[float]](), clock()
    while len(rounds) <= MIN_ROUNDS or clock() - start < MIN_MEASURED_S:
        times = list[float]()
        for x, w in (operands, operands.bfloat16()):
            since = clock()
            _ = (x @ w.mT).mT @ x  # the layout of a layer's output and of a gradient of its weight
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - since)
        rounds.append(times)
    float32_s, bfloat16_s = zip(*rounds[1:], strict=True)  # the first round warms up
    return float(min(float32_s) / min(bfloat16_s))
