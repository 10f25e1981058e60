"""Builds the architecture of a network from a configuration, and validates it before a run starts."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from ffdist.config.schema import Config
from ffdist.config.sections import Data
from ffdist.errors import ConfigError
from ffdist.ff.architecture import Architecture
from ffdist.ff.encoders import ENCODERS, Encoder
from ffdist.ff.objectives import Rule, find_objective
from ffdist.ff.optimizers import Update

IMAGE_SETTINGS = (
    *("color", "crop", "cutout", "flip", "image_column", "image_size", "jitter", "standardize", "subtract_mean"),
)
"""Settings of the section `data` that only images have."""


def build_encoder(config: Data, kind: str, shape: Sequence[int], classes: int, **settings: Any) -> Encoder:
    """Returns the encoder of a dataset.

    Args:
        config: Section `data` of the configuration.
        kind: A key of `ENCODERS`.
        shape: Shape of a sample.
        classes: Number of classes.
        **settings: Settings of the encoder that do not come from the configuration.

    Raises:
        ConfigError: The settings do not fit the samples.
    """
    names = {field.name for field in fields(ENCODERS[kind])} & Data.model_fields.keys() - {"classes"}
    for name in IMAGE_SETTINGS if kind != "image" else ():
        if name not in names and getattr(config, name) != Data.model_fields[name].default:
            raise ConfigError(f"data.{name} is for images (the samples are of kind {kind}); leave it out")
    settings |= {name: getattr(config, name) for name in names}
    if settings["label"] == "auto":
        settings["label"] = ENCODERS[kind].label
    if settings.get("subtract_mean") == "auto":
        settings["subtract_mean"] = shape[0] > 1 and not settings["standardize"]
    try:
        return ENCODERS[kind](shape=tuple(shape), classes=classes, **settings)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_architecture(
    config: Config, encoder: Encoder, untrained: Sequence[int] = (), *, may_import: bool = False
) -> Architecture:
    """Returns the architecture that a configuration describes.

    Args:
        config: The configuration.
        encoder: Encoder of the samples.
        untrained: Classes without training samples.
        may_import: Whether the configuration is the user's own, so that modules in `model.layers` may be imported.

    Raises:
        ConfigError: The layers do not fit together, or the label cannot be embedded in their input.
    """
    model, training = config.model, config.training
    try:
        rule = _build_rule(config, may_import=may_import)
        objective = model.layers[0].rule(rule).objective  # those of the other layers need the same
        needs_negatives = find_objective(replace(rule, objective=objective)).needs_negatives
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if needs_negatives == (config.negatives.kind == "none") or not (needs_negatives or encoder.label == "none"):
        raise ConfigError(
            f"training.objective={objective} needs {'' if needs_negatives else 'no '}negatives"
            f"{'' if needs_negatives else ' and shows no label'} (negatives.kind: {config.negatives.kind}, data.label: "
            f"{encoder.label}); correct these settings"
        )
    if not needs_negatives and training.updates == "alternating":
        raise ConfigError(
            f"training.updates=alternating is for negatives, and training.objective={objective} has none; leave it out"
        )
    try:
        architecture = Architecture(
            encoder,
            tuple(layer.with_imports() if may_import else layer for layer in model.layers),
            predict_from=config.predict_from,
            predict_to=model.predict_to,
            readout_kind=model.readout,
            seed=config.seed,
            rule=rule,
            thresholds=config.thresholds,
            readout_update=Update(training.readout_learning_rate, training.readout_weight_decay, training.momentum),
            precision="float32" if training.precision == "auto" else training.precision,  # `auto` is resolved later
            untrained=tuple(untrained),
        )
    except ValueError as error:
        raise ConfigError(f"model.layers and data.label must fit together: {error}") from error
    if config.chooses_layers and not architecture.goodness_predicts:
        raise ConfigError(
            f"model.predict_from=auto needs layers that predict the label (training.objective: {training.objective}, "
            f"data.label: {encoder.label}); leave it out, or show a label"
        )
    return architecture


def _build_rule(config: Config, *, may_import: bool) -> Rule:
    """Returns the learning rule of the layers."""
    model, training = config.model, config.training
    return Rule(
        objective=training.objective,
        may_import=may_import,
        class_scores=training.class_scores,
        pooled_features=training.pooled_features,
        label_smoothing=training.label_smoothing,
        similarity=training.similarity,
        contrast=training.contrast,
        goodness=model.goodness,
        normalization=model.normalization,
        loss=training.loss,
        alpha=training.alpha,
        alternating=training.updates == "alternating",
        updates_per_minibatch=training.updates_per_minibatch,
        peer_strength=training.peer_normalization,
        executor=config.pipeline.executor,
        update=Update(
            training.learning_rate, training.weight_decay, training.momentum, training.optimizer, training.clip_norm
        ),
    )
