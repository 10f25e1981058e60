"""Fused operations of layers on CPUs: one pass over activations or weights each, where torch needs several.

They are written in C (kernels.c), and compiled when the package is installed, if there is a C compiler.

Shapes: `R` rows, `F` blocks of `U` units, `H = F * U` units; `B` maps of `Y` x `X` positions with `C` channels, and
`y` x `x` windows, which are squares of positions.
"""

import ctypes
import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.ff.goodness import TINY

SOURCE, LIBRARY = (Path(__file__).with_name(name) for name in ("kernels.c", "_kernels.so"))
"""The kernels, and the compiled kernels."""
DIVISORS = {"rms": lambda size: float(size), "l2": lambda size: 1.0, "none": lambda size: 0.0}
"""By normalization and from the number of units: what a sum of squares is divided by before its root is taken."""
POINTER, INTEGER, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {
    "activate": [POINTER] * 2 + [INTEGER] * 3 + [NUMBER] * 2 + [POINTER] * 4 + [INTEGER],
    "backward": [POINTER] * 3 + [INTEGER] * 4 + [POINTER] * 2,
    "update": [POINTER] * 4 + [INTEGER] + [NUMBER] * 3,
    "moments": [POINTER] + [INTEGER] * 3 + [POINTER] * 2,
    "activate_maps": [POINTER] * 4 + [INTEGER] * 6 + [POINTER] * 4,
    "gradient_sums": [POINTER] * 6 + [INTEGER] * 5 + [POINTER] * 2,
    "backward_maps": [POINTER] * 9 + [INTEGER] * 5 + [POINTER],
}
"""Types of the arguments of the functions in C, by their names without types of numbers."""
POOLS = {"none": 0, "max": 1, "average": 2}
"""Kinds of pooling, by name."""


class Activated(NamedTuple):
    """Result of `activate`."""

    passed: Tensor
    """Normalized activations `[R, H]`."""
    squares: Tensor
    """Sums of the squared activations `[R]`, float32."""
    factors: Tensor
    """Factors of the normalization `[R]`, float32."""
    totals: Tensor
    """Activations of the positive rows, summed `[H]`, float32."""


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
        of_source = (ctypes.c_char * 65).in_dll(library, "source_sha256").value.decode()
    except (OSError, ValueError):  # it is missing, or for another kind of machine
        return None
    return library if of_source == sha256(SOURCE.read_bytes()).hexdigest() else None


def are_compiled() -> bool:
    """Returns whether the kernels were compiled when the package was installed."""
    return _library() is not None


