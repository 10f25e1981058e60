"""Schedules of the learning rates."""

import math
from collections.abc import Callable, Sequence

RISE_FRACTION, INITIAL_SCALE = 0.3, 0.04
"""Fraction of a run in which `one_cycle` rises, and the factor that it begins with, as in torch's OneCycleLR."""


def lr_scales(
    schedule: str, epochs: int, warmup: int = 0, steps: Sequence[int] = (), step_factor: float = 1.0
) -> list[float]:
    """Returns the factor on the learning rates in each epoch.

    Args:
        schedule: A key of `SCHEDULES`.
        epochs: Number of epochs.
        warmup: Number of epochs at the start in which the factor rises linearly to that of the schedule.
        steps: Numbers of epochs after each of which the factor is multiplied by `step_factor`.
        step_factor: See `steps`.
    """
    return [
        SCHEDULES[schedule](epoch, epochs)
        * min(1.0, (epoch + 1) / (warmup + 1))
        * step_factor ** sum(step <= epoch for step in steps)
        for epoch in range(epochs)
    ]


def hinton(epoch: int, epochs: int) -> float:
    """Returns 1 in the first half of the run; then it falls to `1 / epochs` (the paper's released code)."""
    done = epoch + 1
    return 1.0 if done <= epochs / 2 else (1 + 2 * (epochs - done)) / epochs


def cosine(epoch: int, epochs: int) -> float:
    """Returns a half cosine from 1 to 0, in the middle of each epoch."""
    return (1 + math.cos(math.pi * (epoch + 0.5) / epochs)) / 2


def one_cycle(epoch: int, epochs: int) -> float:
    """Returns half a cosine from INITIAL_SCALE to 1, and then one from 1 to 0, in the middle of each epoch."""
    done = (epoch + 0.5) / epochs
    if done < RISE_FRACTION:
        return INITIAL_SCALE + (1 - INITIAL_SCALE) * (1 - math.cos(math.pi * done / RISE_FRACTION)) / 2
    return (1 + math.cos(math.pi * (done - RISE_FRACTION) / (1 - RISE_FRACTION))) / 2


def constant(epoch: int, epochs: int) -> float:
    """Returns 1."""
    return 1.0


SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "hinton": hinton,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "steps": constant,
    "constant": constant,
}
"""Schedules, by the name in `training.learning_rate_schedule`."""
