"""Descriptions of layers, as they are in configurations and exported files.

The kinds here import torch only when a layer is built, so that configurations are checked quickly.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ffdist.ff.forms import FLOAT32_BYTES as FLOAT32_BYTES
from ffdist.ff.forms import Form

if TYPE_CHECKING:
    from torch import Tensor

    from ffdist.ff.layers import Layer
    from ffdist.ff.objectives import Rule

MAX_VALUE = 10**9
"""Largest number in a setting. Larger numbers exceed float32, time limits of the system, or memory."""
OPTIMIZER_NAMES = ("hinton", "sgd", "adam", "adamw")
"""The keys of `OPTIMIZERS`, which imports torch."""
MIN_UNITS_PER_FIELD = 32
"""With fewer units per field, one product for each row of fields is faster than one for each field."""


@dataclass(frozen=True)
class LayerSpec(ABC):
    """Describes a layer in a configuration. Its fields are the settings of the kind."""

    objective: str | None = field(default=None, kw_only=True)
    """Objective of this layer. Default: `training.objective`."""
    optimizer: str | None = field(default=None, kw_only=True, metadata={"one_of": (None, *OPTIMIZER_NAMES)})
    """Optimizer of this layer. Default: `training.optimizer`."""
    learning_rate: float | None = field(default=None, kw_only=True, metadata={"below": MAX_VALUE})
    """Learning rate of this layer. Default: `training.learning_rate`."""

    builds_on_meta: ClassVar[bool] = False
    """Whether `build` works on torch's device `meta`, which saves the memory of weights that are loaded afterwards."""
    needs_generator: ClassVar[bool] = False
    """Whether `build` needs a generator even if the weights are loaded, for values that are not part of the state."""
    working_values: ClassVar[int] = 12
    """Upper bound of the float32 values per activation of a minibatch while the layer is trained."""

    def __post_init__(self) -> None:
        """Checks the settings by the metadata of their fields.

        Whole numbers have a minimum, `min` (by default, 1), other numbers an upper bound, `below`, and names are
        `one_of` a few.

        Raises:
            ValueError: A setting has another value.
        """
        for setting in fields(self):
            value, low = getattr(self, setting.name), setting.metadata.get("min", 1)
            is_number = setting.type in (int, "int") or (setting.type == "int | None" and value is not None)
            if is_number and not (type(value) is int and low <= value <= MAX_VALUE):
                raise ValueError(f"{setting.name} must be a whole number from {low} to {MAX_VALUE} (given: {value!r})")
            below = setting.metadata.get("below")
            if below is not None and value is not None and not (type(value) in (int, float) and 0 <= value < below):
                raise ValueError(f"{setting.name} must be at least 0 and less than {below} (given: {value!r})")
            names = setting.metadata.get("one_of", (value,))
            if value not in names:
                known = ", ".join(filter(None, names))
                raise ValueError(f"{setting.name} must be one of {known} (given: {value!r})")
        if not isinstance(self.objective, str | None):
            raise ValueError(f"objective must be a name (given: {self.objective!r})")

    def rule(self, rule: Rule) -> Rule:
        """Returns the learning rule of this layer, from that of all layers."""
        changes = {name: value for name in ("optimizer", "learning_rate") if (value := getattr(self, name)) is not None}
        objective = rule.objective if self.objective is None else self.objective
        return replace(rule, objective=objective, update=replace(rule.update, **changes))

    @abstractmethod
    def output_form(self, form: Form) -> Form:
        """Returns the form of the layer's output for an input form."""

    def activation_form(self, form: Form) -> Form:
        """Returns the form of the activations that the objective reads, if the layer passes on less."""
        return self.output_form(form)

    def read_form(self, form: Form, most: int) -> Form:
        """Returns the form of what the readout reads of the output; maps may be pooled to at most `most` values."""
        return self.output_form(form)

    def num_buffers(self, form: Form) -> int:
        """Returns the number of values in buffers that are part of the state."""
        return 0

    def with_imports(self) -> LayerSpec:
        """Returns a layer that may import code of the user, because its configuration is the user's own."""
        return self

    @abstractmethod
    def num_parameters(self, form: Form) -> int:
        """Returns the number of learned values for an input form, without those of the objective."""

    @abstractmethod
    def build(self, form: Form, **settings: Any) -> Layer:
        """Returns a new layer.

        Args:
            form: Form of the input.
            **settings: `rule`, `threshold`, `classes` and `compute_dtype`, see `Layer`; and `generator`, the source of
                the initial weights, or None if they will be loaded.
        """

    def validate(self, form: Form) -> None:  # noqa: B027
        """Checks that the layer can read an input form.

        Raises:
            ValueError: It cannot; the message states the rule.
        """

    def validate_label(self, label: str) -> None:  # noqa: B027
        """Checks that the layer, as the first one, can read a way of showing the label, an entry of `LABELS` or none.

        Raises:
            ValueError: It cannot; the message states the rule.
        """

    def copy_bytes(self, form: Form, compute_bytes: int) -> int:
        """Returns the bytes that a layer keeps in addition to its state, such as a copy of the weights.

        Args:
            form: Form of the input.
            compute_bytes: Bytes of a number in matrix products.
        """
        return 0

    def filters(self, layer: Layer, form: Form) -> Tensor | None:
        """Returns the weights of each unit as images `[H, C, Y, X]`; None if they are no images."""
        return None


