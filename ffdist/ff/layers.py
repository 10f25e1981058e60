"""Layers that train on their own loss: forward pass, closed-form gradient and update of one minibatch."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffdist.ff.goodness import GOODNESS, MINUS, NORMALIZATIONS, squared_length
from ffdist.ff.losses import LOSSES
from ffdist.ff.optimizers import LAYER_UPDATE, Learner, Update

MEASURED = ("active_fraction", "weight_rms")
"""What takes a pass over all activities or weights, and so is only measured now and then."""
METRICS = ("loss", "goodness_positive", "goodness_negative", "pairwise_error", *MEASURED)
"""What a layer reports of a minibatch, in this order."""

PEER_SMOOTHING, PEER_START = 0.9, 0.5
"""Running mean of each unit's activity: weight of the past, and where it starts."""


@dataclass(frozen=True)
class Rule:
    """How layers learn."""

    goodness: str = "sum_of_squares"
    """A key of `GOODNESS`, or one after `minus_`: low for positives."""
    normalization: str = "rms"
    """A key of `NORMALIZATIONS`."""
    loss: str = "logistic"
    """A key of `LOSSES`."""
    alpha: float = 1.0
    """Sharpness of the loss, which is taken of `alpha` times the margin."""
    alternating: bool = False
    """Whether positive and negative rows make an update each, one after the other, in place of one of both."""
    updates_per_minibatch: int = 1
    """Number of updates on a minibatch before the next one."""
    peer_strength: float = 0.03
    """Pull of each unit's mean activity towards the mean of the layer, which revives dead units; 0 turns it off."""
    update: Update = LAYER_UPDATE
    """How parameters follow the gradient."""


RELEASE = Rule()
"""The rule of the paper's released code."""


class Passed(NamedTuple):
    """What a layer hands on."""

    activity: Tensor
    """Normalized activities `[..., H]`, in the compute type."""
    goodness: Tensor
    """Goodness before normalization `[...]`, float32."""


class _Look(NamedTuple):
    """What a layer sees of rows."""

    activity: Tensor
    """`[..., H]`."""
    squares: Tensor
    """Sum of squared activities `[...]`."""
    goodness: Tensor
    """`[...]`."""
    slope: Tensor
    """Half of its derivative with respect to the activities `[..., H]`."""


def counted_threshold(rule: Rule, threshold: float | None, units: int) -> float:
    """Returns a layer's threshold as its goodness is counted, any minus included; None is the number of units."""
    size = float(units) if threshold is None else threshold
    return -size if rule.goodness.startswith(MINUS) else size


def _refresh(layer: "Layer", _: Any) -> None:
    layer.refresh()


