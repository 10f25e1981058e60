"""The interface of layers that train on their own loss. Each kind of layer has a file of its own.

Shapes: `P` passes, `T` passes that are trained on, `B` samples of a minibatch, `R` rows, `D` inputs, `H` units.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ffdist.ff.goodness import NORMALIZATIONS, squared_norm
from ffdist.ff.objectives import OBJECTIVES, RELEASE, Rule
from ffdist.ff.optimizers import Learner

MEASURED = ("active_fraction", "weight_rms")
"""The last metrics of every layer. They read all activations or weights, so they are only measured now and then."""
MEAN_ACTIVITY_MOMENTUM, INITIAL_MEAN_ACTIVITY = 0.9, 0.5
"""Momentum and initial value of each unit's running mean activity."""


class Passes(NamedTuple):
    """The passes of a minibatch, in this order: positive, negative, and then the neutral one if there is one."""

    num_negatives: int = 1
    """Number of negative passes M."""
    has_neutral: bool = True
    """Whether there is a pass with the neutral label. The readout reads it, or else the positive pass."""

    @property
    def num_trained(self) -> int:
        """Number of passes that are trained on: positive and negative."""
        return 1 + self.num_negatives

    @property
    def num_passes(self) -> int:
        """Number of passes P."""
        return self.num_trained + self.has_neutral

    @property
    def readout(self) -> int:
        """The pass that the readout reads."""
        return self.num_trained if self.has_neutral else 0

    @property
    def others(self) -> slice:
        """All passes except the one that the readout reads."""
        return slice(0, self.num_trained) if self.has_neutral else slice(1, None)

    def joined(self, others: Tensor, readout: Tensor) -> Tensor:
        """Returns all passes `[P, B, ...]` from the one that the readout reads `[B, ...]` and the others."""
        parts = (others, readout.unsqueeze(0))
        return torch.cat(parts if self.has_neutral else parts[::-1])


class Minibatch(NamedTuple):
    """The inputs of a layer for one minibatch."""

    rows: Tensor
    """Rows `[P, B, D]`, of the layer's compute type. A neutral pass is not trained on."""
    passes: Passes = Passes()
    labels: Tensor | None = None
    """True labels `[B]`, int64, if the objective needs them."""


class Output(NamedTuple):
    """The output of a layer."""

    activations: Tensor
    """Normalized activations `[..., H]`, of the layer's compute type."""
    scores: Tensor
    """Scores of the objective `[...]`, such as the goodness, float32."""


class LayerSettings(TypedDict, total=False):
    """Arguments of all kinds of layers."""

    rule: Rule
    """The learning rule."""
    threshold: float | None
    """Goodness, before any minus, at which a row is as likely positive as negative; None for the number of units."""
    compute_dtype: torch.dtype
    """Type of the matrix products. Parameters, goodness and updates stay float32."""
    generator: torch.Generator | None
    """Source of the initial weights; zeros without it."""


