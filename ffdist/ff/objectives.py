"""Objectives: the loss of a layer, computed from its activations, and the scores that predictions are made from.

Shapes: `T` passes that are trained on, the positive one first, `B` samples, `H` units.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ffdist.ff.goodness import GOODNESS, MINUS
from ffdist.ff.losses import LOSSES
from ffdist.ff.optimizers import LAYER_UPDATE, Update


@dataclass(frozen=True)
class Rule:
    """A learning rule of layers. The defaults are those of the paper's released code."""

    goodness: str = "sum_of_squares"
    """A key of `GOODNESS`, or one after `minus_`: low for positive rows."""
    normalization: str = "rms"
    """A key of `NORMALIZATIONS`."""
    loss: str = "logistic"
    """A key of `LOSSES`."""
    alpha: float = 1.0
    """Factor on the margin."""
    alternating: bool = False
    """Whether positive and negative rows make an update each, one after the other, instead of one together."""
    updates_per_minibatch: int = 1
    """Number of updates on a minibatch before the next one."""
    peer_strength: float = 0.03
    """Strength of the pull of each unit's mean activity towards the mean of the layer, which revives dead units."""
    update: Update = LAYER_UPDATE
    """How parameters follow the gradient."""
    objective: str = "goodness"
    """A key of `OBJECTIVES`."""


RELEASE = Rule()
"""The learning rule of the paper's released code."""


class Loss(NamedTuple):
    """The loss of a minibatch."""

    metrics: tuple[Tensor, ...]
    """Values of `Objective.metrics`, scalars."""
    direction: Callable[[slice], Tensor]
    """Returns minus the gradient of the mean loss over samples with respect to the activations of some of the passes
    `[t, B, H]`, as a new tensor. It is 0 where an activation is 0, as behind a ReLU."""


class Objective(ABC):
    """The local loss of a layer.

    Its methods must not wait for the device (such as `.item()`), because they are captured in a CUDA graph.

    Args:
        rule: The learning rule.
        threshold: Threshold of the layer; None for its number of units.
        num_units: Number of outputs of the layer.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of the metrics of a minibatch."""
    needs_labels: ClassVar[bool] = False
    """Whether it needs the true labels."""

    def __init__(self, rule: Rule, threshold: float | None, num_units: int) -> None:
        self.rule, self.num_units = rule, num_units

    @abstractmethod
    def scores(self, activations: Tensor, squares: Tensor) -> Tensor:
        """Returns a score of each row `[...]`; the label with the greatest sum of scores over layers is predicted.

        Args:
            activations: `[..., H]`.
            squares: Sum of the squared activations `[...]`.
        """

    @abstractmethod
    def __call__(self, activations: Tensor, scores: Tensor, labels: Tensor | None) -> Loss:
        """Returns the loss of a minibatch.

        Args:
            activations: Activations of the passes that are trained on `[T, B, H]`; not modified.
            scores: Their scores `[T, B]`.
            labels: True labels `[B]`, or None if it does not need them.
        """


class AutogradObjective(Objective):
    """An objective whose gradient is computed by autograd."""

    @abstractmethod
    def loss(self, activations: Tensor, labels: Tensor | None) -> Tensor:
        """Returns the mean loss over samples, a scalar, from activations `[T, B, H]` and true labels `[B]`."""

    def __call__(self, activations: Tensor, scores: Tensor, labels: Tensor | None) -> Loss:
        """Returns the loss of a minibatch."""
        leaf = activations.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(leaf, labels)

        def direction(passes: slice) -> Tensor:
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            return -gradient[passes] * (activations[passes] != 0)

        return Loss((loss.detach(),), direction)


class GoodnessObjective(Objective):
    """High goodness of positive rows and low goodness of negative rows (Hinton 2022, section 2), in closed form.

    Its gradient is half of the derivative of the loss, as in the paper's released code, where the factor 2 of the
    square is part of the learning rate.
    """

    metrics = ("loss", "goodness_positive", "goodness_negative", "pairwise_error")

    def __init__(self, rule: Rule, threshold: float | None, num_units: int) -> None:
        super().__init__(rule, threshold, num_units)
        self.threshold = signed_threshold(rule, threshold, num_units)
        self._goodness = GOODNESS[rule.goodness.removeprefix(MINUS)]
        self._is_minus, self._loss = rule.goodness.startswith(MINUS), LOSSES[rule.loss]

    def scores(self, activations: Tensor, squares: Tensor) -> Tensor:
        """Returns the goodness of each row."""
        goodness = self._goodness.value(activations, squares)
        return -goodness if self._is_minus else goodness

    def __call__(self, activations: Tensor, scores: Tensor, labels: Tensor | None) -> Loss:
        """Returns the loss of a minibatch; each of the M negative rows of a sample has the weight 1 / M."""
        margin = self.rule.alpha * (scores - self.threshold)
        losses, pull = self._loss(margin[0], margin[1:])
        pull.mul_(self.rule.alpha / scores.shape[1])
        if len(pull) > 2:
            pull[1:] /= len(pull) - 1
        positive, negative = scores[0], scores[1:]
        loss = (losses[0].mean() + losses[1:].mean()) / 2
        pairwise_error = (negative >= positive).float().mean()

        def direction(passes: slice) -> Tensor:
            slope = self._goodness.slope(activations[passes])
            return (-slope if self._is_minus else slope) * pull[passes].unsqueeze(-1)

        return Loss((loss, positive.mean(), negative.mean(), pairwise_error), direction)


OBJECTIVES: dict[str, type[Objective]] = {"goodness": GoodnessObjective}
"""Objectives, by the name in `training.objective`."""


def signed_threshold(rule: Rule, threshold: float | None, num_units: int) -> float:
    """Returns the threshold of a layer, with the sign of its goodness; None is the number of units."""
    size = float(num_units) if threshold is None else threshold
    return -size if rule.goodness.startswith(MINUS) else size
