"""How parameters follow their gradient: the optimizers, shared by layers and readout, and the fall of their rate."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam as torch_adam
from torch.optim.sgd import sgd as torch_sgd

BETA2, EPSILON = 0.999, 1e-8
"""Adam's second `beta`, and the term that keeps it from dividing by zero."""

PIECE = 2**19
"""Numbers in a piece of a tensor, of which the passes of an update go over one after the other."""

Memory = dict[str, Tensor]
"""What an optimizer keeps of a parameter, by slot; changed in place."""


@dataclass(frozen=True)
class Update:
    """How parameters follow their gradient."""

    learning_rate: float
    """Learning rate, before the factor of the schedule."""
    weight_decay: float
    """Share of a weight taken off per unit of learning rate; biases have none."""
    momentum: float = 0.9
    """Momentum of `hinton` and `sgd`, in [0, 1); first of the `betas` of `adam` and `adamw`."""
    optimizer: str = "hinton"
    """A key of `OPTIMIZERS`."""

    def num_values(self, parameters: int) -> int:
        """Returns the values of a weight and a bias of so many parameters together, optimizer state included."""
        slots = OPTIMIZERS[self.optimizer].slots
        steps = slots.count("steps")
        return parameters * (1 + len(slots) - steps) + 2 * steps


LAYER_UPDATE = Update(learning_rate=0.01, weight_decay=0.001)
"""A layer's, in the paper's released code."""
READOUT_UPDATE = Update(learning_rate=0.1, weight_decay=0.003)
"""The readout's, in the paper's released code."""


def hinton(parameter: Tensor, memory: Memory, gradient: Tensor, update: Update) -> None:
    """The paper's released code, whose decay is apart from the gradient.

    `mean <- momentum * mean + (1 - momentum) * gradient`, then
    `parameter <- parameter + learning_rate * (mean - weight_decay * parameter)`.
    """
    memory["gradient"].lerp_(gradient.to(parameter.dtype), 1 - update.momentum)
    if update.weight_decay:
        parameter.mul_(1 - update.learning_rate * update.weight_decay)
    parameter.add_(memory["gradient"], alpha=update.learning_rate)


def sgd(parameter: Tensor, memory: Memory, gradient: Tensor, update: Update) -> None:
    """SGD of torch, with momentum, whose decay is part of the gradient."""
    torch_sgd(
        [parameter],
        [gradient.to(parameter.dtype)],
        [memory["momentum"]],
        weight_decay=update.weight_decay,
        momentum=update.momentum,
        lr=update.learning_rate,
        dampening=0.0,
        nesterov=False,
        maximize=True,
    )


def adam(parameter: Tensor, memory: Memory, gradient: Tensor, update: Update, decoupled: bool = False) -> None:
    """Adam of torch, whose decay is part of the gradient."""
    torch_adam(
        [parameter],
        [gradient.to(parameter.dtype)],
        [memory["mean"]],
        [memory["mean_square"]],
        [],
        [memory["steps"]],
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


def adamw(parameter: Tensor, memory: Memory, gradient: Tensor, update: Update) -> None:
    """AdamW of torch, whose decay is apart from the gradient."""
    adam(parameter, memory, gradient, update, decoupled=True)


class Optimizer(NamedTuple):
    """A way to move a parameter."""

    ascend: Callable[[Tensor, Memory, Tensor, Update], None]
    """Moves a parameter up its gradient, the mean over a minibatch, of any floating type."""
    slots: tuple[str, ...]
    """What it keeps of a parameter, each of its shape and zero at first; `steps` is one number."""


OPTIMIZERS = {
    "hinton": Optimizer(hinton, ("gradient",)),
    "sgd": Optimizer(sgd, ("momentum",)),
    "adam": Optimizer(adam, ("mean", "mean_square", "steps")),
    "adamw": Optimizer(adamw, ("mean", "mean_square", "steps")),
}
"""By the name that `training.optimizer` gives."""


class Learner(nn.Module):
    """A weight and a bias that learn without autograd.

    Args:
        weight: Initial weight, of any shape.
        bias: Initial bias.
        update: How they follow their gradients. What the optimizer keeps of them is in `weight_SLOT`, `bias_SLOT`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, update: Update) -> None:
        super().__init__()
        self.update = update
        self.weight, self.bias = (nn.Parameter(start, requires_grad=False) for start in (weight, bias))
        for slot in OPTIMIZERS[update.optimizer].slots:
            for name, start in (("weight", weight), ("bias", bias)):
                zeros = torch.zeros(()) if slot == "steps" else torch.zeros_like(start)
                self.register_buffer(f"{name}_{slot}", zeros)

    def ascend(
        self, weight_gradient: Tensor, bias_gradient: Tensor, *, lr_scale: float, copy: Tensor | None = None
    ) -> None:
        """Moves both up their gradients, in place.

        Args:
            weight_gradient: Mean over samples, of the weight's shape and any floating type.
            bias_gradient: The same of the bias.
            lr_scale: Factor of the schedule on the learning rate.
            copy: Gets the new weight, in its own type, while that is at hand.
        """
        step = replace(self.update, learning_rate=lr_scale * self.update.learning_rate)
        self._ascend("bias", bias_gradient, None, replace(step, weight_decay=0.0))
        self._ascend("weight", weight_gradient, copy, step)

    def _ascend(self, name: str, gradient: Tensor, copy: Tensor | None, step: Update) -> None:
        optimizer, parameter = OPTIMIZERS[step.optimizer], getattr(self, name)
        memory = [getattr(self, f"{name}_{slot}") for slot in optimizer.slots]
        cut = [parameter, gradient, *memory, *([] if copy is None else [copy])]
        # Piece by piece, because what the first pass over a piece brings near is still there for the last.
        for part, by, *rest in in_pieces(cut):
            kept = dict(zip(optimizer.slots, rest, strict=False))
            optimizer.ascend(part, kept, by, step)
            if copy is not None:
                rest[-1].copy_(part)


def in_pieces(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Cuts tensors of one shape alike, into runs of rows that a core's cache can hold; elsewhere nothing is gained.

    A memory that counts steps, and so has no rows, is never cut, nor is what stands beside it.
    """
    whole = tensors[0]
    if whole.dim() < 2 or whole.device.type != "cpu" or any(tensor.shape != whole.shape for tensor in tensors):
        return iter([tensors])
    rows = max(1, PIECE // whole.shape[-1])
    return zip(*(torch.split(tensor.flatten(0, -2), rows) for tensor in tensors), strict=True)


def epoch_lr_scale(epoch: int, epochs: int) -> float:
    """Returns the factor on the learning rate: 1 for the first half of the run, then falling to `1 / epochs`.

    Args:
        epoch: Counted from 0.
        epochs: Length of the run.
    """
    done = epoch + 1
    return 1.0 if done <= epochs / 2 else (1 + 2 * (epochs - done)) / epochs
