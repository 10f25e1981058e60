"""Descriptions of layers, as they are in configurations and exported files.

The kinds here import torch only when a layer is built, so that configurations are checked quickly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ffdist.ff.forms import Form

if TYPE_CHECKING:
    from torch import Tensor

    from ffdist.ff.layers import Layer

MAX_VALUE = 10**9
"""Largest number in a setting. Larger numbers exceed float32, time limits of the system, or memory."""
FLOAT32_BYTES = 4
MIN_UNITS_PER_FIELD = 32
"""With fewer units per field, one product for each row of fields is faster than one for each field."""


@dataclass(frozen=True)
class LayerSpec(ABC):
    """Describes a layer in a configuration. Its fields are the settings of the kind."""

    builds_on_meta: ClassVar[bool] = False
    """Whether `build` works on torch's device `meta`, which saves the memory of weights that are loaded afterwards."""

    def __post_init__(self) -> None:
        """Checks the settings that are whole numbers; the `min` in the metadata of a field is 1 by default.

        Raises:
            ValueError: One is less than its minimum, or greater than MAX_VALUE.
        """
        for field in fields(self):
            value, low = getattr(self, field.name), field.metadata.get("min", 1)
            if field.type in (int, "int") and not (type(value) is int and low <= value <= MAX_VALUE):
                raise ValueError(f"{field.name} must be a whole number from {low} to {MAX_VALUE} (given: {value!r})")

    @abstractmethod
    def output_form(self, form: Form) -> Form:
        """Returns the form of the layer's output for an input form."""

    @abstractmethod
    def num_parameters(self, form: Form) -> int:
        """Returns the number of learned values for an input form."""

    @abstractmethod
    def build(self, form: Form, **settings: Any) -> Layer:
        """Returns a new layer.

        Args:
            form: Form of the input.
            **settings: `rule`, `threshold` and `compute_dtype`, see `Layer`; and `generator`, the source of the initial
                weights, or None if they will be loaded.
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

    builds_on_meta = True

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

        return DenseLayer((self.units, form.width), **settings)

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

    builds_on_meta = True

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


LAYERS: dict[str, type[LayerSpec]] = {"dense": Dense, "local": Local}
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
    names = [field.name for field in fields(spec)]
    if unknown := [str(key) for key in settings if key not in names]:
        raise ValueError(f"a {kind} layer has no setting {', '.join(unknown)} (its settings: {', '.join(names)})")
    try:
        return spec(**settings)
    except TypeError as error:  # one is missing
        raise ValueError(f"a {kind} layer needs {', '.join(names)}, of which some have defaults ({error})") from error


def layer_entry(layer: LayerSpec) -> Any:
    """Returns the entry of a layer, the inverse of `parse_layer`."""
    if type(layer) is Dense:
        return layer.units
    kind = next(name for name, spec in LAYERS.items() if spec is type(layer))
    return {"kind": kind, **asdict(layer)}
