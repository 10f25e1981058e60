"""The interface of layers that train on their own loss. Each kind of layer has a file of its own.

Shapes: `P` passes, `T` passes that are trained on, `B` samples of a minibatch, `R` rows, `D` inputs, `H` units.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ffdist.ff.forms import Form
from ffdist.ff.goodness import normalize, squared_norm
from ffdist.ff.labels import Rows, join
from ffdist.ff.objectives import RELEASE, Loss, Rule, find_objective
from ffdist.ff.optimizers import Learner

MEASURED = ("active_fraction", "weight_rms")
"""The last metrics of every layer. They read all activations or weights, so they are only measured now and then."""
OBJECTIVE = "objective."
"""Prefix of the names of the parameters that an objective has."""
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
    def readout(self) -> int:
        """The pass that the readout reads."""
        return self.num_trained if self.has_neutral else 0

    @property
    def others(self) -> slice:
        """All passes except the one that the readout reads."""
        return slice(0, self.num_trained) if self.has_neutral else slice(1, None)

    def join(self, others: Tensor, readout: Tensor) -> Tensor:
        """Returns all passes `[P, B, ...]` from the one that the readout reads `[B, ...]` and the others."""
        parts = (others, readout.unsqueeze(0))
        return torch.cat(parts if self.has_neutral else parts[::-1])


class Minibatch(NamedTuple):
    """The inputs of a layer for one minibatch."""

    rows: Rows
    """Rows `[P, B, D]`, of the layer's compute type. A neutral pass is not trained on."""
    passes: Passes = Passes()
    labels: Tensor | None = None
    """True labels `[B]`, int64, if the objective needs them."""
    noise: Tensor | None = None
    """Result of `Layer.draw`, if the layer draws random numbers."""


class Output(NamedTuple):
    """The output of a layer."""

    activations: Tensor
    """Normalized activations `[..., H]`, of the layer's compute type."""
    scores: Tensor
    """Scores of the objective, float32: of a row `[...]`, such as its goodness, or of each class `[..., C]`."""


