"""The sections of a configuration: each setting with its type, its default and what it means."""

import os
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Union
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from ffdist.ff import MOST_CLASSES as MOST_CLASSES


def _no_boolean(value: Any) -> Any:
    """Keeps YAML's yes and no from counting as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"a number is needed here, not {value}")
    return value


SECRETS = ("key", "token", "secret", "password", "pwd", "credential", "sig")
"""Words in the names of what a URI must not hold."""


def hold_no_secret(uri: str) -> str:
    """Returns a URI, which will be written to files and to MLflow, if it may be.

    Raises:
        ValueError: There is a password or a key in it, which the text does not repeat.
    """
    parts = urlsplit(uri)
    named = {name.lower() for name, _ in parse_qsl(parts.query)}
    named_only = parts.scheme in ("http", "https") and parts.username  # which may be a token
    if parts.password or named_only or any(word in name for name in named for word in SECRETS):
        raise ValueError(
            f"a URI must hold no password or key, because it is written down (scheme: {parts.scheme}, host: "
            f"{parts.hostname}); give it by the environment, such as MLFLOW_TRACKING_PASSWORD or AWS_SECRET_ACCESS_KEY"
        )
    return uri


Number = BeforeValidator(_no_boolean)
MOST = 10**9
"""Beyond it float32, the clock's limits and memory end."""
Count = Annotated[int, Number, Field(ge=1, le=MOST)]


def _absolute(path: str) -> str:  # because what is written down is read from elsewhere
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111, the latter raises


def absolute_store(uri: str) -> str:
    """Returns a tracking URI with an absolute path, because it is written down and read in other working folders."""
    if uri.startswith("sqlite:///"):
        return "sqlite:///" + _absolute(uri.removeprefix("sqlite:///"))
    if uri.startswith("file:") and not uri.startswith("file:/"):
        return Path(_absolute(uri.removeprefix("file:"))).as_uri()
    return uri if ":" in uri or uri.startswith("databricks") else _absolute(uri)


Uri = Annotated[str, AfterValidator(hold_no_secret)]
Place = Annotated[Uri, AfterValidator(lambda uri: uri if "://" in uri else _absolute(uri))]
Fraction = Annotated[float, Number, Field(ge=0, lt=1)]
Positive = Annotated[float, Number, Field(gt=0, le=MOST, allow_inf_nan=False)]
NotNegative = Annotated[float, Number, Field(ge=0, le=MOST, allow_inf_nan=False)]
Folder = Annotated[Path, AfterValidator(lambda path: Path(_absolute(str(path))))]

