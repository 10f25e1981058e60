"""Optimizers of layers and readout."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam as torch_adam
from torch.optim.sgd import sgd as torch_sgd

BETA2, EPSILON = 0.999, 1e-8
"""Adam's second `beta`, and its constant against a division by zero."""

BLOCK_VALUES = 2**19
"""Number of values in a block of a parameter; an update processes one block after the other."""

TRAINING_STATE = re.compile(r"(layers\.\d+\.|readout\.(\d+\.)?)?(optimizer|statistics)\.")
"""Names of the tensors that only training needs, in the state of a `Learner` or of a network."""
Slots = dict[str, Tensor]
"""The state of an optimizer for a parameter, by slot; changed in place."""


@dataclass(frozen=True)
class Update:
    """How parameters follow their gradient."""

    learning_rate: float
    """Learning rate, before the factor of the schedule."""
    weight_decay: float
    """Weight decay per unit of learning rate. Parameters with fewer than two dimensions, such as biases, have none."""
    momentum: float = 0.9
    """Momentum of `hinton` and `sgd`, in [0, 1); first of the `betas` of `adam` and `adamw`."""
    optimizer: str = "hinton"
    """A key of `OPTIMIZERS`."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all parameters together; None for no limit."""

    def num_values(self, parameters: int) -> int:
        """Returns the number of values of two parameters, such as weight and bias, with their optimizer state."""
        slots = OPTIMIZERS[self.optimizer].slots
        steps = slots.count("steps")
        return parameters * (1 + len(slots) - steps) + 2 * steps


LAYER_UPDATE = Update(learning_rate=0.01, weight_decay=0.001)
"""Update of a layer in the paper's released code."""
READOUT_UPDATE = Update(learning_rate=0.1, weight_decay=0.003)
"""Update of the readout in the paper's released code."""


def hinton(parameter: Tensor, slots: Slots, gradient: Tensor, update: Update) -> None:
    """The update of the paper's released code, with decoupled weight decay.

    `mean <- momentum * mean + (1 - momentum) * gradient`, then
    `parameter <- parameter + learning_rate * (mean - weight_decay * parameter)`.
    """
    slots["gradient"].lerp_(gradient.to(parameter.dtype), 1 - update.momentum)
    if update.weight_decay:
        parameter.mul_(1 - update.learning_rate * update.weight_decay)
    parameter.add_(slots["gradient"], alpha=update.learning_rate)


def sgd(parameter: Tensor, slots: Slots, gradient: Tensor, update: Update) -> None:
    """SGD of torch, with momentum; its weight decay is an L2 penalty."""
    torch_sgd(
        [parameter],
        [gradient.to(parameter.dtype)],
        [slots["momentum"]],
        weight_decay=update.weight_decay,
        momentum=update.momentum,
        lr=update.learning_rate,
        dampening=0.0,
        nesterov=False,
        maximize=True,
    )


def adam(parameter: Tensor, slots: Slots, gradient: Tensor, update: Update, decoupled: bool = False) -> None:
    """Adam of torch, whose weight decay is an L2 penalty, or AdamW, if it is decoupled."""
    torch_adam(
        [parameter],
        [gradient.to(parameter.dtype)],
        [slots["mean"]],
        [slots["mean_square"]],
        [],
        [slots["steps"]],
        fused=True,
        decoupled_weight_decay=decoupled,
        amsgrad=False,
        beta1=update.momentum,
        beta2=BETA2,
        lr=update.learning_rate,
        weight_decay=update.weight_decay,
        eps=EPSILON,
        maximize=True,
    )


class Optimizer(NamedTuple):
    """An optimizer of a single parameter."""

    ascend: Callable[[Tensor, Slots, Tensor, Update], None]
    """Moves a parameter up its gradient, the mean over a minibatch, of any floating-point type."""
    slots: tuple[str, ...]
    """Names of its state, each of the parameter's shape and 0 initially; `steps` is a scalar."""


OPTIMIZERS = {
    "hinton": Optimizer(hinton, ("gradient",)),
    "sgd": Optimizer(sgd, ("momentum",)),
    "adam": Optimizer(adam, ("mean", "mean_square", "steps")),
    "adamw": Optimizer(partial(adam, decoupled=True), ("mean", "mean_square", "steps")),
}
"""Optimizers, by the name in `training.optimizer`."""