@dataclass(frozen=True)
class Dense(LayerSpec):
    """A dense layer: every unit reads all inputs."""

    units: int
    """Number of units."""

    builds_on_meta, working_values = True, 6

    def __str__(self) -> str:
        return str(self.units)

    def output_form(self, form: Form) -> Form:
        """Returns a vector of the units."""
        return Form((self.units,))

    def num_parameters(self, form: Form) -> int:
        """Returns the number of weights and biases."""
        return self.units * (form.width + 1)

    def validate_label(self, label: str) -> None:
        """Rejects `everywhere`."""
        if label == "everywhere":
            raise ValueError("label=everywhere shows the label to each local field, but the first layer has none")

    def build(self, form: Form, **settings: Any) -> Layer:
        """Returns a new layer."""
        from ffdist.ff.dense import DenseLayer

        return DenseLayer(self.output_form(form), (self.units, form.width), **settings)

    def copy_bytes(self, form: Form, compute_bytes: int) -> int:
        """Returns the bytes of the weights in the compute type, if it is not theirs."""
        return self.units * form.width * compute_bytes * (compute_bytes != FLOAT32_BYTES)

    def filters(self, layer: Layer, form: Form) -> Tensor | None:
        """Returns the weights of each unit, without those of shared values, if the input is a map."""
        return form.values(layer.get_parameter("weight")) if form.is_map else None


