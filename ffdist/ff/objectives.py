"""Objectives: the loss of a layer, computed from its activations, and the scores that predictions are made from.

Shapes: `T` passes that are trained on, the positive one first, `B` samples, `H` units, `C` classes, `F` features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffdist.ff.custom import find_class
from ffdist.ff.forms import Form
from ffdist.ff.goodness import GOODNESS, MINUS, TINY, normalize, squared_norm
from ffdist.ff.losses import LOSSES
from ffdist.ff.optimizers import LAYER_UPDATE, Update
from ffdist.ff.terms import TERMS, Contrast


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
    """A key of `OBJECTIVES`, or a subclass of `Objective` of the user, `package.module:Class`."""
    class_scores: str = "learned"
    """How features become class scores: `learned`, a linear map, or `groups`, the mean over a group of units."""
    pooled_features: int = 2048
    """Largest number of features that a learned map of class scores reads; maps are average-pooled to as many."""
    label_smoothing: float = 0.0
    """Probability that the target of class scores spreads evenly over all classes, in [0, 1)."""
    similarity: float = 0.0
    """Weight of the loss `Similarity`, which is added to the objective."""
    contrast: float = 0.0
    """Weight of the loss `Contrast`, which is added to the objective."""
    executor: str = "eager"
    """`eager`: torch's operations; `fused`: kernels that do several of them at once, for layers and devices that have
    them. It affects the last bits of results."""
    may_import: bool = field(default=False, compare=False)
    """Whether the objective may be imported, because the configuration is the user's own."""

    @property
    def terms(self) -> dict[str, float]:
        """Weights of the losses that are added to the objective, by key of `TERMS`."""
        return {name: weight for name in TERMS if (weight := getattr(self, name))}


RELEASE = Rule()
"""The learning rule of the paper's released code."""


class Loss(NamedTuple):
    """The loss of a minibatch."""

    metrics: tuple[Tensor, ...]
    """Values of `Objective.metrics`, scalars."""
    direction: Callable[[slice], Tensor]
    """Returns minus the gradient of the mean loss over samples with respect to the activations of some of the passes
    `[t, B, H]`, as a new tensor."""
    parameters: Mapping[str, Tensor] = MappingProxyType({})
    """Minus the gradient of the mean loss with respect to each parameter of the objective, by name."""
    is_masked: bool = True
    """Whether the direction is 0 where an activation is 0, as behind a ReLU."""
    pull: Tensor | None = None
    """Factor of each row `[T, B]`, if the direction is the product of activations and these; otherwise None."""


class PooledLoss(NamedTuple):
    """The loss of a minibatch, computed from pooled activations and squares of activations."""

    scores: Tensor
    """Score of each class `[B, C]`."""
    metrics: tuple[Tensor, ...]
    """Values of `Objective.metrics` and the losses of the terms, scalars."""
    parameters: Mapping[str, Tensor]
    """Minus the gradient with respect to each parameter of the objective, by name."""
    of_values: Tensor
    """Minus the gradient with respect to the pooled activations `[B, F]`."""
    of_squares: Tensor
    """Minus the gradient with respect to the pooled squares `[B, F]`."""


