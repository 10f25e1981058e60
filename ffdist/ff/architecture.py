"""The architecture of a network: its layers, their initial weights and how they learn.

Shapes: `N` samples, `B` samples of a minibatch, `D` values of a sample, `L` layers, `T` labels that are tried,
`C` classes, `H` units.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ffdist.ff.encoders import Encoder
from ffdist.ff.forms import Form
from ffdist.ff.goodness import NORMALIZATIONS, normalize, squared_norm
from ffdist.ff.keyed import generator
from ffdist.ff.labels import LABELS, LabeledRows, Rows, neutral, one_hot
from ffdist.ff.layers import MEASURED, Layer
from ffdist.ff.objectives import RELEASE, Objective, Rule, find_objective, num_parameters
from ffdist.ff.optimizers import READOUT_UPDATE, Update
from ffdist.ff.readout import READOUTS, Readout
from ffdist.ff.specs import LayerSpec, Module, parse_layer

MAX_ROWS, MAX_ACTIVATIONS = 4000, 2**25
"""Limits of the rows that pass through the layers at once when labels are predicted: their number, and the activations
of a layer for them."""


def layer_name(index: int) -> str:
    """Returns the name of a layer, counted from 0, in states and metrics."""
    return f"layer_{index + 1}"


def readout_name(index: int) -> str:
    """Returns the name of the readout of a layer, counted from 0, in states."""
    return f"readout_{index + 1}"


@dataclass(frozen=True)
class Architecture:
    """Determines a network: its layers, their initial weights and how they learn. Any part can be built anywhere."""

    encoder: Encoder
    """Turns samples into input rows."""
    layers: tuple[LayerSpec, ...]
    """Hidden layers, first layer first. A number is a dense layer with as many units."""
    predict_from: int = 2
    """First layer, counted from 1, that predicts, by its goodness or class scores and as an input of the readout."""
    seed: int = 0
    """Key of the initial weights."""
    rule: Rule = RELEASE
    """Learning rule of the layers."""
    learned_goodness: bool = True
    """Whether the layers were trained on their goodness. After backpropagation, only the readout predicts."""
    thresholds: tuple[float | None, ...] = ()
    """Threshold of each layer; None for its number of units, and empty if that is the threshold of all layers."""
    readout_update: Update = READOUT_UPDATE
    precision: str = "float32"
    """Type of the layers' matrix products, `float32` or `bfloat16`."""
    untrained: tuple[int, ...] = ()
    """Classes without training samples, whose labels are never tried."""
    predict_to: int | None = None
    """Last layer, counted from 1, that predicts; None for the last layer of the network."""
    readout_kind: str = "joint"
    """`joint`: one readout for all predicting layers; `per_layer`: one for each, whose logits are summed; `none`."""
    chosen_layers: tuple[int, int] | None = None
    """First and last layer, counted from 1, whose goodness or class scores predict, if they were chosen on validation
    samples; None for those that the readout reads."""

    def __post_init__(self) -> None:
        """Converts numbers to dense layers, and checks that everything fits together.

        Raises:
            ValueError: A setting is invalid, or a layer does not fit its input.
        """
        object.__setattr__(self, "layers", tuple(parse_layer(layer) for layer in self.layers))
        if not self.layers:
            raise ValueError("layers must name at least one layer (layers: ())")
        self.layers[0].validate_label(self.encoder.label)
        form = self.encoder.form
        for number, layer in enumerate(self.layers, 1):
            try:
                layer.validate(form)
            except ValueError as error:
                raise ValueError(f"layer {number} {error}") from error
            form, activations = layer.output_form(form), layer.activation_form(form)
            rule = self.rules[number - 1]
            find_objective(rule).validate(rule, activations, self.classes)
        if len({(each.needs_negatives, each.scores_classes) for each in self.objectives}) > 1:
            names = ", ".join(rule.objective for rule in self.rules)
            raise ValueError(
                f"the objectives of all layers must need negatives, or none, and all or none must score classes "
                f"(objectives: {names}); choose others for some layers"
            )
        if not 1 <= self.predict_from <= (self.predict_to or self.predict_from) <= len(self.layers):
            raise ValueError(
                f"predict_from and predict_to must be layers, 1 to {len(self.layers)}, in this order (predict_from: "
                f"{self.predict_from}, predict_to: {self.predict_to})"
            )
        if not 0 <= self.predicting_layers.start < self.predicting_layers.stop <= len(self.layers):
            raise ValueError(
                f"chosen_layers must be the first and the last of some of the {len(self.layers)} layers "
                f"(chosen_layers: {self.chosen_layers})"
            )
        if self.readout_kind not in READOUTS:
            raise ValueError(f"readout must be one of {', '.join(READOUTS)} (readout: {self.readout_kind})")
        if not (self.has_readout or self.goodness_predicts):
            raise ValueError(
                f"readout=none needs layers that predict the label (objective: {self.rule.objective}, label: "
                f"{self.encoder.label}); show a label, choose an objective that scores classes, or keep the readout"
            )
        if not set(self.untrained) < set(range(self.classes)):
            raise ValueError(f"untrained must be some of the {self.classes} classes (untrained: {self.untrained})")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16 (precision: {self.precision})")
        if len(self.thresholds) not in (0, len(self.layers)):
            raise ValueError(
                f"all of the {len(self.layers)} layers have a threshold, or none (given: {self.thresholds})"
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of matrix products and of the activations between layers."""
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.encoder.classes

    @property
    def labels_shown(self) -> bool:
        """Whether the input shows a label."""
        return self.encoder.labels_shown

    @property
    def has_readout(self) -> bool:
        """Whether there is a readout, of all predicting layers or of each of them."""
        return self.readout_kind != "none"

    @property
    def has_neutral(self) -> bool:
        """Whether minibatches have a pass with the neutral label, which only readouts need."""
        return self.labels_shown and self.has_readout

    @property
    def needs_labels(self) -> bool:
        """Whether stages need the labels of the training set: for objectives, or for readouts of layers."""
        by_layer = zip(self.objectives, self.rules, strict=True)
        return self.readout_kind == "per_layer" or any(kind.needs_labels or rule.terms for kind, rule in by_layer)

    @property
    def parts(self) -> dict[str, str]:
        """Names of the parts of a state, such as `layer_1`, with the names of their modules in `Network`."""
        layers = {layer_name(index): f"layers.{index}" for index in range(len(self.layers))}
        if self.readout_kind == "per_layer":
            return layers | {readout_name(index): f"readout.{index}" for index in self.read_layers}
        return layers | ({"readout": "readout"} if self.has_readout else {})

    @property
    def goodness_predicts(self) -> bool:
        """Whether the layers predict: the label with the most goodness of all that are tried, or by class scores."""
        return self.learned_goodness and (self.labels_shown or self.scores_classes)

    @property
    def read_layers(self) -> range:
        """Layers that the readout reads, counted from 0."""
        return range(self.predict_from - 1, self.predict_to or len(self.layers))

    @property
    def predicting_layers(self) -> range:
        """Layers whose goodness or class scores predict, counted from 0."""
        return range(self.chosen_layers[0] - 1, self.chosen_layers[1]) if self.chosen_layers else self.read_layers

    @property
    def tried(self) -> list[int]:
        """Labels that are tried to predict by goodness, T of the C classes."""
        return [label for label in range(self.classes) if label not in self.untrained]

    @property
    def prediction_batch(self) -> int:
        """Number of samples that are predicted at once."""
        return max(1, self.max_rows // (1 if self.scores_classes else len(self.tried)))

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Learning rule of each layer."""
        return tuple(layer.rule(self.rule) for layer in self.layers)

    @property
    def objectives(self) -> list[type[Objective]]:
        """Kind of objective of each layer."""
        return [find_objective(rule) for rule in self.rules]

    @property
    def scores_classes(self) -> bool:
        """Whether layers score every class in one pass."""
        return self.objectives[0].scores_classes

    @property
    def custom_modules(self) -> list[str]:
        """Names of the modules of the user that the network needs."""
        names = [layer.name for layer in self.layers if isinstance(layer, Module)]
        names += [rule.objective for rule in self.rules if ":" in rule.objective]
        return list(dict.fromkeys(name.partition(":")[0] for name in names))

    @cached_property
    def layer_metrics(self) -> tuple[tuple[str, ...], ...]:
        """Names of the metrics of each layer for a minibatch."""
        pairs = zip(self.objectives, self.rules, strict=True)
        return tuple((*objective.metrics, *rule.terms, *MEASURED) for objective, rule in pairs)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics of all layers for a minibatch, in the order of their values in reports."""
        names = dict.fromkeys(name for names in self.layer_metrics for name in names if name not in MEASURED)
        return (*names, *MEASURED)

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        """Form of the input rows, and then of the output of each layer."""
        forms = [self.encoder.form]
        for layer in self.layers:
            forms.append(layer.output_form(forms[-1]))
        return tuple(forms)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of values of the input rows, and then of the output of each layer."""
        return tuple(form.width for form in self.forms)

    @property
    def num_features(self) -> int:
        """Number of values that the readout reads."""
        return sum(form.size for _, form in self.read_forms)

    @property
    def max_rows(self) -> int:
        """Largest number of rows that pass through the layers at once when labels are predicted."""
        widest = max(form.size for form in (*self.forms, *self.activation_forms))
        return max(1, min(MAX_ROWS, MAX_ACTIVATIONS // widest))

    @property
    def read_forms(self) -> list[tuple[Form, Form]]:
        """Form of the output of each layer that the readout reads, and of what it reads of it."""
        pairs = [*self._layers_and_forms][self.read_layers.start : self.read_layers.stop]
        most = self.rule.pooled_features
        return [(layer.output_form(form), layer.read_form(form, most)) for layer, form in pairs]

    @property
    def activation_forms(self) -> tuple[Form, ...]:
        """Form of the activations of each layer, which its objective reads."""
        return tuple(layer.activation_form(form) for layer, form in self._layers_and_forms)

    @property
    def num_parameters(self) -> tuple[int, ...]:
        """Number of learned values of each layer."""
        return tuple(
            layer.num_parameters(form) + num_parameters(rule, output, self.classes)
            for (layer, form), output, rule in zip(
                self._layers_and_forms, self.activation_forms, self.rules, strict=True
            )
        )

    @property
    def state_bytes(self) -> tuple[int, ...]:
        """Bytes of the state of each layer, and then of a joint readout: parameters, optimizer state and statistics.

        The state of a readout of its own is part of that of a layer.
        """
        values = [
            rule.update.num_values(count) + output.size + layer.num_buffers(form)
            for rule, count, output, (layer, form) in zip(
                self.rules, self.num_parameters, self.activation_forms, self._layers_and_forms, strict=True
            )
        ]
        values.append(0)
        for index, (_, form) in zip(self.read_layers, self.read_forms, strict=True):
            if self.readout_kind == "per_layer":
                values[index] += self.readout_update.num_values(self.classes * (1 + form.size))
        if self.readout_kind == "joint":
            values[-1] = self.readout_update.num_values(self.classes * (1 + self.num_features))
        return tuple(torch.float32.itemsize * each for each in values)

    @property
    def copy_bytes(self) -> tuple[int, ...]:
        """Bytes that each layer keeps in addition to its state."""
        return tuple(layer.copy_bytes(form, self.compute_dtype.itemsize) for layer, form in self._layers_and_forms)

    @property
    def _layers_and_forms(self) -> Iterable[tuple[LayerSpec, Form]]:
        return zip(self.layers, self.forms[:-1], strict=True)

    def layer(self, index: int, *, trainable: bool = True) -> Layer:
        """Builds a hidden layer.

        Args:
            index: Number of the layer, counted from 0.
            trainable: Whether it has initial weights and optimizer state. Otherwise its weights must be loaded.
        """
        spec = self.layers[index]
        with torch.device("cpu" if trainable or not spec.builds_on_meta else "meta"):
            layer = spec.build(
                self.forms[index],
                rule=self.rules[index],
                threshold=self.thresholds[index] if self.thresholds else None,
                classes=self.classes,
                compute_dtype=self.compute_dtype,
                generator=generator(self.seed, "layer", index) if trainable or spec.needs_generator else None,
                objective_generator=generator(self.seed, "objective", index) if trainable else None,
            )
        if trainable:
            layer.add_optimizer_state()
        return layer.eval()

    def pool_read(self, index: int, rows: Tensor) -> Tensor:
        """Returns what the readout reads of the output of a layer, counted from 0, `[..., H] -> [..., F]`."""
        form, to = self.read_forms[index - self.read_layers.start]
        return rows if form.shape == to.shape else form.pool(rows, to)

    def readout(self, layer: int | None = None) -> Readout:
        """Builds a readout, whose initial parameters are 0, of a layer, counted from 0, or of all read layers."""
        forms = self.read_forms if layer is None else [self.read_forms[layer - self.read_layers.start]]
        is_pooled = any(form.shape != to.shape for form, to in forms)
        num_features = sum(to.size for _, to in forms)
        return Readout(num_features, self.classes, update=self.readout_update, forms=forms if is_pooled else ())

    def unlabeled_rows(self, samples: Tensor) -> Tensor:
        """Turns samples `[..., D]` into normalized rows that show no label `[..., D]`, of the compute type."""
        values = self.encoder.values(samples)
        return normalize(self.rule.normalization, values, squared_norm(values)).to(self.compute_dtype)

    def labeled_rows(self, samples: Tensor, claims: Tensor) -> LabeledRows:
        """Turns samples and label values into normalized rows `[..., D']`.

        Leading dimensions of samples and label values are broadcast.

        Args:
            samples: `[..., D]`.
            claims: Label values `[..., C]`, float32, 1 for the label.
        """
        values, place = LABELS[self.encoder.label](self.encoder.values(samples), self.classes)
        values, labels = (
            part[(None,) * (max(samples.dim(), claims.dim()) - part.dim())]  # so that both have as many dimensions
            for part in (values, claims * self.encoder.label_scale)
        )
        factors = NORMALIZATIONS[self.rule.normalization](squared_norm(values) + squared_norm(labels), values.shape[-1])
        return LabeledRows(values, labels, factors, place)

    def claiming_rows(self, samples: Tensor, *, with_neutral: bool = False) -> LabeledRows:
        """Turns samples `[N, D]` into rows with every label that is tried `[N, T, D']`.

        Args:
            samples: Samples.
            with_neutral: Whether a row with the neutral label follows `[N, T + 1, D']`.
        """
        claims = one_hot(torch.tensor(self.tried, device=samples.device), self.classes)
        if with_neutral:
            claims = torch.cat((claims, neutral(samples[:1], self.classes)))
        return self.labeled_rows(samples.unsqueeze(1), claims.unsqueeze(0))

    def by_class(self, goodness: Tensor) -> Tensor:
        """Returns the goodness of every class `[..., C]`, -inf for classes without training samples.

        Args:
            goodness: Of the labels tried `[..., T]`, or class scores `[..., C]`.
        """
        if not self.untrained or not goodness.shape[-1]:
            return goodness
        every = goodness.new_full((*goodness.shape[:-1], self.classes), -torch.inf)
        every[..., self.tried] = goodness[..., self.tried] if self.scores_classes else goodness
        return every

    def neutral_rows(self, samples: Tensor) -> Rows:
        """Turns samples `[..., D]` into the rows that the readout's pass reads: with the neutral label, or none."""
        if not self.labels_shown:
            return self.unlabeled_rows(samples)
        return self.labeled_rows(samples, neutral(samples, self.classes))
