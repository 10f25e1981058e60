"""Schedules of the learning rates."""

import math
from collections.abc import Callable


def lr_scales(schedule: str, epochs: int, warmup: int = 0) -> list[float]:
    """Returns the factor on the learning rates in each epoch.

    Args:
        schedule: A key of `SCHEDULES`.
        epochs: Number of epochs.
        warmup: Number of epochs at the start in which the factor rises linearly to that of the schedule.
    """
    return [SCHEDULES[schedule](epoch, epochs) * min(1.0, (epoch + 1) / (warmup + 1)) for epoch in range(epochs)]


def hinton(epoch: int, epochs: int) -> float:
    """Returns 1 in the first half of the run; then it falls to `1 / epochs` (the paper's released code)."""
    done = epoch + 1
    return 1.0 if done <= epochs / 2 else (1 + 2 * (epochs - done)) / epochs


def cosine(epoch: int, epochs: int) -> float:
    """Returns a half cosine from 1 to 0, in the middle of each epoch."""
    return (1 + math.cos(math.pi * (epoch + 0.5) / epochs)) / 2


def constant(epoch: int, epochs: int) -> float:
    """Returns 1."""
    return 1.0


SCHEDULES: dict[str, Callable[[int, int], float]] = {"hinton": hinton, "cosine": cosine, "constant": constant}
"""Schedules, by the name in `training.learning_rate_schedule`."""