class Objective(nn.Module, ABC):
    """The local loss of a layer. Its parameters, if it has any, belong to the layer.

    Its methods must not wait for the device (such as `.item()`), because they are captured in a CUDA graph.

    Args:
        rule: The learning rule.
        threshold: Threshold of the layer; None for its number of units.
        form: Form of the layer's output.
        classes: Number of classes C.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of the metrics of a minibatch."""
    needs_labels: ClassVar[bool] = False
    """Whether it needs the true labels."""
    needs_negatives: ClassVar[bool] = True
    """Whether it contrasts samples with negatives. Without them, there is one pass, and no label is shown."""
    scores_classes: ClassVar[bool] = False
    """Whether it scores every class in one pass, so that no label has to be tried."""

    def __init__(self, rule: Rule, threshold: float | None, form: Form, classes: int) -> None:
        super().__init__()
        self.rule, self.form, self.classes = rule, form, classes
        self.terms = nn.ModuleDict()

    def add_terms(self, compute_dtype: torch.dtype, generator: torch.Generator | None) -> None:
        """Adds the losses of `Rule.terms`; for the arguments see `Term`."""
        for name in self.rule.terms:
            self.terms[name] = TERMS[name](
                self.form,
                self.classes,
                pooled_features=self.rule.pooled_features,
                compute_dtype=compute_dtype,
                generator=generator,
            )

    @property
    def num_units(self) -> int:
        """Number of outputs of the layer H."""
        return self.form.size

    @classmethod
    def validate(cls, rule: Rule, form: Form, classes: int) -> None:
        """Checks that a layer with an output form can have this objective.

        Raises:
            ValueError: It cannot; the message states the rule.
        """

    @abstractmethod
    def scores(self, activations: Tensor, squares: Tensor) -> Tensor:
        """Returns a score of each row `[...]`, or of each class `[..., C]`, float32.

        The label with the greatest sum of scores over layers is predicted.

        Args:
            activations: `[..., H]`.
            squares: Sum of the squared activations `[...]`.
        """

    @abstractmethod
    def loss_of(self, activations: Tensor, scores: Tensor, labels: Tensor | None) -> Loss:
        """Returns the loss of a minibatch.

        Args:
            activations: Activations of the passes that are trained on `[T, B, H]`; not modified.
            scores: Their scores `[T, B]` or `[T, B, C]`.
            labels: True labels `[B]`, or None if it does not need them.
        """

    def loss_with_terms(self, activations: Tensor, scores: Tensor, labels: Tensor | None) -> Loss:
        """Returns the loss of a minibatch and of the terms, whose losses are further metrics."""
        loss = self.loss_of(activations, scores, labels)
        if not self.terms:
            return loss
        values, gradient, parameters = self._loss_of_terms(activations[0], lambda term: term, labels)

        def direction(passes: slice) -> Tensor:
            direction = loss.direction(passes)
            if passes.start == 0:
                direction[0] += gradient
            return direction

        return Loss((*loss.metrics, *values), direction, {**loss.parameters, **parameters}, is_masked=False)

    def _loss_of_terms(
        self, inputs: Tensor, function: Callable[[Any], Callable[..., Tensor]], labels: Tensor | None
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Returns the losses of the terms, and minus the gradients with respect to their inputs and parameters.

        Args:
            inputs: What the terms read of the positive rows `[B, ...]`.
            function: Returns the function of a term that computes the loss from these and from labels.
            labels: True labels `[B]`.
        """
        values: list[Tensor] = []

        def added(leaf: Tensor) -> Tensor:
            values.extend(function(term)(leaf, labels) for term in self.terms.values())
            weights = self.rule.terms.values()
            return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()

        _, gradient, parameters = _differentiate(self.terms, added, inputs)
        return [each.detach() for each in values], gradient, {f"terms.{name}": e for name, e in parameters.items()}


class AutogradObjective(Objective):
    """An objective whose gradient, also that of its parameters, is computed by autograd."""

    @abstractmethod
    def loss(self, activations: Tensor, labels: Tensor | None) -> Tensor:
        """Returns the mean loss over samples, a scalar, from activations `[T, B, H]` and true labels `[B]`."""

    def loss_of(self, activations: Tensor, scores: Tensor, labels: Tensor | None) -> Loss:
        """Returns the loss of a minibatch."""
        loss, gradient, parameters = _differentiate(self, lambda leaf: self.loss(leaf, labels), activations)
        return Loss((loss,), lambda passes: gradient[passes].clone(), parameters, is_masked=False)


def _differentiate(
    module: nn.Module, function: Callable[[Tensor], Tensor], activations: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns a loss, and minus its gradients with respect to activations and to the parameters of a module."""
    leaf, named = activations.detach().requires_grad_(), dict(module.named_parameters())
    module.requires_grad_()
    with torch.enable_grad():
        loss = function(leaf)
        gradient, *others = torch.autograd.grad(loss, [leaf, *named.values()], materialize_grads=True)
    module.requires_grad_(False)
    return loss.detach(), -gradient, {name: -each for name, each in zip(named, others, strict=True)}


class GoodnessObjective(Objective):
    """High goodness of positive rows and low goodness of negative rows (Hinton 2022, section 2), in closed form.

    Its gradient is half of the derivative of the loss, as in the paper's released code, where the factor 2 of the
    square is part of the learning rate.
    """

    metrics = ("loss", "goodness_positive", "goodness_negative", "pairwise_error")

    def __init__(self, rule: Rule, threshold: float | None, form: Form, classes: int) -> None:
        super().__init__(rule, threshold, form, classes)
        self.threshold = signed_threshold(rule, threshold, form.size)
        self._goodness = GOODNESS[rule.goodness.removeprefix(MINUS)]
        self._is_minus, self._loss = rule.goodness.startswith(MINUS), LOSSES[rule.loss]

    def scores(self, activations: Tensor, squares: Tensor) -> Tensor:
        """Returns the goodness of each row."""
        goodness = self._goodness.value(activations, squares)
        return -goodness if self._is_minus else goodness

    def loss_of(self, activations: Tensor, scores: Tensor, labels: Tensor | None) -> Loss:
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

        factor = self._slope_factor
        metrics = loss, positive.mean(), negative.mean(), pairwise_error
        return Loss(metrics, direction, pull=None if factor is None else factor * pull)

    @property
    def is_linear(self) -> bool:
        """Whether the direction is the product of activations and a factor of each row."""
        return self._slope_factor is not None

    @property
    def _slope_factor(self) -> float | None:
        factor = self._goodness.slope_factor and self._goodness.slope_factor(self.num_units)
        return -factor if factor and self._is_minus else factor


class Classifier(Objective):
    """Softmax cross-entropy between class scores of the layer and the true label, in one pass without negatives.

    The features are the layer's normalized activations; maps are average-pooled. A linear map, which belongs to the
    layer and is 0 initially, turns them into class scores. With `Rule.class_scores` of `groups`, each class has a group
    of units, and its score is the mean of their features, times a learned factor.
    """

    metrics = ("loss", "class_error", "score_true", "score_wrong")
    needs_labels = True
    needs_negatives = False
    scores_classes = True
    reads_squares: ClassVar[bool] = False
    """Whether the features are squares of activations."""

    def __init__(self, rule: Rule, threshold: float | None, form: Form, classes: int) -> None:
        super().__init__(rule, threshold, form, classes)
        self._channels = _num_channels(form)
        self._group_size = self._channels // classes
        if rule.class_scores == "groups":
            self.factor = nn.Parameter(torch.ones(()), requires_grad=False)
        else:
            self.pooled = form.pooled(rule.pooled_features)
            self.weight = nn.Parameter(torch.zeros(classes, self.pooled.size), requires_grad=False)
            self.bias = nn.Parameter(torch.zeros(classes), requires_grad=False)

    @classmethod
    def validate(cls, rule: Rule, form: Form, classes: int) -> None:
        """Checks that each class gets a group of units."""
        if rule.class_scores == "groups" and _num_channels(form) < classes:
            raise ValueError(
                f"class_scores=groups needs a unit or channel of each layer for each of the {classes} classes (a layer "
                f"has {_num_channels(form)}); add some, or set training.class_scores to learned"
            )

    def transform(self, normalized: Tensor) -> Tensor:
        """Returns the values that are pooled, from normalized activations: the same."""
        return normalized

    def transform_gradient(self, normalized: Tensor, gradient: Tensor) -> Tensor:
        """Returns the gradient with respect to normalized activations, from that with respect to `transform`."""
        return gradient

    def features(self, normalized: Tensor) -> Tensor:
        """Returns the features `[..., F]` of normalized activations `[..., H]`."""
        values = self.transform(normalized)
        if self.rule.class_scores != "groups":
            return self.form.pool(values, self.pooled)
        maps = self.form.values(values.flatten(0, -2)).flatten(2) if self.form.is_map else values.unsqueeze(-1)
        by_unit = maps.reshape(*values.shape[:-1], self._channels, -1).mean(-1)
        groups = by_unit[..., : self._group_size * self.classes]  # units that are left over belong to no class
        return groups.reshape(*by_unit.shape[:-1], self.classes, -1).mean(-1)

    def scores(self, activations: Tensor, squares: Tensor) -> Tensor:
        """Returns the logarithm of the probability of each class `[..., C]`."""
        return self.scores_from(self.features(normalize(self.rule.normalization, activations, squares)))

    def scores_from(self, features: Tensor) -> Tensor:
        """Returns the logarithm of the probability of each class `[..., C]`, from features `[..., F]`."""
        is_learned = self.rule.class_scores != "groups"
        logits = F.linear(features, self.weight, self.bias) if is_learned else self.factor * features
        return logits.log_softmax(-1)

    def loss_of(self, activations: Tensor, scores: Tensor, labels: Tensor | None) -> Loss:
        """Returns the loss of a minibatch, with its gradient in closed form."""
        assert labels is not None, "it needs labels"
        normalized = normalize(self.rule.normalization, activations[0], squared_norm(activations[0]))
        metrics, pull, parameters = self.loss_from(self.features(normalized), scores[0], labels)

        def direction(passes: slice) -> Tensor:
            gradient = self.transform_gradient(normalized, self._spread(pull))
            return self._through_normalization(activations[0], normalized, gradient)[None][passes]

        return Loss(metrics, direction, parameters, is_masked=False)

    def loss_from(
        self, features: Tensor, log_probability: Tensor, labels: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, dict[str, Tensor]]:
        """Returns the values of `metrics`, and minus the gradient with respect to the logits and to the parameters.

        Args:
            features: `[B, F]`.
            log_probability: Logarithm of the probability of each class `[B, C]`.
            labels: True labels `[B]`.
        """
        smoothing = self.rule.label_smoothing
        target = F.one_hot(labels, self.classes).to(log_probability.dtype) * (1 - smoothing) + smoothing / self.classes
        loss, index = -(target * log_probability).sum(1).mean(), labels.unsqueeze(1)
        pull = (target - log_probability.exp()) / len(labels)
        if self.rule.class_scores == "groups":
            parameters = {"factor": (pull * features).sum()}
        else:
            parameters = {"weight": pull.t() @ features, "bias": pull.sum(0)}
        metrics = (
            loss,
            (log_probability.argmax(1) != labels).float().mean(),
            log_probability.gather(1, index).mean(),
            log_probability.scatter(1, index, -torch.inf).amax(1).mean(),
        )
        return metrics, pull, parameters

    @property
    def is_pooled(self) -> bool:
        """Whether `pooled_loss` can compute the loss; subclasses may compute something else."""
        is_plain, is_learned = type(self) in (Classifier, ClassGoodness), self.rule.class_scores == "learned"
        reads_pooled = all(isinstance(term, Contrast) for term in self.terms.values())
        return is_plain and is_learned and reads_pooled and self.rule.normalization == "none" and self.form.is_map

    def pooled_loss(self, values: Tensor, squares: Tensor, labels: Tensor) -> PooledLoss:
        """Returns what `loss_with_terms` does.

        Args:
            values: Average-pooled activations `[B, F]`.
            squares: Average-pooled squares of activations `[B, F]`.
            labels: True labels `[B]`.
        """
        features = squares if self.reads_squares else values
        scores = self.scores_from(features)
        metrics, pull, parameters = self.loss_from(features, scores, labels)
        gradient, nothing = pull @ self.weight, torch.zeros_like(values)
        of_values, of_squares = (nothing, gradient) if self.reads_squares else (gradient, nothing)
        if self.terms:
            of_terms, added, others = self._loss_of_terms(values, lambda term: term.loss_of_pooled, labels)
            metrics, parameters, of_values = (*metrics, *of_terms), {**parameters, **others}, of_values + added
        return PooledLoss(scores, metrics, parameters, of_values, of_squares)

    def _spread(self, pull: Tensor) -> Tensor:
        """Returns the gradient with respect to `transform` `[B, H]`, from that with respect to the logits `[B, C]`."""
        if self.rule.class_scores != "groups":
            return self.form.unpool(pull @ self.weight, self.pooled)
        channels, size = self._channels, self._group_size
        num_places = self.form.size // channels
        by_channel = pull.repeat_interleave(size, 1) * (self.factor / (size * num_places))
        by_channel = F.pad(by_channel, (0, channels - by_channel.shape[1]))
        return self.form.unpool(by_channel * num_places, Form((channels, 1, 1))) if self.form.is_map else by_channel

    def _through_normalization(self, activations: Tensor, normalized: Tensor, gradient: Tensor) -> Tensor:
        """Returns the gradient with respect to activations `[B, H]`, from that with respect to normalized ones."""
        if self.rule.normalization == "none":
            return gradient
        count = activations.shape[-1] if self.rule.normalization == "rms" else 1
        scale = torch.rsqrt(squared_norm(activations) / count + TINY).unsqueeze(-1)
        along = (gradient * normalized).sum(-1, keepdim=True) / count
        return scale * (gradient - normalized * along)


def _num_channels(form: Form) -> int:
    """Returns the number of units that are divided into groups; each channel of a map is one."""
    return form.shape[0] if form.is_map else form.size


class ClassGoodness(Classifier):
    """The same, with the squares of the normalized activations as features: a goodness for each class.

    Every wrong class is a negative of the true one.
    """

    reads_squares = True

    def transform(self, normalized: Tensor) -> Tensor:
        """Returns the squares."""
        return normalized.square()

    def transform_gradient(self, normalized: Tensor, gradient: Tensor) -> Tensor:
        """Returns the gradient with respect to normalized activations."""
        return gradient.mul_(normalized).mul_(2)


OBJECTIVES: dict[str, type[Objective]] = {
    "goodness": GoodnessObjective,
    "class_goodness": ClassGoodness,
    "classifier": Classifier,
}
"""Objectives, by the name in `training.objective`."""


def find_objective(rule: Rule) -> type[Objective]:
    """Returns the objective of a learning rule.

    Raises:
        ValueError: There is none, or it cannot be imported.
    """
    if ":" not in rule.objective:
        if rule.objective in OBJECTIVES:
            return OBJECTIVES[rule.objective]
        raise ValueError(
            f"training.objective must be one of {', '.join(OBJECTIVES)}, or package.module:Class (given: "
            f"{rule.objective})"
        )
    try:
        return find_class(rule.objective, Objective, may_import=rule.may_import)
    except Exception as error:  # a custom module may raise anything
        raise ValueError(
            f"training.objective={rule.objective} cannot be used ({type(error).__name__}: {error})"
        ) from error


def num_parameters(rule: Rule, form: Form, classes: int) -> int:
    """Returns the number of learned values of an objective and of the losses that are added to it."""
    with torch.device("meta"):
        objective = find_objective(rule)(rule, None, form, classes)
        objective.add_terms(torch.float32, None)
    return sum(parameter.numel() for parameter in objective.parameters())


def signed_threshold(rule: Rule, threshold: float | None, num_units: int) -> float:
    """Returns the threshold of a layer, with the sign of its goodness; None is the number of units."""
    size = float(num_units) if threshold is None else threshold
    return -size if rule.goodness.startswith(MINUS) else size
