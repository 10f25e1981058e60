"""Layers that are modules of the user."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import lru_cache
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ffdist.ff.custom import find_class
from ffdist.ff.forms import Form
from ffdist.ff.layers import Layer
from ffdist.ff.specs import Module

MAX_SEED = 2**63 - 1
_lock = RLock()


class Facts(NamedTuple):
    """What is known of a module without its weights."""

    shape: tuple[int, ...]
    """Shape of a sample's output."""
    num_parameters: int
    num_buffers: int


def infer(spec: Module, form: Form) -> Facts:
    """Returns the facts of a module for an input form, from a run on the meta device, which computes nothing.

    Raises:
        ValueError: It cannot be created, fails, or does not return one tensor with a row for each sample.
    """
    name, shape = spec.name, form.shape
    try:
        module_class: Any = find_class(name, nn.Module, may_import=spec.may_import)
        return _infer(module_class, name, json.dumps(spec.options), shape)
    except Exception as error:  # code of the user may raise anything
        raise ValueError(
            f"{name} cannot be created and called with samples of the shape {list(shape)} ({type(error).__name__}: "
            f"{error})"
        ) from error


@lru_cache
def _infer(module_class: Any, name: str, options: str, shape: tuple[int, ...]) -> Facts:
    with torch.device("meta"):
        module = module_class(**json.loads(options)).eval()
        lazy = UninitializedParameter, UninitializedBuffer
        if any(isinstance(each, lazy) for each in (*module.parameters(), *module.buffers())):
            raise ValueError("lazy parameters have no size; give all sizes")
        output = module(torch.empty(2, *shape))
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(module.parameters())):
        raise ValueError(f"a parameter must have one name only (names: {', '.join(names[:10])})")
    if not isinstance(output, Tensor) or output.shape[:1] != (2,) or output.dim() not in (2, 3, 4):
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{name} must return a tensor [B, H], [B, T, H] or [B, C, Y, X] (returned for B=2: {given})")
    counts = (sum(each.numel() for each in tensors) for tensors in (module.parameters(), module.buffers()))
    return Facts(tuple(output.shape[1:]), *counts)


class ModuleLayer(Layer):
    """A layer that computes its activations by a module of the user.

    The module gets float32 samples in the shape of the input; with bfloat16, by torch's autocast. Its initial weights,
    and the random numbers that it draws in training, such as those of dropout, come from torch's generator, which is
    seeded by layer and minibatch, and restored afterwards.

    Args:
        spec: The module.
        form: Form of the input.
        generator: Its seed determines the initial weights, and everything else that the module draws.
        **settings: See `Layer`.
    """

    def __init__(self, spec: Module, form: Form, *, generator: torch.Generator, **settings: Any) -> None:
        super().__init__(spec.output_form(form), **settings)
        self._form = form
        module_class = find_class(spec.name, nn.Module, may_import=spec.may_import)
        with _seeded(generator.initial_seed()):
            self.module: nn.Module = module_class(**deepcopy(spec.options))
        self.requires_grad_(False)

    def arrange(self, rows: Tensor) -> Tensor:
        """Returns samples in their shape `[R, *shape]`, float32."""
        values = self._form.values(rows)
        return values.float() if values.dtype == torch.bfloat16 else values

    def compute(self, inputs: Tensor) -> Tensor:
        """Returns the activations `[R, H]`."""
        is_half = self.compute_dtype == torch.bfloat16
        precision = torch.autocast(inputs.device.type, dtype=torch.bfloat16) if is_half else nullcontext()
        with precision, self._deterministic(inputs.device):
            output: Tensor = self.module(inputs.clone())  # it may change them in place
        return (output.float() if output.dtype == torch.bfloat16 else output).flatten(1)

    def compute_for_training(self, inputs: Tensor, batch: int, noise: Tensor | None) -> Tensor:
        """Returns the activations, with their graph."""
        if noise is None:
            return super().compute_for_training(inputs, batch, noise)
        if inputs.device.type == "cuda":
            return self._compute_on_gpu(inputs, batch, noise)
        with _seeded(int(noise)):
            return super().compute_for_training(inputs, batch, noise)

    def gradients(self, direction: Tensor, inputs: Tensor, activations: Tensor, passes: slice) -> Mapping[str, Tensor]:
        """Returns the gradient of each parameter, by name."""
        with self._deterministic(inputs.device):
            return super().gradients(direction, inputs, activations, passes)

    @contextmanager
    def _deterministic(self, device: torch.device) -> Iterator[None]:
        """Makes operations whose result may differ from call to call errors in a `with` block.

        Raises:
            ValueError: The module has one.
        """
        if torch.compiler.is_compiling():
            yield
            return
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        options: Any = torch.utils.deterministic
        fills = options.fill_uninitialized_memory
        if device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch needs for deterministic products
        torch.use_deterministic_algorithms(True)
        options.fill_uninitialized_memory = False
        try:
            yield
        except RuntimeError as error:
            operation, is_nondeterministic, _ = str(error).partition(" does not have a deterministic implementation")
            if not is_nondeterministic:
                raise
            raise ValueError(
                f"{type(self.module).__name__} uses the operation {operation}, which has no deterministic "
                f"implementation on {device.type}, so that its results cannot be repeated; use another one"
            ) from error
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            options.fill_uninitialized_memory = fills

    def _compute_on_gpu(self, inputs: Tensor, batch: int, noise: Tensor) -> Tensor:
        is_captured = torch.cuda.is_current_stream_capturing()  # the first call is not
        before = None if is_captured else torch.cuda.get_rng_state(inputs.device)
        activations = super().compute_for_training(inputs, batch, noise)
        if before is not None and not torch.equal(torch.cuda.get_rng_state(inputs.device), before):
            raise ValueError(
                f"{type(self.module).__name__} draws random numbers on a GPU, where they cannot be repeated; remove "
                f"dropout and the like, or set pipeline.device to cpu"
            )
        return activations

    @property
    def draws(self) -> bool:
        """Whether the module may draw random numbers. On a GPU it must not."""
        return True

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draws a seed `[1]`."""
        return torch.randint(MAX_SEED, (1,), generator=generator)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generator of the CPU in a `with` block, and restores it; one thread after the other."""
    with _lock, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