DATA_FOLDERS = ("parquet", "image_folder")


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Section):
    """What is learned."""

    name: Literal["xor", "digits", "mnist", "fashion_mnist", "cifar10", "parquet", "image_folder"]
    """The dataset; `xor` has the four cases of two bits, `parquet` and `image_folder` read `path`."""
    path: Folder | None = None
    """Folder with `train*` and `test*` in it: Parquet files or folders of them, or one image folder per split."""
    root: Folder | None = None
    """Where torchvision's datasets are, or are downloaded to; without it FFDIST_DATA, else ~/.cache/ffdist."""
    label: Literal["overwrite", "append", "everywhere", "none"] = "overwrite"
    """How the input shows the label: in place of the first C values, as C more, as C more in each local field of the
    first layer, or not at all (unsupervised: only the readout learns labels)."""
    label_scale: Positive = 1.0
    """Value that stands for the label, as pixels count from 0 to 1."""
    center: bool | Literal["auto"] = "auto"
    """Whether every image's mean is taken off its pixels, as large as it would else drown what they show; `auto`: of
    images in colour, because the paper's recipes for grey ones do not."""
    jitter: Annotated[int, Number, Field(ge=0, le=MOST)] = 0
    """Most pixels that each training image is shifted, down or up and right or left, afresh every epoch; less than its
    height and width."""
    image_column: str | None = None
    """Parquet's column of images; found where there is only one candidate."""
    label_column: str | None = None
    """Parquet's column of labels; without it the one named `label` or `labels`, else the only one of integers."""
    image_size: tuple[Count, Count] | None = None
    """Height and width that images of one's own are resized to; without it all must have the same."""
    classes: Annotated[int, Number, Field(ge=2, le=MOST_CLASSES)] | None = None
    """Number of classes of one's own data; else as many as have names, or one more than the largest training label.
    Those without training samples are reported."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> "Data":
        if (self.path is None) == (self.name in DATA_FOLDERS):
            need = "needs data.path, a folder with train* and test*" if self.path is None else "takes no data.path"
            raise ValueError(f"data.name={self.name} {need}")
        for key in ("image_column", "label_column", "image_size", "classes"):
            if getattr(self, key) is not None and self.path is None:
                raise ValueError(f"data.{key} is for images of one's own (data.name: {self.name}); leave it out")
        return self


Threshold = Positive | Literal["units"]


class LocalLayer(Section):
    """A layer whose units read fields of the map below, without weight sharing."""

    kind: Literal["local"]
    grid: Count
    """Places in each direction; the fields lie centred on the map, and are clipped at its border."""
    stride: Count = 1
    """Values of the map from one field to the next."""
    field: Count
    """Side of a field, in values of the map."""
    units: Count
    """Units of each place."""


LayerEntry = Annotated[
    Union[Annotated[Count, Tag("dense")], Annotated[LocalLayer, Tag("local")]],  # noqa: UP007, pydantic's way
    Discriminator(lambda entry: "local" if isinstance(entry, dict | LocalLayer) else "dense"),
]


class Model(Section):
    """The network."""

    layers: Annotated[list[LayerEntry], Field(min_length=1)]
    """Each hidden layer, lowest first: the units of a dense one, or `{kind: local, grid, stride, field, units}`."""
    goodness: Literal[
        "sum_of_squares",
        "mean_of_squares",
        "softmax",
        "minus_sum_of_squares",
        "minus_mean_of_squares",
        "minus_softmax",
    ] = "sum_of_squares"
    """What positives are to have much of, and with `minus_` little."""
    threshold: Threshold | list[Threshold] = "units"
    """The goodness, before any minus, at which a row is as likely positive as negative: a number, or as many as the
    layer has units; one for all layers, or a list of one for each."""
    normalization: Literal["rms", "l2", "none"] = "rms"
    """What every row is divided by before a layer reads it: its root mean square, its length, or nothing."""
    predict_from: Count | None = None
    """First layer, counted from 1, that goodness and readout look at; 2, or 1 where there is only one."""

    @model_validator(mode="after")
    def _layers_are_there(self) -> "Model":
        if self.predict_from is not None and self.predict_from > len(self.layers):
            raise ValueError(
                f"model.predict_from must be one of the {len(self.layers)} layers (predict_from: {self.predict_from})"
            )
        if isinstance(self.threshold, list) and len(self.threshold) != len(self.layers):
            raise ValueError(
                f"model.threshold must be one, or one for each of the {len(self.layers)} layers "
                f"(given: {len(self.threshold)})"
            )
        return self


class Negatives(Section):
    """The negative data."""

    kind: str = "wrong_label"
    """`wrong_label`, `fixed`, `hard_label`, `all_wrong`, `hybrid`, `noise`, `permuted`, or one's own
    `package.module:function`."""
    options: dict[str, Any] = {}
    """What the kind takes, by name: `blurs` and `threshold` of `hybrid`, `distribution` of `noise`, one's own."""
    actors: Count = 1
    """Actors that make them."""
    ahead: Count = 4
    """Chunks whose negatives are asked for before the chunk is."""
    prediction_delay: Count = 200
    """Minibatches after which a label that the readout drew becomes a sample's `hard_label`."""
    store: Place | None = None
    """Folder, or URI of one, that negatives are read from and, where it lacks them, added to."""

    @model_validator(mode="after")
    def _hard_labels_are_not_stored(self) -> "Negatives":
        if self.kind == "hard_label" and self.store is not None:
            raise ValueError("negatives.kind=hard_label depends on the training and cannot be stored; leave store out")
        return self


class Training(Section):
    """How layers and readout learn; defaults are those of the paper's released code."""

    epochs: Count = 60
    """Passes over the training set; with `schedule=greedy` of each layer."""
    batch_size: Count = 100
    """Samples a minibatch, and an update."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the layers' matrix products; goodness, parameters and updates are float32. `auto`: bfloat16 if all
    devices of the run multiply it faster than float32, measured once before the start; the run records the result."""
    validation_samples: Annotated[int, Number, Field(ge=0)] = 0
    """Samples held out of the training set by the seed; 0 evaluates nothing before the end."""
    evaluate_every: Count = 5
    """Epochs from one validation to the next."""
    loss: Literal["logistic", "margin", "symmetric"] = "logistic"
    """Of goodness above and below the threshold, or (`symmetric`) of the difference in each pair of a sample's rows;
    `margin` is the common PyTorch port's name for `logistic`."""
    alpha: Positive = 1.0
    """Sharpness of the loss, which is taken of `alpha` times the margin, goodness minus threshold."""
    updates: Literal["joint", "alternating"] = "joint"
    """Whether positive and negative rows of a minibatch make one update, or one after the other one each."""
    schedule: Literal["simultaneous", "greedy"] = "simultaneous"
    """Whether all layers learn at every minibatch, or layer after layer, each for all epochs; the readout always does,
    and its rate begins anew with each layer's."""
    repeats: Count = 1
    """Times that a minibatch is learned from before the next."""
    optimizer: Literal["release", "sgd", "adam", "adamw"] = "release"
    """How the layers follow their gradient: as the paper's released code does, or torch's optimizer of that name."""
    learning_rate: NotNegative = 0.01
    """Step of the layers along their gradient, falling in the second half of their epochs."""
    weight_decay: NotNegative = 0.001
    """Share of a layer's weight taken off per unit of learning rate; of `sgd` and `adam` a part of the gradient."""
    readout_learning_rate: NotNegative = 0.1
    """The same of the readout."""
    readout_weight_decay: NotNegative = 0.003
    """The same of the readout."""
    smoothing: Fraction = 0.9
    """Weight of the past in the running mean of gradients; torch's `momentum`, and the first of its `betas`."""
    peer_normalization: NotNegative = 0.03
    """Pull of each unit's mean activity towards the mean of its layer."""