class Layer(Learner, ABC):
    """A layer that trains on its own loss.

    A kind of layer creates its parameters in `__init__` and computes its output in `compute`. Its gradient is computed
    by autograd, within the layer, unless the kind overrides `compute_for_training` and `gradients`.

    Args:
        num_units: Number of outputs H.
        rule: The learning rule.
        threshold: See `LayerSettings`.
        compute_dtype: See `LayerSettings`.
    """

    masks_gradients: ClassVar[bool] = False
    """Whether units that are 0 pass no gradient of the objective on, as in a ReLU."""

    def __init__(
        self,
        num_units: int,
        *,
        rule: Rule = RELEASE,
        threshold: float | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(rule.update)
        self.rule, self.compute_dtype = rule, compute_dtype
        self.objective = OBJECTIVES[rule.objective](rule, threshold, num_units)
        self._normalize = NORMALIZATIONS[rule.normalization]
        self.statistics = nn.Module()
        self.statistics.register_buffer("mean_activity", torch.full((num_units,), INITIAL_MEAN_ACTIVITY))

    @abstractmethod
    def compute(self, inputs: Tensor) -> Tensor:
        """Returns the activations `[R, H]`, float32 or wider, from the result of `prepare`."""

    def prepare(self, rows: Tensor) -> Tensor:
        """Arranges rows `[R, D]` for `compute` and `gradients`, `[R, ...]`. By default, it returns them."""
        return rows

    def compute_for_training(self, inputs: Tensor) -> Tensor:
        """Returns the same as `compute`, with what `gradients` needs."""
        self.requires_grad_()
        with torch.enable_grad():
            return self.compute(inputs)

    def gradients(self, direction: Tensor, inputs: Tensor, activations: Tensor, rows: slice) -> Mapping[str, Tensor]:
        """Returns the gradient of each parameter, by name.

        Args:
            direction: Minus the gradient of the loss with respect to some of the activations `[r, H]`.
            inputs: Result of `prepare` for all rows.
            activations: Result of `compute_for_training` for all rows.
            rows: The rows that `direction` is for.
        """
        weights = torch.zeros_like(activations)
        weights[rows] = direction
        names, parameters = zip(*self.named_parameters(), strict=True)
        gradients = torch.autograd.grad(activations, parameters, weights)
        self.requires_grad_(False)
        return dict(zip(names, gradients, strict=True))

    def update_parameters(self, gradients: Mapping[str, Tensor], lr_scale: float) -> None:
        """Makes one update."""
        self.ascend(gradients, lr_scale=lr_scale)

    def refresh(self) -> None:
        """Updates what the layer derives from its weights. Call it after changes that autograd does not see."""

    @property
    def mean_activity(self) -> Tensor:
        """Running mean of each unit's activity on positive rows `[H]`."""
        return self.statistics.get_buffer("mean_activity")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics of a minibatch, in their order."""
        return (*self.objective.metrics, *MEASURED)

    def forward(self, rows: Tensor) -> Output:
        """Returns the output for rows `[..., D]` of the compute type."""
        activations = self.compute(self.prepare(rows.reshape(-1, rows.shape[-1])))
        return self._output(activations.view(*rows.shape[:-1], -1))

    def _output(self, activations: Tensor) -> Output:
        squares = squared_norm(activations)
        normalized = self._normalize(activations, squares).to(self.compute_dtype)
        return Output(normalized, self.objective.scores(activations, squares))

    @torch.no_grad()
    def train_minibatch(
        self, minibatch: Minibatch, *, lr_scale: float | None = 1.0, measure: bool = False
    ) -> tuple[Output, Tensor]:
        """Computes the output for a minibatch, and then learns from it.

        Args:
            minibatch: The minibatch.
            lr_scale: Factor on the learning rate; None to not train.
            measure: Whether to compute MEASURED.

        Returns:
            The output `[P, B, H]` and `[P, B]`, computed with the weights before the update; and the values of
            `metrics`, float32, with NaN for those that were not measured.
        """
        rows, num_trained, labels = minibatch.rows, minibatch.passes.num_trained, minibatch.labels
        inputs = self.prepare(rows.flatten(0, 1))
        activations = self.compute(inputs) if lr_scale is None else self.compute_for_training(inputs)
        values = activations.detach().view(*rows.shape[:2], -1)
        squares = squared_norm(values)
        scores = self.objective.scores(values, squares)
        output = Output(self._normalize(values, squares).to(self.compute_dtype), scores)
        trained, squares, scores = values[:num_trained], squares[:num_trained], scores[:num_trained]
        loss = self.objective(trained, squares, scores, labels)
        unmeasured = loss.metrics[0].new_full((), torch.nan)
        measured = (
            (trained != 0).to(trained.dtype).mean() if measure else unmeasured,
            self._weight_rms() if measure else unmeasured,
        )
        metrics = torch.stack((*loss.metrics, *measured)).float()
        if lr_scale is not None:
            self._learn(inputs, activations, trained, loss.direction, labels, lr_scale)
        return output, metrics

    def _weight_rms(self) -> Tensor:
        return torch.cat([each.flatten() for each in self.parameters() if each.dim() > 1]).square().mean().sqrt()

    def _learn(
        self,
        inputs: Tensor,
        activations: Tensor,
        trained: Tensor,
        direction: Tensor,
        labels: Tensor | None,
        lr_scale: float,
    ) -> None:
        """Makes the updates of a minibatch; the first one reuses the forward pass.

        The gradient is that of the mean over samples. Peer normalization adds a pull towards the mean activity of the
        layer to the positive pass, which reaches inactive units, too.
        """
        passes, batch = trained.shape[:2]
        inputs = inputs[: passes * batch]
        turns = [slice(0, 1), slice(1, passes)] if self.rule.alternating else [slice(0, passes)]
        for number, turn in enumerate(turns * self.rule.updates_per_minibatch):
            if number:
                activations = self.compute_for_training(inputs)
                trained = activations.detach().view_as(trained)
                squares = squared_norm(trained)
                direction = self.objective(trained, squares, self.objective.scores(trained, squares), labels).direction
            part = direction[turn]
            if self.masks_gradients and not self.objective.is_zero_where_inactive:
                part = part * (trained[turn] != 0)
            if turn.start == 0:
                self.mean_activity.lerp_(trained[0].mean(0), 1 - MEAN_ACTIVITY_MOMENTUM)
                strength = self.rule.peer_strength / batch
                part[0] += strength * (self.mean_activity.mean() - self.mean_activity)
            rows = slice(turn.start * batch, turn.stop * batch)
            self.update_parameters(self.gradients(part.flatten(0, 1), inputs, activations, rows), lr_scale)
