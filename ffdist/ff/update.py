"""The release's update rule, shared by layers and readout, and its schedule."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Update:
    """How parameters follow their gradient."""

    learning_rate: float
    """Step along the smoothed gradient, before the schedule's gain."""
    weight_decay: float
    """Share of a weight taken off per unit of learning rate, apart from the gradient; biases have none."""
    smoothing: float = 0.9
    """Weight of the past in the running mean of gradients, in [0, 1)."""

    def ascend(
        self, parameter: Tensor, smoothed: Tensor, gradient: Tensor, *, gain: float, batch: int, decay: bool
    ) -> None:
        """Moves a parameter up its gradient, in place.

        `smoothed <- smoothing * smoothed + (1 - smoothing) * gradient / batch`, then
        `parameter <- parameter + gain * learning_rate * (smoothed - weight_decay * parameter)`.

        Args:
            parameter: Changed in place.
            smoothed: Running mean of the gradient, same shape, changed in place.
            gradient: Sum of the rows' gradients, same shape, of any floating type.
            gain: The schedule's factor on the learning rate.
            batch: Number of samples in the minibatch.
            decay: Whether weight decay applies.
        """
        rate = gain * self.learning_rate
        smoothed.mul_(self.smoothing).add_(gradient, alpha=(1 - self.smoothing) / batch)
        if decay:
            parameter.mul_(1 - rate * self.weight_decay)
        parameter.add_(smoothed, alpha=rate)


LAYER_UPDATE = Update(learning_rate=0.01, weight_decay=0.001)
"""A layer's, in the paper's released code."""
READOUT_UPDATE = Update(learning_rate=0.1, weight_decay=0.003)
"""The readout's, in the paper's released code."""


def rate_gain(epoch: int, epochs: int) -> float:
    """Returns the factor on the learning rate: 1 for the first half of the run, then falling to `1 / epochs`.

    Args:
        epoch: Counted from 0.
        epochs: Length of the run.
    """
    done = epoch + 1
    return 1.0 if done <= epochs / 2 else (1 + 2 * (epochs - done)) / epochs