class Learner(nn.Module):
    """A module whose parameters are updated by `OPTIMIZERS`, from gradients that it gets.

    Its state is that of the module. The optimizer state is in buffers of the submodule `optimizer`. Other values that
    only training needs are in buffers of a submodule `statistics`.

    Args:
        update: How parameters follow their gradients.
    """

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.update = update
        self.optimizer, self.statistics = nn.Module(), nn.Module()

    def add_optimizer_state(self) -> None:
        """Adds the optimizer state of all parameters that have none, 0 initially, and excludes them from autograd."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(False)
            for slot in OPTIMIZERS[self.update.optimizer].slots:
                if not hasattr(self.optimizer, key := buffer_name(name, slot)):
                    zeros = torch.zeros(()) if slot == "steps" else torch.zeros_like(parameter)
                    self.optimizer.register_buffer(key, zeros)

    def ascend(
        self, gradients: Mapping[str, Tensor], *, lr_scale: float, copies: Mapping[str, Tensor | None] | None = None
    ) -> None:
        """Moves parameters up their gradients, in place.

        Args:
            gradients: Gradient of each parameter by name, the mean over samples, of any floating-point type.
            lr_scale: Factor on the learning rate.
            copies: Copies of parameters in other types, which get the new values, too.
        """
        step = replace(self.update, learning_rate=lr_scale * self.update.learning_rate)
        if self.update.clip_norm is not None:
            gradients = _clipped(gradients, self.update.clip_norm)
        for name, gradient in gradients.items():
            parameter = self.get_parameter(name)
            with_decay = step if parameter.dim() > 1 else replace(step, weight_decay=0.0)
            self._ascend(name, parameter, gradient, (copies or {}).get(name), with_decay)

    def _ascend(self, name: str, parameter: Tensor, gradient: Tensor, copy: Tensor | None, step: Update) -> None:
        optimizer = OPTIMIZERS[step.optimizer]
        gradient = gradient.contiguous()  # torch's fused Adam on CPUs reads other memory formats in the wrong order
        slots = [self.optimizer.get_buffer(buffer_name(name, slot)) for slot in optimizer.slots]
        tensors = [parameter, gradient, *slots, *([] if copy is None else [copy])]
        # Block by block, so that a block stays in the CPU's cache for all operations of the update.
        for block, block_gradient, *rest in in_blocks(tensors):
            block_slots = dict(zip(optimizer.slots, rest, strict=False))
            optimizer.ascend(block, block_slots, block_gradient, step)
            if copy is not None:
                rest[-1].copy_(block)


def _clipped(gradients: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """Returns gradients whose norm, taken together, is at most `clip_norm`."""
    norm = torch.stack([torch.linalg.vector_norm(each.float()) for each in gradients.values()]).square().sum().sqrt()
    factor = (clip_norm / norm).clamp(max=1)
    return {name: gradient * factor.to(gradient.dtype) for name, gradient in gradients.items()}


def buffer_name(parameter: str, slot: str) -> str:
    """Returns the name of a buffer, which must not contain a dot."""
    return f"{parameter.replace('.', '/')}/{slot}"


def is_optimizer_state(name: str) -> bool:
    """Returns whether a tensor of this name in the state of a `Learner` is optimizer state."""
    return name.startswith("optimizer.")


def is_for_inference(name: str) -> bool:
    """Returns whether inference needs a tensor of this name in the state of a `Learner` or of a network."""
    return not TRAINING_STATE.match(name)


def in_blocks(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Splits tensors of the same shape into blocks of rows that fit into the cache of a core, on CPUs.

    Tensors of different shapes, such as a step counter next to a parameter, are not split.
    """
    first = tensors[0]
    is_small = first.dim() < 2 or first.numel() <= BLOCK_VALUES
    if is_small or first.device.type != "cpu" or any(tensor.shape != first.shape for tensor in tensors):
        return iter([tensors])
    num_rows = max(1, BLOCK_VALUES // first.shape[-1])
    return zip(*(torch.split(tensor.flatten(0, -2), num_rows) for tensor in tensors), strict=True)