class Pipeline(Section):
    """How the work is spread; nothing here changes a result, except threads_per_stage and device in the last bits."""

    stages: Count | Literal["auto"] = "auto"
    """Number of stages; `auto`: one a layer, or one a GPU where there are fewer GPUs."""
    balance: Literal["measured", "estimated"] | list[Count] = "measured"
    """How layers are cut into stages: for the fastest slowest stage by what each layer costs, measured before
    the start, or estimated by its weights; or the number of layers of each stage."""
    chunk_size: Count | Literal["auto"] = "auto"
    """Minibatches that travel together; `auto`: what takes the slowest stage a third of a second, or 20 where nothing
    is measured, but no message of more than 32 MiB, no more than `checkpoint.every_minibatches`, and, with hard labels,
    few enough that a chunk is under way in every stage."""
    max_in_flight: Count | Literal["auto"] = "auto"
    """Chunks admitted and not yet done; `auto`: one for each stage, and three. With hard labels never more than
    `negatives.prediction_delay` has room for."""
    threads_per_stage: Count = 1
    """torch's threads in a stage, and in the readout; part of the order of sums."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where stages and readout compute; `auto`: on GPUs where the cluster has some."""
    max_failures: Annotated[int, Number, Field(ge=0)] = 5
    """Lost actors or nodes, within `failure_window_s`, after which the run goes on from its last commit."""
    failure_window_s: Positive = 3600.0
    """Time after which a failure is forgotten."""
    stall_timeout_s: Positive = 300.0
    """Longest that an actor may do nothing before it counts as lost."""
    stop_timeout_s: Positive = 20.0
    """Time from a stop signal to the end of the process, as the platform grants it; the last checkpoint may take all of
    it but 5 seconds."""


class Checkpoint(Section):
    """What is kept of a run."""

    keep: Count = 2
    """Newest commits kept, beside the one that did best on validation."""
    every_minibatches: Count | None = None
    """Minibatches from one commit to the next; without it time alone decides."""
    every_s: Positive | None = 60.0
    """Seconds from one commit to the next."""
    uri: Place | None = None
    """Folder, or URI of one, that gets a folder of commits for each run; without it they lie in the run's own."""


warnings.filterwarnings("ignore", 'Field name "register" in "Tracking" shadows')  # of a class method that nobody needs


class Tracking(Section):
    """MLflow."""

    uri: Annotated[Uri, AfterValidator(absolute_store)] | None = None
    """Tracking server or database; without it MLFLOW_TRACKING_URI, else a database in the runs folder."""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] = "ffdist"
    """MLflow experiment that the run belongs to."""
    every_minibatches: Count = 100
    """Minibatches that a logged learning metric is averaged over."""
    artifacts: list[Literal["plots", "model"]] = ["plots", "model"]
    """What a run leaves beside its metrics and checkpoints: plots, and the network as a model of MLflow."""
    register: Annotated[str, Field(pattern=r"^[^/:.\s][^/:]*$")] | None = None
    """Name, without / and :, of a registered model of MLflow that gets the run's network as a new version."""
    outbox_bytes: Annotated[int, Number, Field(ge=1)] = 100_000_000
    """About how much may wait in the run's folder for a server that is away; beyond it points are thinned out."""
    flush_timeout_s: NotNegative = 30.0
    """Time that the end of a run waits for the server to take what is left."""
    paper_error: Fraction | None = None
    """Test error that the paper gives for the experiment, in [0, 1); stands in the table of results."""
    target_error: Fraction | None = None
    """Test error to be reached by goodness, or, where no label is shown, by a fitted readout; stands there, too."""

    @model_validator(mode="after")
    def _model_to_register(self) -> "Tracking":
        if self.register is not None and "model" not in self.artifacts:
            raise ValueError(
                f"tracking.register needs a model (tracking.artifacts: {self.artifacts}); add model to "
                "tracking.artifacts, or leave register out"
            )
        return self