@dataclass(frozen=True)
class Local(LayerSpec):
    """A layer of local receptive fields without weight sharing: a square grid of fields, each with its own units."""

    grid: int
    """Number of fields along each axis. The grid is centered on the input map, and fields are clipped at its border."""
    field: int
    """Side length of a field, in positions of the input map."""
    units: int
    """Number of units per field."""
    stride: int = 1
    """Distance between adjacent fields, in positions of the input map."""

    builds_on_meta, working_values = True, 6

    def __str__(self) -> str:
        return f"{self.grid}x{self.grid}x{self.units}"

    def starts(self, size: int) -> list[int]:
        """Returns the start of each field along a side of the map; below 0 if it starts beyond the border."""
        return [(size - self.covered) // 2 + position * self.stride for position in range(self.grid)]

    @property
    def covered(self) -> int:
        """Side length of the square that all fields cover together."""
        return (self.grid - 1) * self.stride + self.field

    def fan_in(self, form: Form) -> int:
        """Returns the number of inputs of a unit."""
        return self.field**2 * form.shape[0] + form.shared

    def line_width(self, form: Form) -> int:
        """Returns the number of inputs in one row of the covered square, with the shared values."""
        return self.covered * form.shape[0] + form.shared

    @property
    def uses_bands(self) -> bool:
        """Whether it is computed by rows of fields ("bands"), with zero weights between the fields."""
        return self.units < MIN_UNITS_PER_FIELD

    def output_form(self, form: Form) -> Form:
        """Returns the map of the fields, with the units of a field as channels."""
        return Form((self.units, self.grid, self.grid), channels_last=True)

    def num_parameters(self, form: Form) -> int:
        """Returns the number of weights, including those beyond the border, and biases."""
        return self.grid**2 * self.units * (self.fan_in(form) + 1)

    def validate(self, form: Form) -> None:
        """Checks that the input is a map, and that every field overlaps it."""
        if not form.is_map:
            raise ValueError(f"has local fields and needs a map as input (shape of its input: {form.shape})")
        _, *sizes = form.shape
        ends = 0, (self.grid - 1) * self.stride  # the fields in between overlap if these do, and there may be many
        starts = [(size, (size - self.covered) // 2 + end) for size in sizes for end in ends]
        if not all(start < size and start + self.field > 0 for size, start in starts):
            raise ValueError(
                f"has fields that lie completely outside of its {sizes[0]} x {sizes[1]} input map "
                f"(grid: {self.grid}, stride: {self.stride}, field: {self.field})"
            )

    def validate_label(self, label: str) -> None:
        """Rejects all but `everywhere`: other ways show the label to few fields."""
        if label not in ("everywhere", "none"):
            raise ValueError(f"label={label} shows the label to few of the local fields; set it to everywhere")

    def build(self, form: Form, **settings: Any) -> Layer:
        """Returns a new layer."""
        from ffdist.ff.local import LocalLayer

        return LocalLayer(self, form, **settings)

    def copy_bytes(self, form: Form, compute_bytes: int) -> int:
        """Returns the bytes of the weights as they are used in products, if that is a copy."""
        num_weights = self.grid**2 * self.units * self.fan_in(form) * (compute_bytes != FLOAT32_BYTES)
        if self.uses_bands:
            num_weights = self.grid**2 * self.units * self.field * self.line_width(form)
        return num_weights * compute_bytes

    def filters(self, layer: Layer, form: Form) -> Tensor | None:
        """Returns the weights of each unit, without those of shared values."""
        channels = form.shape[0]
        weight = layer.get_parameter("weight")[..., : self.field**2 * channels]
        return weight.reshape(-1, self.field, self.field, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Conv(LayerSpec):
    """A convolution with a norm and an activation. What it passes on may be pooled."""

    channels: int
    """Number of output channels."""
    kernel: int = 3
    """Side length of the kernel."""
    stride: int = 1
    """Distance between adjacent positions of the kernel."""
    padding: int | None = field(default=None, metadata={"min": 0})
    """Width of the border of zeros around the input. Default: half of the kernel, rounded down."""
    norm: str = field(default="batch", metadata={"one_of": ("batch", "group", "none")})
    """Norm before the activation: `batch` (in training over the positive rows of a minibatch, and otherwise by running
    means), `group` (of each sample, in up to 32 groups of channels), or `none`."""
    activation: str = field(default="relu", metadata={"one_of": ("relu", "leaky_relu")})
    """Activation: `relu` or `leaky_relu`."""
    pool: str = field(default="none", metadata={"one_of": ("none", "max", "average")})
    """Pooling of 2 x 2 positions in what is passed on: `max`, `average` or `none`. The objective reads all of them."""
    dropout: float = field(default=0.0, metadata={"below": 1})
    """Probability with which a whole channel of what is passed on is set to 0 for a training sample. The objective
    reads all channels."""

    builds_on_meta = True

    def __str__(self) -> str:
        return f"{self.channels}c{self.kernel}{'p' * (self.pool != 'none')}"

    @property
    def border(self) -> int:
        """Width of the border of zeros."""
        return self.kernel // 2 if self.padding is None else self.padding

    def fan_in(self, form: Form) -> int:
        """Returns the number of inputs of a unit."""
        return self.kernel**2 * (form.shape[0] + form.shared)

    def activation_form(self, form: Form) -> Form:
        """Returns the map of all positions."""
        sizes = ((size + 2 * self.border - self.kernel) // self.stride + 1 for size in form.shape[1:])
        return Form((self.channels, *sizes), channels_last=True)

    def output_form(self, form: Form) -> Form:
        """Returns the map after pooling."""
        channels, *sizes = self.activation_form(form).shape
        divisor = 1 if self.pool == "none" else 2
        return Form((channels, *(size // divisor for size in sizes)), channels_last=True)

    def read_form(self, form: Form, most: int) -> Form:
        """Returns the form of the output, average-pooled."""
        return self.output_form(form).pooled(most)

    def num_parameters(self, form: Form) -> int:
        """Returns the number of weights, and of biases or of factors and offsets of the norm."""
        return self.channels * (self.fan_in(form) + (1 if self.norm == "none" else 2))

    def num_buffers(self, form: Form) -> int:
        """Returns the number of running means and variances."""
        return 2 * self.channels * (self.norm == "batch")

    def copy_bytes(self, form: Form, compute_bytes: int) -> int:
        """Returns the bytes of the weights in the compute type, ordered for products."""
        return self.channels * self.fan_in(form) * compute_bytes

    def validate(self, form: Form) -> None:
        """Checks that the input is a map that the kernel fits into."""
        if not form.is_map:
            raise ValueError(f"is a convolution and needs a map as input (shape of its input: {form.shape})")
        if not all(size > 0 for size in self.output_form(form).shape):
            raise ValueError(
                f"leaves nothing of its {form.shape[1]} x {form.shape[2]} input map (kernel: {self.kernel}, padding: "
                f"{self.border}, pool: {self.pool})"
            )

    def validate_label(self, label: str) -> None:
        """Rejects all but `everywhere`: a convolution cannot see a label in a corner."""
        if label not in ("everywhere", "none"):
            raise ValueError(f"label={label} shows the label to few positions of the map; set it to everywhere or none")

    def build(self, form: Form, **settings: Any) -> Layer:
        """Returns a new layer."""
        from ffdist.ff.conv import ConvLayer

        return ConvLayer(self, form, **settings)

    def filters(self, layer: Layer, form: Form) -> Tensor | None:
        """Returns the kernels, without those of shared values."""
        return layer.get_parameter("weight")[:, : form.shape[0]]


@dataclass(frozen=True)
class Module(LayerSpec):
    """A class of the user: a `torch.nn.Module` that maps a tensor of samples to one tensor. Autograd trains it."""

    name: str
    """The class, `package.module:Class`, in the working directory or installed."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class."""
    may_import: bool = field(default=False, compare=False, repr=False, metadata={"is_setting": False})

    needs_generator = True

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: One is invalid.
        """
        super().__post_init__()
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.name):
            raise ValueError(f"name must be package.module:Class (given: {self.name!r})")
        if self.name.startswith("__main__:"):
            raise ValueError(f"name must be a class in a module file, which actors can import (given: {self.name})")
        try:
            is_json = isinstance(self.options, dict) and json.loads(json.dumps(self.options)) == self.options
        except (TypeError, ValueError):
            is_json = False
        if not is_json:
            raise ValueError(
                f"options must be the arguments of the class by name, as numbers, strings, lists and mappings (given: "
                f"{self.options!r})"
            )

    def __str__(self) -> str:
        return self.name.partition(":")[2]

    def with_imports(self) -> Module:
        """Returns a layer that may import the class."""
        return replace(self, may_import=True)

    def output_form(self, form: Form) -> Form:
        """Returns the form of the class's output."""
        from ffdist.ff.module import infer

        return Form(infer(self, form).shape)

    def read_form(self, form: Form, most: int) -> Form:
        """Returns the form of the output; a map is average-pooled."""
        return self.output_form(form).pooled(most)

    def num_parameters(self, form: Form) -> int:
        """Returns the number of values of all parameters."""
        from ffdist.ff.module import infer

        return infer(self, form).num_parameters

    def num_buffers(self, form: Form) -> int:
        """Returns the number of values of all buffers that are part of the state."""
        from ffdist.ff.module import infer

        return infer(self, form).num_buffers

    def validate(self, form: Form) -> None:
        """Checks that the class can be created and reads the input."""
        if form.shared:
            raise ValueError(
                f"is a module, which cannot read the {form.shared} label values beside its input; set data.label to "
                f"overwrite or none"
            )
        self.output_form(form)

    def build(self, form: Form, **settings: Any) -> Layer:
        """Returns a new layer."""
        from ffdist.ff.module import ModuleLayer

        return ModuleLayer(self, form, **settings)


LAYERS: dict[str, type[LayerSpec]] = {"dense": Dense, "local": Local, "conv": Conv, "module": Module}
"""Layer kinds, by the `kind` of an entry in `model.layers`."""


def parse_layer(entry: Any) -> LayerSpec:
    """Returns the layer of an entry: a number of units, or a mapping with `kind` and the settings of the kind.

    Raises:
        ValueError: The entry is invalid.
    """
    if isinstance(entry, LayerSpec):
        return entry
    if not isinstance(entry, Mapping):
        return Dense(entry)
    kind = entry.get("kind")
    if not (isinstance(kind, str) and kind in LAYERS):
        raise ValueError(f"kind must be one of {', '.join(LAYERS)} (kind: {kind!r})")
    spec, settings = LAYERS[kind], {key: value for key, value in entry.items() if key != "kind"}
    names = [each.name for each in setting_fields(spec)]
    if unknown := [str(key) for key in settings if key not in names]:
        raise ValueError(f"a {kind} layer has no setting {', '.join(unknown)} (its settings: {', '.join(names)})")
    try:
        return spec(**settings)
    except TypeError as error:  # one is missing
        raise ValueError(f"a {kind} layer needs {', '.join(names)}, of which some have defaults ({error})") from error


def layer_entry(layer: LayerSpec) -> Any:
    """Returns the entry of a layer, the inverse of `parse_layer`."""
    if layer == Dense(getattr(layer, "units", 1)):
        return layer.units
    kind = next(name for name, spec in LAYERS.items() if spec is type(layer))
    values = asdict(layer)
    settings = {each.name: values[each.name] for each in setting_fields(type(layer))}
    return {"kind": kind, **{name: value for name, value in settings.items() if value is not None}}


def setting_fields(spec: type[LayerSpec]) -> list[Field[Any]]:
    """Returns the fields of a kind of layers that are settings; those of all kinds are last."""
    return sorted(
        (each for each in fields(spec) if each.metadata.get("is_setting", True)), key=lambda each: bool(each.kw_only)
    )
