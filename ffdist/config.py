"""What a run is: one YAML file, typed and validated before anything starts."""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


def _no_boolean(value: Any) -> Any:
    """Keeps YAML's yes and no from counting as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"a number is needed here, not {value}")
    return value


Number = BeforeValidator(_no_boolean)
Count = Annotated[int, Number, Field(ge=1)]
Fraction = Annotated[float, Number, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Number, Field(ge=0, allow_inf_nan=False)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]

DATA_FOLDERS = ("parquet", "image_folder")


class ConfigError(ValueError):
    """A user's setting or input that cannot work; its text states the rule, the value and the way out."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Section):
    """What is learned."""

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10", "parquet", "image_folder"]
    """The dataset; `parquet` and `image_folder` read `path`."""
    path: Folder | None = None
    """Folder with `train*` and `test*` in it: Parquet files or folders of them, or one image folder per split."""
    root: Folder | None = None
    """Where torchvision's datasets are, or are downloaded to; without it FFDIST_DATA, else ~/.cache/ffdist."""
    label: Literal["overwrite", "append"] = "overwrite"
    """How the input shows the label: in place of the first C values, or as C more."""
    image_column: str | None = None
    """Parquet's column of images; found where there is only one candidate."""
    label_column: str | None = None
    """Parquet's column of labels; found where there is only one candidate."""
    image_size: tuple[Count, Count] | None = None
    """Height and width that images of one's own are resized to; without it all must have the same."""
    classes: Annotated[int, Number, Field(ge=2, le=256)] | None = None
    """Number of classes of one's own data; without it one more than the largest training label."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> "Data":
        if (self.path is None) == (self.name in DATA_FOLDERS):
            need = (
                "needs data.path, a folder with train* and test* in it" if self.path is None else "takes no data.path"
            )
            raise ValueError(f"data.name={self.name} {need}")
        for key in ("image_column", "label_column", "image_size", "classes"):
            if getattr(self, key) is not None and self.path is None:
                raise ValueError(f"data.{key} is for images of one's own (data.name: {self.name}); leave it out")
        return self


class Model(Section):
    """The network."""

    layers: Annotated[list[Count], Field(min_length=1)]
    """Units of each hidden layer, lowest first."""
    predict_from: Count | None = None
    """First layer, counted from 1, that goodness and readout look at; 2, or 1 where there is only one."""

    @model_validator(mode="after")
    def _predict_from_a_layer(self) -> "Model":
        if self.predict_from is not None and self.predict_from > len(self.layers):
            raise ValueError(
                f"model.predict_from must be one of the {len(self.layers)} layers (predict_from: {self.predict_from})"
            )
        return self


class Negatives(Section):
    """The negative data."""

    kind: Literal["wrong_label"] = "wrong_label"
    """`wrong_label`: a wrong class for every sample, drawn afresh each epoch."""
    actors: Count = 1
    """Actors that make them."""


class Training(Section):
    """How layers and readout learn; defaults are those of the paper's released code."""

    epochs: Count = 60
    """Passes over the training set."""
    batch_size: Count = 100
    """Samples a minibatch, and an update."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the layers' matrix products; goodness, parameters and updates are float32."""
    validation_samples: Annotated[int, Number, Field(ge=0)] = 0
    """Samples held out of the training set by the seed; 0 evaluates nothing before the end."""
    evaluate_every: Count = 5
    """Epochs from one validation to the next."""
    learning_rate: NotNegative = 0.01
    """Step of the layers along their smoothed gradient, falling in the second half of the run."""
    weight_decay: NotNegative = 0.001
    """Share of a layer's weight taken off per unit of learning rate."""
    readout_learning_rate: NotNegative = 0.1
    """The same of the readout."""
    readout_weight_decay: NotNegative = 0.003
    """The same of the readout."""
    smoothing: Fraction = 0.9
    """Weight of the past in the running mean of gradients."""
    peer_normalization: NotNegative = 0.03
    """Pull of each unit's mean activity towards the mean of its layer."""