@cache
def _function(name: str) -> Any:
    library = _library()
    if library is None:
        raise RuntimeError(
            f"pipeline.executor=fused needs kernels that are compiled when ffdist is installed ({LIBRARY} is missing, "
            f"older than the source, or for another machine); install ffdist on this machine with a C compiler, or set "
            f"executor to eager"
        )
    function = getattr(library, name)
    arguments = next(types for key, types in ARGUMENTS.items() if re.fullmatch(f"{key}_b?float.*", name))
    function.argtypes, function.restype = arguments, None
    return function


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Calls a function in C.

    Raises:
        ValueError: A tensor is not contiguous, or not on a CPU.
    """
    for each in arguments:
        if isinstance(each, Tensor) and not (each.is_contiguous() and each.device.type == "cpu"):
            raise ValueError(f"kernels need contiguous tensors on a CPU (strides: {each.stride()}, {each.device})")
    _function(name)(*(each.data_ptr() if isinstance(each, Tensor) else each for each in arguments))


def _name(function: str, source: torch.dtype, target: torch.dtype) -> str:
    parts = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (source, target))
    return f"{function}_{'_to_'.join(parts)}"


def activate(sums: Tensor, bias: Tensor, batch: int, *, normalization: str, dtype: torch.dtype) -> Activated:
    """Returns activations, normalized and of a type for products.

    Args:
        sums: Weighted sums of the inputs `[F, R, U]`, of this type or float32.
        bias: `[H]`, float32.
        batch: Number of positive rows, the first ones.
        normalization: A key of `NORMALIZATIONS`.
        dtype: float32 or bfloat16.
    """
    blocks, rows, units = sums.shape
    size = blocks * units
    passed, totals = torch.empty(rows, size, dtype=dtype), torch.zeros(size)
    squares, factors = torch.empty(rows), torch.empty(rows)
    divisor, name = DIVISORS[normalization](size), _name("activate", sums.dtype, dtype)
    _call(name, sums.contiguous(), bias, rows, blocks, units, divisor, TINY, passed, squares, factors, totals, batch)
    return Activated(passed, squares, factors, totals)


def backward(
    passed: Tensor, weights: Tensor, peers: Tensor, batch: int, *, blocks: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns minus the gradient with respect to activations `[F, R, U]`, and its sum over rows `[H]`, float32.

    Args:
        passed: Normalized activations `[R, H]`.
        weights: Factor of each row `[R]`, float32.
        peers: Added to the positive rows `[H]`, float32.
        batch: Number of positive rows, the first ones.
        blocks: Number of blocks F.
        dtype: Type of the gradient: that of `passed`, or float32.
    """
    rows, size = passed.shape
    direction, bias = torch.empty(blocks, rows, size // blocks, dtype=dtype), torch.zeros(size)
    name = _name("backward", passed.dtype, dtype)
    _call(name, passed, weights, peers, rows, blocks, size // blocks, batch, direction, bias)
    return direction, bias


def update(
    parameter: Tensor,
    mean: Tensor,
    gradient: Tensor,
    copy: Tensor | None,
    *,
    momentum: float,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Makes an update by the optimizer `hinton`, in place.

    Args:
        parameter: float32.
        mean: Its running mean gradient.
        gradient: float32 or bfloat16.
        copy: A bfloat16 copy of the parameter, which gets the new values, if there is one.
        momentum: In [0, 1).
        learning_rate: Learning rate.
        weight_decay: Weight decay per unit of learning rate.
    """
    name = _name("update", gradient.dtype, gradient.dtype) + ("_and_copy" if copy is not None else "")
    decay = 1 - learning_rate * weight_decay
    _call(name, parameter, mean, gradient, copy, parameter.numel(), 1 - momentum, learning_rate, decay)


def moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and the variance of each channel `[C]`, float64, of maps `[B, Y, X, C]`."""
    batch, height, width, channels = maps.shape
    partial, totals = torch.empty(2 * channels), torch.zeros(2 * channels, dtype=torch.float64)
    _call(_name("moments", maps.dtype, maps.dtype), maps, batch, height * width, channels, partial, totals)
    mean, mean_square = (totals / (batch * height * width)).view(2, channels)
    return mean, (mean_square - mean.square()).clamp_(min=0)


class Normalization(NamedTuple):
    """A batch norm: how maps become activations, `relu(maps * scale + shift)`."""

    mean: Tensor
    """`[C]`, float32."""
    scale: Tensor
    """`[C]`, float32."""
    shift: Tensor
    """`bias - mean * scale` `[C]`, float32."""


def activate_maps(
    maps: Tensor, norm: Normalization, noise: Tensor | None, *, pool: str, side: int, windows: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what is passed on of maps, of their type, and the sums of the activations and of their squares by window.

    Args:
        maps: Maps before their batch norm `[B, Y, X, C]`.
        norm: The batch norm.
        noise: Factors of what is passed on `[B, C]`, or None.
        pool: A key of `POOLS`.
        side: Side length of a window, in positions.
        windows: Number of windows y and x.

    Returns:
        `[B, Y', X', C]`; and twice `[B, y, x, C]`, float32.
    """
    batch, height, width, channels = maps.shape
    divisor = 1 if pool == "none" else 2
    passed = maps.new_empty(batch, height // divisor, width // divisor, channels)
    sums, squares = torch.zeros(batch, *windows, channels), torch.zeros(batch, *windows, channels)
    noise, lines = torch.ones(batch, channels) if noise is None else noise, torch.empty(2 * width * channels)
    sizes = batch, height, width, channels, side, POOLS[pool]
    name = _name("activate_maps", maps.dtype, maps.dtype)
    _call(name, maps, norm.scale, norm.shift, noise, *sizes, lines, passed, sums, squares)
    return passed, sums, squares


def backward_maps(
    maps: Tensor, norm: Normalization, slope: Tensor, constant: Tensor, *, side: int, rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns minus the gradient of the loss with respect to maps, and to factor and bias of their batch norm.

    Args:
        maps: Maps before their batch norm `[B, Y, X, C]`, whose own means and variances it uses.
        norm: The batch norm.
        slope: By window, factor of an activation in minus the gradient with respect to it `[B, y, x, C]`, float32.
        constant: Added to that `[B, y, x, C]`, float32.
        side: Side length of a window, in positions.
        rate: Reciprocal of the standard deviations `[C]`, float64.

    Returns:
        `[B, Y, X, C]`, of the type of the maps; and twice `[C]`, float32.
    """
    (*sizes, channels), count = maps.shape, maps[..., 0].numel()
    partial, totals = torch.empty(2 * channels), torch.zeros(2 * channels, dtype=torch.float64)
    arguments = maps, norm.scale, norm.shift, norm.mean, slope, constant
    name = _name("gradient_sums", maps.dtype, maps.dtype)
    _call(name, *arguments, *sizes, channels, side, partial, totals)
    bias, along = totals.view(2, channels)
    base, tilt = (bias / count).float(), (along * rate.square() / count).float()
    direction = torch.empty_like(maps)
    name = _name("backward_maps", maps.dtype, maps.dtype)
    _call(name, *arguments, norm.scale, base, tilt, *sizes, channels, side, direction)
    return direction, (along * rate).float(), bias.float()
