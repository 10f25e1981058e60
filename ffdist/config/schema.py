"""The schema of a configuration: typed sections, validated before a run starts."""

import re
from dataclasses import replace
from functools import reduce
from operator import getitem
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from ffdist.config.sections import (
    Checkpoint,
    Data,
    Model,
    Negatives,
    Pipeline,
    Reference,
    Section,
    Tracking,
    Training,
)
from ffdist.config.values import Number

NEUTRAL_SETTINGS = (
    *("pipeline.", "tracking.", "checkpoint.", "reference.", "data.root"),
    *("negatives.actors", "negatives.prefetch_chunks", "negatives.store"),
)
"""Prefixes of the settings that do not affect the weights."""

CLASS_OBJECTIVES = ("class_goodness", "classifier")
"""Values of `training.objective` that classify samples in one pass, without negatives."""

FLOAT = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
"""Floats such as 5e-1, .5e1 and 1e5, which YAML 1.1 reads as strings."""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that match `FLOAT`."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


class Config(Section):
    """The configuration of a run."""

    seed: Annotated[int, Number, Field(ge=0, lt=2**63)] = 0
    """Seed of all random draws of the run, in [0, 2**63)."""
    data: Data
    model: Model
    negatives: Negatives = Negatives()
    training: Training = Training()
    pipeline: Pipeline = Pipeline()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    reference: Reference = Reference()

    @model_validator(mode="before")
    @classmethod
    def _set_defaults(cls, tree: Any) -> Any:
        """Sets the defaults of objectives without negatives: none, no label in the input, no peer normalization."""
        if not isinstance(tree, dict):
            return tree
        training, data, negatives = sections = [tree.get(name) or {} for name in ("training", "data", "negatives")]
        is_valid = all(isinstance(section, dict) for section in sections)
        if not is_valid or training.get("objective") not in CLASS_OBJECTIVES:
            return tree
        shown = {"label": "none"} if data.get("label", "auto") == "auto" else {}
        training = {"peer_normalization": 0.0} | training  # its pull would be stronger than that of the objective
        return tree | {"training": training, "data": data | shown, "negatives": {"kind": "none"} | negatives}

    @model_validator(mode="after")
    def _check_negatives(self) -> "Config":
        objective, kind, label = self.training.objective, self.negatives.kind, self.data.label
        if objective not in CLASS_OBJECTIVES:
            if kind == "none" and objective == "goodness":
                raise ValueError(f"training.objective={objective} needs negatives; set negatives.kind to another kind")
            return self
        if kind != "none" or label != "none":
            raise ValueError(
                f"training.objective={objective} needs no negatives and shows no label (negatives.kind: {kind}, "
                f"data.label: {label}); set both to none"
            )
        if self.training.updates == "alternating":
            raise ValueError(f"training.updates=alternating is for negatives, and {objective} has none; leave it out")
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> "Config":
        stages, layers = self.pipeline.stages, len(self.model.layers)
        if stages != "auto" and stages > layers:
            raise ValueError(
                f"every stage needs a layer (stages: {stages}, layers: {layers}); "
                f"set pipeline.stages between 1 and {layers}, or to auto"
            )
        sizes = self.pipeline.balance
        if isinstance(sizes, list) and (sum(sizes) != layers or stages not in ("auto", len(sizes))):
            raise ValueError(
                f"pipeline.balance must divide the {layers} layers among the stages (given: {sizes}, {sum(sizes)} "
                f"layers in {len(sizes)} stages; pipeline.stages: {stages}); correct it, or set it to measured"
            )
        return self

    @model_validator(mode="after")
    def _check_readout(self) -> "Config":
        kind, metric = self.negatives.kind, self.training.stop.metric
        if self.model.readout == "none" and (kind == "hard_label" or metric == "readout_error"):
            raise ValueError(
                f"model.readout=none predicts no labels for negatives.kind=hard_label and training.stop.metric="
                f"readout_error (negatives.kind: {kind}, training.stop.metric: {metric}); set them to other values, or "
                f"model.readout to joint or per_layer"
            )
        return self

    @property
    def predict_from(self) -> int:
        """First layer, counted from 1, that the readout reads, and that predicts unless the layers are chosen."""
        first = self.model.predict_from
        return first if isinstance(first, int) else min(2, self.model.predict_to or len(self.model.layers))

    @property
    def chooses_layers(self) -> bool:
        """Whether the predicting layers are chosen at the end, on the validation samples."""
        return self.model.predict_from == "auto"

    @model_validator(mode="after")
    def _check_threshold(self) -> "Config":
        threshold, is_symmetric = self.model.threshold, self.training.loss == "symmetric"
        if is_symmetric and threshold != "units":
            raise ValueError(
                f"training.loss=symmetric has no threshold (model.threshold: {threshold}); leave model.threshold out"
            )
        if None in self.thresholds and not is_symmetric and not self.model.goodness.endswith("sum_of_squares"):
            raise ValueError(
                "model.threshold=units is for sums of squares; set it to a number that the goodness can reach "
                f"(goodness: {self.model.goodness})"
            )
        return self

    def by_backpropagation(self) -> "Config":
        """Returns the configuration of the baseline: parameters have the settings of the readout, which is joint."""
        names = {"epochs", "batch_size", "precision", "momentum", "loss", "pooled_features"}
        names |= {
            "learning_rate_schedule",
            "learning_rate_steps",
            "learning_rate_factor",
            "warmup_epochs",
            "validation_samples",
            "validate_every_epochs",
            "stop",
            "callbacks",
        }
        readout = {"readout_learning_rate", "readout_weight_decay"}
        training = Training(
            **self.training.model_dump(include=names | readout),
            learning_rate=self.training.readout_learning_rate,
            weight_decay=self.training.readout_weight_decay,
            peer_normalization=0.0,
        )
        negatives = Negatives(kind="noise")  # validated but not used
        plain = [replace(layer, objective=None, optimizer=None, learning_rate=None) for layer in self.model.layers]
        changes = {"layers": plain, "readout": "joint"} | ({"predict_from": None} if self.chooses_layers else {})
        model = self.model.model_copy(update=changes)
        return self.model_copy(update={"model": model, "training": training, "negatives": negatives})

    def with_precision(self, precision: str) -> "Config":
        """Returns a copy with another precision."""
        return self.model_copy(update={"training": self.training.model_copy(update={"precision": precision})})

    @property
    def num_epochs(self) -> int:
        """Total number of passes over the training set."""
        return self.training.epochs * (len(self.model.layers) if self.training.schedule == "greedy" else 1)

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """Threshold of each layer; None for its number of units."""
        setting = self.model.threshold
        values = setting if isinstance(setting, list) else [setting] * len(self.model.layers)
        return tuple(None if value == "units" else value for value in values)

    def flat(self) -> dict[str, Any]:
        """Returns all values by `section.key`, to log and to compare.

        `data.label: auto` is `overwrite`, the default of earlier versions: for images they are the same, and tables
        allow no `overwrite`.
        """
        sections = self.model_dump(mode="json")
        if self.data.label == "auto":
            sections["data"]["label"] = "overwrite"
        return {key: reduce(getitem, key.split("."), sections) for key, _ in self.settings()}

    def to_yaml(self) -> str:
        """Returns the configuration as YAML, including defaults."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
"""The sections of a configuration by name."""