class Layer(Learner, ABC):
    """A layer that trains on its own loss.

    A kind of layer creates its parameters in `__init__` and computes its output in `compute`. All parameters are
    trained; constants are buffers. The gradient is computed by autograd, within the layer, unless the kind overrides
    `compute_for_training` and `gradients`. `compute` must not wait for the device (such as `.item()`), because it is
    captured in a CUDA graph, and must not draw random numbers, because they would depend on the process.

    Args:
        form: Form of the output, with H values.
        rule: The learning rule.
        threshold: Goodness, before any minus, at which a row is as likely positive as negative; None for the number of
            units.
        classes: Number of classes C.
        compute_dtype: Type of input and output rows and of matrix products. Parameters, activations, goodness and
            updates are float32.
        objective_generator: Source of the initial weights of the losses that are added to the objective, or None if
            they are loaded.
    """

    is_relu: ClassVar[bool] = False
    """Whether `gradients` needs a direction that is 0 where an activation is 0."""

    def __init__(
        self,
        form: Form,
        *,
        rule: Rule = RELEASE,
        threshold: float | None = None,
        classes: int = 2,
        compute_dtype: torch.dtype = torch.float32,
        objective_generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rule.update)
        self.rule, self.compute_dtype = rule, compute_dtype
        self.objective = find_objective(rule)(rule, threshold, form, classes)
        self.objective.add_terms(compute_dtype, objective_generator)
        self.statistics.register_buffer("mean_activity", torch.full((form.size,), INITIAL_MEAN_ACTIVITY))

    @abstractmethod
    def compute(self, inputs: Tensor) -> Tensor:
        """Returns the activations `[R, H]`, float32 or wider.

        Args:
            inputs: Result of `prepare`: by default, rows `[R, D]` of the compute type.
        """

    def arrange(self, rows: Tensor) -> Tensor:
        """Arranges rows `[R, D]` for `compute` and `gradients`, `[R, ...]`. By default, it returns them."""
        return rows

    def prepare(self, rows: Rows) -> Any:
        """Returns the inputs of `compute` and `gradients` for rows `[..., D]`: by default, the result of `arrange`."""
        return self.arrange(join(rows, self.compute_dtype).reshape(-1, rows.shape[-1]))

    def compute_for_training(self, inputs: Tensor, batch: int, noise: Tensor | None) -> Tensor:
        """Returns the activations, with their graph. Submodules, such as batch norm, are in training mode.

        Args:
            inputs: Result of `prepare`.
            batch: Number of samples B; so many rows, the first ones, are positive.
            noise: Result of `draw`, if there is one.
        """
        self.requires_grad_().train()
        with torch.enable_grad():
            activations = self.compute(inputs)
        self.eval()
        return activations

    def gradients(self, direction: Tensor, inputs: Tensor, activations: Tensor, passes: slice) -> Mapping[str, Tensor]:
        """Returns the gradient of each parameter, by name.

        Args:
            direction: Minus the gradient of the loss with respect to the activations of these passes `[t, B, H]`.
            inputs: Result of `prepare`.
            activations: Result of `compute_for_training`.
            passes: The passes that `direction` is for.
        """
        if not activations.requires_grad:  # there are no parameters
            return {}
        weights = direction.flatten(0, 1)
        if weights.shape != activations.shape:
            batch, weights = direction.shape[1], torch.zeros_like(activations)
            weights[passes.start * batch : passes.stop * batch] = direction.flatten(0, 1)
        named = dict(self._own_parameters())
        gradients = torch.autograd.grad(activations, [*named.values()], weights, materialize_grads=True)
        self.requires_grad_(False)
        return dict(zip(named, gradients, strict=True))

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the name of each parameter, and the parameter, without those of the objective."""
        return ((name, each) for name, each in self.named_parameters() if not name.startswith(OBJECTIVE))

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
        return (*self.objective.metrics, *self.rule.terms, *MEASURED)

    def forward_for_training(self, rows: Rows, noise: Tensor | None) -> Output:
        """Returns the output for the positive rows `[B, D]` of a minibatch, with its graph, for backpropagation."""
        return self._output(self.compute_for_training(self.prepare(rows), rows.shape[0], noise), noise)

    def forward(self, rows: Rows) -> Output:
        """Returns the output for rows `[..., D]` of the compute type."""
        activations = self.compute(self.prepare(rows))
        return self._output(activations.reshape(*rows.shape[:-1], -1))

    def _output(self, activations: Tensor, noise: Tensor | None = None) -> Output:
        squares, passed = squared_norm(activations), self.pass_on(activations, noise)
        squares_passed = squares if passed is activations else squared_norm(passed)
        normalized = normalize(self.rule.normalization, passed, squares_passed)
        return Output(normalized.to(self.compute_dtype), self.objective.scores(activations, squares))

    def pass_on(self, activations: Tensor, noise: Tensor | None) -> Tensor:
        """Returns what is passed on of activations `[..., H]`, before its normalization; by default, all.

        Args:
            activations: `[..., H]`, in training `[P, B, H]` or `[B, H]`.
            noise: In training, the result of `draw`.
        """
        return activations

    @property
    def draws(self) -> bool:
        """Whether training minibatches need random numbers."""
        return False

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draws the random numbers for a training minibatch `[B, ...]`. They do not depend on the weights."""
        raise NotImplementedError

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
            The output, activations `[P, B, H]` and scores `[P, B, ...]`, computed with the weights before the update;
            and the values of `metrics`, float32, with NaN for those that were not measured.
        """
        rows, num_trained, labels = minibatch.rows, minibatch.passes.num_trained, minibatch.labels
        inputs = self.prepare(rows)
        batch, noise = rows.shape[1], minibatch.noise
        activations = self.compute(inputs) if lr_scale is None else self.compute_for_training(inputs, batch, noise)
        values = activations.detach().reshape(*rows.shape[:2], -1)
        output, trained = self._output(values, noise), values[:num_trained]
        loss = self.objective.loss_with_terms(trained, output.scores[:num_trained], labels)
        metrics = self._metric_values(loss.metrics, trained, measure)
        if lr_scale is not None:
            self._learn(minibatch, inputs, activations, trained, loss, lr_scale)
        return output, metrics

    def _metric_values(self, values: Sequence[Tensor], trained: Tensor, measure: bool) -> Tensor:
        """Returns the values of `metrics`.

        Args:
            values: Those of the loss.
            trained: Activations of the trained passes `[..., H]`, which are read if `measure`.
            measure: Whether to compute MEASURED.
        """
        unmeasured = values[0].new_full((), torch.nan)
        measured = (
            (trained != 0).to(torch.float32).mean() if measure else unmeasured,
            self._weight_rms() if measure else unmeasured,
        )
        return torch.stack((*values, *measured)).float()

    def _weight_rms(self) -> Tensor:
        """Returns the root mean square of the layer's own parameters with at least two dimensions; NaN without any."""
        weights = [parameter for _, parameter in self._own_parameters() if parameter.dim() > 1]
        count = sum(weight.numel() for weight in weights)
        means = [weight.square().mean() * (weight.numel() / count) for weight in weights]
        return torch.stack(means).sum().sqrt() if means else self.mean_activity.new_full((), torch.nan)

    def _peer_direction(self, activity: Tensor, batch: int) -> Tensor:
        """Updates the mean activity by that of a minibatch `[H]`; returns the pull on each positive row `[H]`."""
        self.mean_activity.lerp_(activity, 1 - MEAN_ACTIVITY_MOMENTUM)
        return self.rule.peer_strength / batch * (self.mean_activity.mean() - self.mean_activity)

    def _learn(
        self,
        minibatch: Minibatch,
        inputs: Any,
        activations: Tensor,
        trained: Tensor,
        loss: Loss,
        lr_scale: float,
    ) -> None:
        """Makes the updates of a minibatch; the first one reuses the forward pass.

        The gradient is that of the mean over samples. Peer normalization adds a pull towards the mean activity of the
        layer to the positive pass. It reaches inactive units in layers whose gradient is in closed form.
        """
        (num_passes, batch), labels = trained.shape[:2], minibatch.labels
        parts = [slice(0, 1), slice(1, num_passes)] if self.rule.alternating else [slice(0, num_passes)]
        for number, part in enumerate(parts * self.rule.updates_per_minibatch):
            if number:
                inputs = self.prepare(minibatch.rows[:num_passes]) if number == 1 else inputs
                activations = self.compute_for_training(inputs, batch, minibatch.noise)
                trained = activations.detach().view_as(trained)
                loss = self.objective.loss_with_terms(
                    trained, self.objective.scores(trained, squared_norm(trained)), labels
                )
            direction = loss.direction(part)
            if self.is_relu and not loss.is_masked:
                direction.mul_(trained[part] != 0)
            if part.start == 0 and self.rule.peer_strength:
                direction[0] += self._peer_direction(trained[0].mean(0), batch)
            gradients = dict(self.gradients(direction, inputs, activations, part))
            if part.start == 0:
                gradients |= {f"{OBJECTIVE}{name}": gradient for name, gradient in loss.parameters.items()}
            self.update_parameters(gradients, lr_scale)
