"""What a run is: typed sections, validated before anything starts."""

import re
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from ffdist.sections import Checkpoint, Data, Model, Negatives, Number, Pipeline, Section, Tracking, Training

DECIDES_NOTHING = (
    *("pipeline.", "tracking.", "checkpoint.", "data.root", "training.evaluate_every"),
    *("negatives.actors", "negatives.ahead", "negatives.store"),
)
"""Settings, by the start of their name, in which runs of the same weights may differ."""


FLOAT = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
"""Floats such as 5e-1, .5e1 and 1e5, which YAML 1.1 takes for strings."""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that look like such a float."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


class ConfigError(ValueError):
    """A user's setting or input that cannot work; its text states the rule, the value and the way out."""


class RunFailed(RuntimeError):
    """A run that had to stop; its text says why, and what was kept."""


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Number, Field(ge=0, lt=2**63)] = 0
    """Decides every random draw of the run."""
    data: Data
    model: Model
    negatives: Negatives = Negatives()
    training: Training = Training()
    pipeline: Pipeline = Pipeline()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _stages_have_layers(self) -> "Config":
        stages, layers = self.pipeline.stages, len(self.model.layers)
        if stages != "auto" and stages > layers:
            raise ValueError(
                f"every stage needs a layer (stages: {stages}, layers: {layers}); "
                f"set pipeline.stages between 1 and {layers}, or to auto"
            )
        cut = self.pipeline.balance
        if isinstance(cut, list) and (sum(cut) != layers or stages not in ("auto", len(cut))):
            raise ValueError(
                f"pipeline.balance must give each stage some of the {layers} layers (given: {cut}, which is {sum(cut)} "
                f"in {len(cut)} stages; pipeline.stages: {stages}); correct it, or set it to measured"
            )
        return self

    @property
    def predict_from(self) -> int:
        """First layer, counted from 1, that goodness and readout look at."""
        return self.model.predict_from or min(2, len(self.model.layers))

    @model_validator(mode="after")
    def _threshold_fits(self) -> "Config":
        given, symmetric = self.model.threshold, self.training.loss == "symmetric"
        if symmetric and given != "units":
            raise ValueError(
                f"training.loss=symmetric compares goodnesses, not with a threshold; leave it out (threshold: {given})"
            )
        if None in self.thresholds and not symmetric and not self.model.goodness.endswith("sum_of_squares"):
            raise ValueError(
                "model.threshold=units is for sums of squares; set it to a number that the goodness can reach "
                f"(goodness: {self.model.goodness})"
            )
        return self

    def by_backpropagation(self) -> "Config":
        """Returns the reference: the same layers, data and order, with the readout's update rule for all, no more."""
        kept = {"epochs", "batch_size", "precision", "validation_samples", "evaluate_every", "smoothing", "loss"}
        readout = {"readout_learning_rate", "readout_weight_decay"}
        training = Training(
            **self.training.model_dump(include=kept | readout),
            learning_rate=self.training.readout_learning_rate,
            weight_decay=self.training.readout_weight_decay,
            peer_normalization=0.0,
        )
        return self.model_copy(update={"training": training, "negatives": Negatives(kind="noise")})  # tried, never used

    def with_precision(self, precision: str) -> "Config":
        """Returns the same run in another precision."""
        return self.model_copy(update={"training": self.training.model_copy(update={"precision": precision})})

    @property
    def passes(self) -> int:
        """Passes over the training set in all."""
        return self.training.epochs * (len(self.model.layers) if self.training.schedule == "greedy" else 1)

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """Each layer's threshold; None for the number of its units."""
        given = self.model.threshold
        each = given if isinstance(given, list) else [given] * len(self.model.layers)
        return tuple(None if threshold == "units" else threshold for threshold in each)

    def flat(self) -> dict[str, Any]:
        """Returns every value by its `section.key`."""
        sections = self.model_dump(mode="json")
        seed = sections.pop("seed")
        return {"seed": seed} | {
            f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()
        }

    def to_yaml(self) -> str:
        """Returns the resolved configuration, defaults included, as YAML."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