class Layer(Learner, ABC):
    """A ReLU layer (Hinton 2022, sections 2 and 2.1); its kinds say which inputs reach which units.

    Args:
        shape: Shape of the weight, fan-in F last; one unit per row.
        rule: How it learns.
        threshold: The goodness, before any minus, at which a row is as likely positive as negative; None for the
            number of units.
        compute_dtype: Type of the matrix products. Parameters, goodness and updates stay float32.
        generator: Source of the initial weights, N(0, 1) / sqrt(F); zeros where there is none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        rule: Rule = RELEASE,
        threshold: float | None = None,
        compute_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        units = math.prod(shape[:-1])
        start = torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) if generator else torch.zeros(shape)
        super().__init__(start, torch.zeros(units), rule.update)
        self.rule, self.compute_dtype = rule, compute_dtype
        self._goodness = GOODNESS[rule.goodness.removeprefix(MINUS)]
        self._normalize = NORMALIZATIONS[rule.normalization]
        self._is_minus = rule.goodness.startswith(MINUS)
        self.threshold = counted_threshold(rule, threshold, units)
        self.register_buffer("mean_activity", torch.full_like(self.bias, PEER_START))
        self.mean_activity: Tensor
        self._compute_weight: Tensor
        self.register_buffer("_compute_weight", torch.empty(0), persistent=False)
        self.refresh()
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Updates the copy of the weights that the products use.

        It runs by itself after in-place changes and `.to(...)`. Call it after changes that autograd does not see, such
        as `weight.data.mul_(2)`. Gradients flow through the copy if the weights require them.
        """
        self._compute_weight = self.weight.to(self.compute_dtype).view_as(self.weight)
        self._copied_version = self._weight_version

    @property
    def _weight_version(self) -> tuple[int, int]:
        """Identifies the values of the weights; differs after in-place changes, moves and copies of the module."""
        return self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version

    def _refresh_if_changed(self) -> None:
        # Tracing replaces weights by symbols, and would record the copy as part of the network.
        if not torch.compiler.is_compiling() and self._copied_version != self._weight_version:
            self.refresh()

    @property
    def _copy(self) -> Tensor | None:
        """The copy, where it is one of the same shape."""
        return None if self._compute_weight.data_ptr() == self.weight.data_ptr() else self._compute_weight

    def _renew(self) -> None:
        """Brings a copy of another shape up to the weights, in place."""

    @abstractmethod
    def _inputs(self, rows: Tensor) -> Tensor:
        """Lays rows `[R, D]` out as the products want them, `[R, ...]`."""

    @abstractmethod
    def _product(self, inputs: Tensor) -> Tensor:
        """Returns the units' weighted sums `[R, H]`, in the compute type."""

    @abstractmethod
    def _gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        """Returns the weight's gradient, summed over rows, from those of the total inputs `[R, H]`."""

    def _activity(self, inputs: Tensor) -> Tensor:
        self._refresh_if_changed()
        return self._product(inputs).to(self.weight.dtype).add_(self.bias).relu_()

    def _look(self, activity: Tensor) -> _Look:
        squares = squared_length(activity)
        goodness, slope = self._goodness(activity, squares)
        return _Look(activity, squares, *((-goodness, -slope) if self._is_minus else (goodness, slope)))

    def _pass_on(self, look: _Look) -> Passed:
        return Passed(self._normalize(look.activity, look.squares).to(self.compute_dtype), look.goodness)

    def forward(self, rows: Tensor) -> Passed:
        """Passes rows `[..., D]` of the compute type on, at the present weights."""
        activity = self._activity(self._inputs(rows.reshape(-1, rows.shape[-1])))
        return self._pass_on(self._look(activity.reshape(*rows.shape[:-1], -1)))

    def train_minibatch(
        self,
        rows: Tensor,
        *,
        batch: int,
        negatives: int = 1,
        lr_scale: float | None = 1.0,
        measure: bool = False,
    ) -> tuple[Passed, Tensor]:
        """Passes a minibatch on and learns from it, all passes at the same weights.

        Args:
            rows: B positive, then `negatives` times B negative rows, then others `[R, D]`, in the compute type.
                Those others, such as the neutral ones, only pass.
            batch: Number of samples B.
            negatives: Negative rows of each sample; each weighs its share of one.
            lr_scale: Factor on the learning rate; None leaves the layer as it is.
            measure: Whether to take MEASURED as well.

        Returns:
            What goes on, `[R, H]` and `[R]`, computed at the weights before the update; and METRICS `[6]`, float32, not
            a number where nothing was measured.
        """
        inputs = self._inputs(rows)
        look = self._look(self._activity(inputs))
        passed = self._pass_on(look)
        trained = slice(batch * (1 + negatives))
        inputs, look = inputs[trained], _Look(*(part[trained] for part in look))
        positive, negative = look.goodness[:batch], look.goodness[batch:]
        loss, pull = self._loss(look.goodness, batch)
        unmeasured = loss.new_full((), math.nan)
        metrics = torch.stack(
            (
                (loss[:batch].mean() + loss[batch:].mean()) / 2,
                positive.mean(),
                negative.mean(),
                (negative.view(negatives, batch) >= positive).float().mean(),
                look.activity.sign().mean() if measure else unmeasured,  # none is negative
                self.weight.square().mean().sqrt() if measure else unmeasured,
            )
        ).float()
        if lr_scale is not None:
            self._learn(inputs, look, pull, batch, lr_scale)
        return passed, metrics

    def _loss(self, goodness: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Returns each row's loss, and how hard it pulls at its goodness for the mean over samples, both `[R]`."""
        margin = self.rule.alpha * (goodness - self.threshold)
        loss, pull = LOSSES[self.rule.loss](margin[:batch], margin[batch:])
        pull.mul_(self.rule.alpha / batch)
        if len(pull) > 2 * batch:
            pull[batch:] /= len(pull) // batch - 1
        return loss, pull

    def _learn(self, inputs: Tensor, look: _Look, pull: Tensor, batch: int, lr_scale: float) -> None:
        """Makes the updates of a minibatch, the first by what was seen already.

        The gradient with respect to the total input is that of the loss by way of the goodness (on positive rows
        `(1 - p) h`, on negative ones `-p h`, by default), and on positive rows the pull of peer normalization, which
        the ReLU does not stop; of the mean over samples.
        """
        turns = [slice(0, batch), slice(batch, None)] if self.rule.alternating else [slice(0, None)]
        for number, turn in enumerate(turns * self.rule.updates_per_minibatch):
            if number:
                look = self._look(self._activity(inputs))
                _, pull = self._loss(look.goodness, batch)
            direction = look.slope[turn] * pull[turn].unsqueeze(1)
            if turn.start == 0:
                self.mean_activity.lerp_(look.activity[:batch].mean(0), 1 - PEER_SMOOTHING)
                strength = self.rule.peer_strength / batch
                direction[:batch] += strength * (self.mean_activity.mean() - self.mean_activity)
            gradient = self._gradient(direction.to(self.compute_dtype), inputs[turn])
            self.ascend(gradient, direction.sum(0), lr_scale=lr_scale, copy=self._copy)
            self._renew()
            self._copied_version = self._weight_version


class Dense(Layer):
    """A layer whose every unit reads the whole row.

    Args:
        inputs: Width D of a row.
        units: Number of units H.
        **settings: As `Layer` takes them.
    """

    def __init__(self, inputs: int, units: int, **settings: Any) -> None:
        super().__init__((units, inputs), **settings)

    def _inputs(self, rows: Tensor) -> Tensor:
        return rows

    def _product(self, inputs: Tensor) -> Tensor:
        return torch.mm(inputs, self._compute_weight.t())

    def _gradient(self, direction: Tensor, inputs: Tensor) -> Tensor:
        return torch.mm(direction.t(), inputs)