class Pipeline(Section):
    """How the work is spread; nothing here changes a result, except threads_per_stage and device in the last bits."""

    stages: Count | Literal["auto"] = "auto"
    """Number of stages; `auto`: one a layer, or one a GPU where there are fewer GPUs."""
    chunk_size: Count = 20
    """Minibatches that travel together."""
    max_in_flight: Count = 4
    """Chunks admitted and not yet done."""
    threads_per_stage: Count = 1
    """torch's threads in a stage, and in the readout; part of the order of sums."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where stages compute; `auto`: on GPUs where the cluster has some."""


class Checkpoint(Section):
    """What is kept of a run."""

    keep: Count = 1
    """Newest commits kept, beside the one that did best on validation."""


class Tracking(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server or database; without it MLFLOW_TRACKING_URI, else a database in the runs folder."""
    experiment: str = "ffdist"
    """MLflow experiment that the run belongs to."""
    every_minibatches: Count = 100
    """Minibatches that a logged learning metric is averaged over."""


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
        return self

    @property
    def predict_from(self) -> int:
        """First layer, counted from 1, that goodness and readout look at."""
        return self.model.predict_from or min(2, len(self.model.layers))

    def flat(self) -> dict[str, Any]:
        """Returns every value by its `section.key`."""
        sections = self.model_dump(mode="json")
        seed = sections.pop("seed")
        return {"seed": seed} | {
            f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()
        }

    def to_yaml(self) -> str:
        """Returns the resolved configuration, defaults included, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def config_folder() -> Path:
    """Returns the folder of the shipped configurations: inside an installed package, beside an editable one."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """Finds a configuration by its path, or a shipped one by its bare name.

    Raises:
        ConfigError: There is neither.
    """
    shipped = {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise ConfigError(
        f"a configuration is a YAML file or the name of a shipped one (given: {name}; shipped: {', '.join(shipped)})"
        f"{_nearest(name, shipped)}"
    )


def load_config(name: str, overrides: Iterable[str] = ()) -> Config:
    """Reads and validates a configuration.

    Args:
        name: Path, or bare name of a shipped one.
        overrides: `section.key=value` each, the value in YAML; later ones win.

    Raises:
        ConfigError: Says in one paragraph what is wrong and what would be right.
    """
    path = find_config(name)
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as data: and model: (it holds: {tree!r})")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], origin: str) -> Config:
    """Validates a configuration given as nested dicts; `origin` is named in errors.

    Raises:
        ConfigError: As `load_config`.
    """
    try:
        return Config.model_validate({section: keys for section, keys in tree.items() if keys is not None})
    except ValidationError as error:
        raise ConfigError(f"{origin}: {'; '.join(_explain(error))}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"an override is section.key=value, without blanks around = (given: {override})")
    *sections, last = key.split(".")
    for section in sections:
        inner = tree[section] = tree.get(section) or {}  # a section left empty in the file is None
        if not isinstance(inner, dict):
            raise ConfigError(f"{section} is a value, not a section (given: {override})")
        tree = inner
    try:
        tree[last] = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the value of {key} must be YAML (given: {text})") from error


def _explain(error: ValidationError) -> Iterator[str]:
    rules: dict[str, list[str]] = {}  # by key, with its value: a key of several types breaks the rules of each
    for detail in error.errors(include_url=False):
        *section, last = [str(part) for part in detail["loc"] or ("",)]
        name = ".".join([*section, last])
        if detail["type"] == "extra_forbidden":
            known = _keys(section)
            yield f"unknown key {name}{_nearest(last, known)}; known here: {', '.join(known)}"
        elif detail["type"] == "missing":
            yield f"{name} is missing; every run needs it"
        elif detail["type"] == "value_error":
            yield detail["msg"].removeprefix("Value error, ")
        else:
            key = ".".join(name.split(".")[: 1 if name.startswith("seed") else 2])
            rule = detail["msg"][0].lower() + detail["msg"][1:]
            rules.setdefault(f"{key} ({detail['input']!r})", []).append(rule)
    for key_and_value, broken in rules.items():
        yield f"{key_and_value}: {', or '.join(broken)}"


def _keys(section: list[str]) -> list[str]:
    inner: Any = Config
    for part in section:
        inner = inner.model_fields[part].annotation
    return list(inner.model_fields)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
