"""The sections of a configuration: type, default and description of each setting."""

import warnings
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    model_validator,
)
from pydantic.fields import FieldInfo

from ffdist.config.values import (
    Count,
    Folder,
    FolderUri,
    Fraction,
    NotNegative,
    Number,
    Positive,
    Uri,
    with_absolute_path,
)
from ffdist.ff import MAX_CLASSES as MAX_CLASSES
from ffdist.ff.specs import MAX_VALUE, LayerSpec, layer_entry, parse_layer

Included = Literal["xor", "digits", "mnist", "fashion_mnist", "cifar10", "breast_cancer", "covertype"]
Custom = Literal["parquet", "image_folder", "csv", "npz", "huggingface", "arrays"]
ARRAYS = "arrays"
"""`data.name` of samples that are given in Python."""
HUGGINGFACE_OPTIONS = ("path", "name", "revision")
"""Options of `data.name: huggingface`. Others change the type of the result, or, like `token`, must not be saved."""
PATHS = {
    "parquet": "a folder with train* and test*",
    "image_folder": "a folder with train* and test*",
    "csv": "a folder with train*.csv and test*.csv",
    "npz": "a file",
    "huggingface": "a folder that save_to_disk wrote; or data.options.path, a name on the Hub",
}
"""Meaning of `data.path`, by the `data.name` of custom datasets that need it."""
TABLES = ("parquet", "csv", "huggingface")
"""`data.name` of datasets with named columns of images and labels."""
FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""A function as `package.module:function`."""


class Section(BaseModel):
    """A section of the configuration. Unknown keys are errors, and values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def settings(cls, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
        """Yields the key and the description of each setting, including those of nested sections (`stop.patience`)."""
        for name, field in cls.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from field.annotation.settings(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field


class Data(Section):
    """The dataset and how its samples are presented to the network."""

    name: Literal[Included, Custom] | Annotated[str, Field(pattern=FUNCTION)]
    """The dataset. `xor` has the four cases of two bits. `breast_cancer` and `covertype` are tables. `parquet`,
    `image_folder`, `csv`, `npz` and `huggingface` read a custom dataset from `path`; `arrays` are given in Python,
    `train(config, data=...)`; and `package.module:function` calls a function that returns the same."""
    path: Folder | None = None
    """Folder of a custom dataset, which contains `train*`, `test*` and optionally `val*`: Parquet files, folders of
    them, CSV files, or one image folder per split. For `npz`, the file; for `huggingface`, a folder that
    `save_to_disk` wrote."""
    options: dict[str, Any] = {}
    """Keyword arguments of a function that `name` names. For `huggingface` without `path`: `path`, `name` and
    `revision` of a dataset on the Hub."""
    root: Folder | None = None
    """Folder of the datasets of torchvision and of `covertype`, which are downloaded if they are missing. Default: the
    environment variable FFDIST_DATA, or else ~/.cache/ffdist."""
    label: Literal["auto", "overwrite", "append", "everywhere", "none"] = "auto"
    """How the input contains the label: `overwrite` replaces the first C values for C classes, `append` adds C values,
    and `everywhere` adds C values to each local field of the first layer, or as constant planes to the input of a
    convolution. `none`: the input has no label. `auto`: `none` for objectives that need no negatives, otherwise
    `overwrite` for images and `append` for tables."""
    label_scale: Positive = 1.0
    """Scale of the label's one-hot values in the input, greater than 0. Pixels are in [0, 1], and the columns of tables
    have a standard deviation of 1."""
    subtract_mean: bool | Literal["auto"] = "auto"
    """Whether to subtract each image's own mean. `auto`: only for color images, because the paper does not do it
    for grayscale ones, and not with `standardize`."""
    jitter: Annotated[int, Number, Field(ge=0, le=MAX_VALUE)] = 0
    """Maximum random shift of each training image in pixels, vertically and horizontally, drawn anew in every epoch.
    At least 0, and less than the height and the width of the images."""
    flip: bool = False
    """Whether each training image is mirrored left to right with probability 1/2, drawn anew in every epoch."""
    standardize: bool = False
    """Whether to subtract from each channel of the images its mean in the training set, and to divide it by its
    standard deviation."""
    crop: Annotated[float, Number, Field(gt=0, le=1)] = 1.0
    """Smallest fraction of its area to which each training image is cropped, greater than 0. The crop is drawn anew in
    every epoch, with sides of a ratio from 3/4 to 4/3, and enlarged to the image's size. 1: no crop."""
    color: Annotated[float, Number, Field(ge=0, lt=1)] = 0.0
    """Largest random change of each training image's brightness, contrast and saturation, as a fraction; 0: none."""
    cutout: Annotated[int, Number, Field(ge=0, le=MAX_VALUE)] = 0
    """Side length in pixels of a square at a random place of each training image that is replaced by black, or with
    `standardize` by the mean of the training set. At least 0, and less than the height and the width of the images."""
    image_column: str | None = None
    """Column of the images, or of the names of image files (`csv`). Default: the only column with images, or, of a CSV
    file, the column named `file_name`, `file` or `path`. Without such a column, the data is a table of numbers."""
    label_column: str | None = None
    """Column of the labels. Default: the column named `label` or `labels`, or else the only column of integers; of a
    table, first the only column of strings."""
    image_size: tuple[Count, Count] | None = None
    """Height and width in pixels to which the images of a custom dataset are resized. Default: no resizing; all images
    must have the same size."""
    classes: Annotated[int, Number, Field(ge=2, le=MAX_CLASSES)] | None = None
    """Number of classes of a custom dataset, 2 to 256. Default: the number of class names, or else one more than the
    largest training label. Classes without training samples are reported."""

    @property
    def is_function(self) -> bool:
        """Whether `name` is a function to import, `package.module:function`."""
        return ":" in self.name

    @property
    def is_remote(self) -> bool:
        """Whether it is a dataset on Hugging Face's Hub."""
        return self.name == "huggingface" and "path" in self.options

    @property
    def is_loadable(self) -> bool:
        """Whether the samples can be loaded again without imports, downloads from the Hub and pickles."""
        has_pickles = self.name == "covertype" and self.root is not None
        return not (self.name == ARRAYS or self.is_function or self.is_remote or has_pickles)

    @model_validator(mode="after")
    def _check_path(self) -> "Data":
        if (self.path is None) == (self.name in PATHS and not self.is_remote):
            need = f"needs data.path, {PATHS[self.name]}" if self.path is None else "takes no data.path"
            raise ValueError(f"data.name={self.name} {need}")
        is_custom = self.name in (*PATHS, ARRAYS) or self.is_function
        for key in ("image_column", "label_column", "image_size", "classes"):
            is_allowed, noun = is_custom, "custom datasets"
            if key.endswith("column"):
                is_allowed, noun = self.name in TABLES, f"tables in files ({', '.join(TABLES)})"
            if getattr(self, key) is not None and not is_allowed:
                raise ValueError(f"data.{key} is for {noun} (data.name: {self.name}); leave it out")
        known = HUGGINGFACE_OPTIONS if self.is_remote else ()
        if not self.is_function and (unknown := [key for key in self.options if key not in known]):
            raise ValueError(
                f"data.options are those of a function, or {', '.join(HUGGINGFACE_OPTIONS)} of a dataset on the Hub "
                f"(data.name: {self.name}, given: {', '.join(unknown)}); leave them out"
            )
        return self


Threshold = Positive | Literal["units"]


LayerEntry = Annotated[LayerSpec, PlainValidator(parse_layer), PlainSerializer(layer_entry)]


class Model(Section):
    """The network."""

    layers: Annotated[list[LayerEntry], Field(min_length=1)]
    """Hidden layers, first layer first. Each is `{kind: ...}` with the settings of the kind, see below; a number is a
    dense layer with as many units."""
    goodness: Literal[
        "sum_of_squares",
        "mean_of_squares",
        "softmax",
        "minus_sum_of_squares",
        "minus_mean_of_squares",
        "minus_softmax",
    ] = "sum_of_squares"
    """Goodness function of the activations. Training makes it high for positive samples, or low with `minus_`."""
    threshold: Threshold | list[Threshold] = "units"
    """Goodness, before the sign of `minus_`, at which a sample is equally likely to be positive or negative: a number
    greater than 0, or `units` for the layer's number of units. One value for all layers, or a list with one per
    layer."""
    normalization: Literal["rms", "l2", "none"] = "rms"
    """Norm by which the input of each layer is divided, per sample: the root mean square, the L2 norm, or none."""
    predict_from: Count | Literal["auto"] | None = None
    """First layer, counted from 1, that predicts. The goodness or the class scores of the layers from this one to
    `predict_to` are summed, and the readout reads their activations. Default: 2, or 1 if that is the last one. `auto`:
    at the end of training, the consecutive layers with the least validation error by goodness or class scores are
    chosen (the fewest, and then the last ones, if several have it); until then, and by the readout, the default is
    used."""
    predict_to: Count | None = None
    """Last layer, counted from 1, that predicts. Default: the last layer."""
    readout: Literal["joint", "per_layer", "none"] = "joint"
    """Softmax readout of the predicting layers: `joint`: one for all of them; `per_layer`: one for each, trained with
    the layer in its process, whose logits are summed; `none`: labels are predicted by goodness or class scores only."""

    @model_validator(mode="after")
    def _check_layers(self) -> "Model":
        if self.predict_from == "auto" and self.predict_to is not None:
            raise ValueError(
                f"model.predict_from=auto chooses the last predicting layer as well (predict_to: {self.predict_to}); "
                f"leave model.predict_to out"
            )
        first = self.predict_from if isinstance(self.predict_from, int) else 1
        last = len(self.layers) if self.predict_to is None else self.predict_to
        if not first <= last <= len(self.layers):
            raise ValueError(
                f"model.predict_from and model.predict_to must be layers, 1 to {len(self.layers)}, in this order "
                f"(predict_from: {self.predict_from}, predict_to: {self.predict_to})"
            )
        if isinstance(self.threshold, list) and len(self.threshold) != len(self.layers):
            raise ValueError(
                f"model.threshold must be one value, or a list with one for each of the {len(self.layers)} layers "
                f"(given: {len(self.threshold)})"
            )
        return self


class Negatives(Section):
    """The negative data."""

    kind: str = "wrong_label"
    """Kind of negatives: `wrong_label`, `fixed`, `hard_label`, `all_wrong`, `hybrid`, `mixed`, `noise`, `permuted`, or
    a custom function, `package.module:function`. `none`, the default of objectives that need no negatives."""
    options: dict[str, Any] = {}
    """Options of the kind, by name: `blurs` and `threshold` of `hybrid`, `distribution` of `noise`, or those of a
    custom function."""
    actors: Count = 1
    """Number of actors that create negatives."""
    prefetch_chunks: Count = 4
    """Number of chunks whose negatives are requested ahead of the chunk that is trained on."""
    prediction_delay: Count = 200
    """Number of minibatches after which a label that the readout has drawn is used as a `hard_label`."""
    store: FolderUri | None = None
    """Folder, or its URI, from which negatives are read. Missing negatives are created and added to it."""

    @model_validator(mode="after")
    def _check_store(self) -> "Negatives":
        if self.kind == "hard_label" and self.store is not None:
            raise ValueError("negatives.kind=hard_label depends on the training and cannot be stored; leave store out")
        if self.kind == "none" and (self.store is not None or self.options):
            raise ValueError("negatives.kind=none makes no negatives; leave negatives.store and negatives.options out")
        return self


class Stop(Section):
    """Comparison of validations: choice of the best checkpoint, and early stopping."""

    metric: Literal["error", "readout_error", "balanced_error"] = "error"
    """Validation error that is compared, and that chooses the best checkpoint. `error`: by goodness, or by the readout
    if no label is tried. `balanced_error`: the mean over the classes of the fraction of their samples that are
    predicted wrong, for classes of different sizes."""
    patience: Count | None = None
    """Number of validations in a row without a new lowest error after which the run ends. Default: no limit."""
    target: Fraction | None = None
    """Error, in [0, 1), at which the run ends: as soon as a validation has at most this one. Default: none."""

    @property
    def is_active(self) -> bool:
        """Whether the run may end before all its epochs are done."""
        return self.patience is not None or self.target is not None


class Training(Section):
    """Training of the layers and the readout. Defaults are those of the paper's released code."""

    epochs: Count = 60
    """Number of passes over the training set; with `schedule=greedy`, per layer."""
    batch_size: Count = 100
    """Number of samples per minibatch, at most the size of the training set."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the layers' matrix products. Goodness, parameters and updates are float32. `auto`: bfloat16 if it is
    at least 1.5 times as fast as float32 on all devices of the run. This is measured once before the run starts, and
    recorded."""
    validation_samples: Annotated[int, Number, Field(ge=0)] | Literal["auto"] = "auto"
    """Number of training samples to hold out for validation, chosen by the seed; less than the size of the training
    set. 0: no validation. `auto`: a tenth of them, at most 10,000, or none if that would be fewer than 100."""
    validate_every_epochs: Count = 5
    """Number of epochs between validations. The last epoch is always validated."""
    stop: Stop = Stop()
    """Comparison of validations: choice of the best checkpoint, and early stopping."""
    callbacks: list[str] = []
    """Custom callbacks, each `package.module:Class`, which log metrics and may end the run at a validation. A resumed
    run may have others."""
    objective: str = "goodness"
    """Objective of the layers. `goodness`: high goodness of positive and low goodness of negative samples.
    `class_goodness`: each layer classifies the samples by the squares of its activations, so that every wrong class is
    a negative; `classifier`: by the activations themselves. These need no negatives, and no label is shown.
    `package.module:Class`: a subclass of `ffdist.ff.objectives.Objective`."""
    class_scores: Literal["learned", "groups"] = "learned"
    """How a layer with the objective `class_goodness` or `classifier` scores the classes: by a `learned` linear map,
    which belongs to the layer, or by `groups` of units, one for each class, with a learned factor."""
    pooled_features: Count = 2048
    """Largest number of values of a layer that a `learned` map of class scores, or the readout after a convolution,
    reads; larger maps are average-pooled."""
    label_smoothing: Fraction = 0.0
    """Probability in the target of class scores (`class_goodness`, `classifier`) that spreads evenly over all classes,
    in [0, 1)."""
    loss: Literal["logistic", "margin", "symmetric"] = "logistic"
    """Loss of the layers. `logistic` compares the goodness with the threshold; `symmetric` compares the positive and
    the negative goodness of a sample. `margin` is an alias of `logistic`, its name in a common PyTorch port."""
    alpha: Positive = 1.0
    """Factor on the margin (goodness minus threshold, or the difference of two goodness values) in the loss, greater
    than 0. Larger values make the loss sharper."""
    updates: Literal["joint", "alternating"] = "joint"
    """`joint`: one update for the positive and negative samples of a minibatch. `alternating`: one update for the
    positive samples, followed by one for the negative samples."""
    schedule: Literal["simultaneous", "greedy"] = "simultaneous"
    """`simultaneous`: all layers are trained at every minibatch. `greedy`: layers are trained one after another, each
    for all epochs; the readout is always trained, and its learning rate schedule restarts with each layer."""
    updates_per_minibatch: Count = 1
    """Number of times that each minibatch is used for an update before the next one."""
    optimizer: Literal["hinton", "sgd", "adam", "adamw"] = "hinton"
    """Optimizer of the layers: `hinton` is the update of the paper's released code; the others are those of torch."""
    learning_rate: NotNegative = 0.01
    """Learning rate of the layers, see learning_rate_schedule."""
    learning_rate_schedule: Literal["hinton", "cosine", "one_cycle", "steps", "constant"] = "hinton"
    """How the learning rates of layers and readout change from epoch to epoch. `hinton`: constant in the first half of
    the epochs, and then a linear decay; `cosine`: the first half of a cosine, to 0; `one_cycle`: half a cosine up from
    1/25 in the first 30% of the epochs, and then one to 0; `steps`: see learning_rate_steps."""
    learning_rate_steps: list[Count] = []
    """With `steps`: numbers of epochs after each of which the learning rates are multiplied by learning_rate_factor."""
    learning_rate_factor: Positive = 0.1
    """Factor on the learning rates at each of learning_rate_steps, greater than 0."""
    warmup_epochs: Annotated[int, Number, Field(ge=0, le=MAX_VALUE)] = 0
    """Number of epochs at the start, fewer than all, in which the learning rates rise linearly to the schedule's."""
    weight_decay: NotNegative = 0.001
    """Weight decay of the layers: decoupled from the gradient with `hinton` and `adamw`, an L2 penalty with `sgd` and
    `adam`."""
    readout_learning_rate: NotNegative = 0.1
    """Learning rate of the readout, see learning_rate_schedule."""
    readout_weight_decay: NotNegative = 0.003
    """Weight decay of the readout, decoupled from the gradient."""
    similarity: NotNegative = 0.0
    """Weight of a loss that is added to the objective of each layer: the mean square of the differences between the
    similarities of the samples of a minibatch and those of their labels (Nokland and Eidnes 2019)."""
    contrast: NotNegative = 0.0
    """Weight of a loss that is added to the objective of each layer: the supervised contrastive loss (Khosla et al.
    2020)."""
    clip_norm: Positive | None = None
    """Largest L2 norm of the gradient of all parameters of a layer together; a longer gradient is scaled down to it.
    Default: no limit."""
    momentum: Fraction = 0.9
    """Momentum of `hinton`, `sgd` and the readout, and the first of the `betas` of `adam` and `adamw`, in [0, 1)."""
    peer_normalization: NotNegative = 0.03
    """Strength of the regularization that pulls each unit's mean activity towards the mean of its layer. 0: none, the
    default of `class_goodness` and `classifier`."""

    @model_validator(mode="after")
    def _check_warmup(self) -> "Training":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"training.warmup_epochs must be fewer than all epochs (warmup_epochs: {self.warmup_epochs}, epochs: "
                f"{self.epochs})"
            )
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> "Training":
        if (self.learning_rate_schedule == "steps") != bool(self.learning_rate_steps):
            raise ValueError(
                f"training.learning_rate_steps are for training.learning_rate_schedule=steps, which needs them "
                f"(schedule: {self.learning_rate_schedule}, steps: {self.learning_rate_steps}); give both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _check_stop(self) -> "Training":
        if self.stop.is_active and self.schedule == "greedy":
            raise ValueError(
                f"training.stop would end training.schedule=greedy before all layers are trained (patience: "
                f"{self.stop.patience}, target: {self.stop.target}); set both to null, or schedule to simultaneous"
            )
        return self


class Pipeline(Section):
    """Distribution of the work. Only threads_per_stage, device and executor affect results: their last bits."""

    stages: Count | Literal["auto"] = "auto"
    """Number of stages, at most the number of layers. `auto`: one per layer, or one per GPU if there are fewer GPUs."""
    balance: Literal["measured", "estimated"] | list[Count] = "measured"
    """How layers are assigned to stages. `measured` and `estimated` minimize the time of the slowest stage, from costs
    that are measured before the run starts and the size of messages, or from the number of weights. A list gives the
    number of layers of each stage."""
    chunk_size: Count | Literal["auto"] = "auto"
    """Number of minibatches per chunk, the unit of transfer. `auto`: 0.35 s of the slowest stage's time, or 20 without
    measured costs, limited by 32 MiB per message, `checkpoint.every_minibatches` and, with hard labels,
    `negatives.prediction_delay`."""
    max_in_flight: Count | Literal["auto"] = "auto"
    """Maximum number of chunks in flight. `auto`: the number of stages plus 3. With hard labels, all chunks in flight
    have at most `negatives.prediction_delay` minibatches."""
    threads_per_stage: Count = 1
    """Number of torch threads of each stage and of the readout. It affects the last bits of results."""
    executor: Literal["eager", "fused"] = "eager"
    """How layers compute. `eager`: torch's operations. `fused`: kernels that do several of them at once, for dense and
    local layers on CPUs with a sum or mean of squares as goodness, the optimizer `hinton` and one update per minibatch,
    and for convolutions on CPUs with a batch norm, `relu` and learned class scores; other layers are trained as with
    `eager`. It affects the last bits of results."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the stages and the readout. `auto`: GPUs if the cluster has any."""
    max_failures: Annotated[int, Number, Field(ge=0)] = 5
    """Maximum number of lost actors or nodes within `failure_window_s`. 0: the first loss ends the run."""
    failure_window_s: Positive = 3600.0
    """Time in seconds after which a failure no longer counts."""
    stall_timeout_s: Positive = 300.0
    """Time in seconds without progress after which an actor counts as lost."""
    stop_timeout_s: Positive = 20.0
    """Time in seconds that the platform grants from a stop signal to the end of the process. The last checkpoint may
    take all but 5 seconds of it, and at least half."""


class Checkpoint(Section):
    """Checkpoints of a run."""

    keep_last: Count = 2
    """Number of newest checkpoints to keep, in addition to the best one on validation."""
    every_minibatches: Count | None = None
    """Number of minibatches between checkpoints. Default: checkpoints are taken by time only."""
    every_s: Positive | None = 60.0
    """Time in seconds between checkpoints. `null`: checkpoints are not taken by time."""
    uri: FolderUri | None = None
    """Folder, or its URI, in which each run gets a folder of checkpoints. Default: the run's own folder."""


OWN_TAGS = ("cluster", "folder", "pipeline", "precision", "resumed", "stopped", "weights_sha256")
"""Tags that ffdist sets."""
FREE_MLFLOW_TAGS = ("mlflow.note.content", "mlflow.source.")
"""MLflow's own tags that users may set: the description, and the source."""


def _text(value: Any) -> Any:
    """Returns numbers and booleans of YAML as text."""
    return str(value) if isinstance(value, int | float) else value


warnings.filterwarnings("ignore", 'Field name "register" in "Tracking" shadows')  # a class method that is not used


class Tracking(Section):
    """Experiment tracking by MLflow."""

    uri: Annotated[Uri, AfterValidator(with_absolute_path)] | None = None
    """URI of the tracking server or database; `none` switches MLflow off. Default: the environment variable
    MLFLOW_TRACKING_URI, or else a database in the runs folder."""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """MLflow experiment of the run, 1 to 500 characters. Default: that of an active MLflow run in this process, or the
    environment variable MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, or else `ffdist`."""
    name: Annotated[str, Field(pattern=r"^[^/\x00]+$", max_length=250)] | None = None
    """Name of the run in MLflow, and start of the name of its folder, without /. Default: both are named after the
    configuration and the time."""
    tags: dict[str, Annotated[str, BeforeValidator(_text)]] = {}
    """MLflow tags of the run, by name."""
    log_every_minibatches: Count = 100
    """Number of minibatches that each logged value of a training metric averages over."""
    artifacts: list[Literal["plots", "model", "checkpoints"]] = ["plots", "model"]
    """Artifacts to make and log: plots, the network as an MLflow model, and the network of each new best checkpoint as
    one, too."""
    also: list[Literal["csv", "tensorboard"]] = []
    """Other places that get all metrics, in the run's folder: `metrics.csv`, and event files in `tensorboard/` (needs
    the package tensorboard)."""
    register: Annotated[str, Field(pattern=r"^[^/:.\s][^/:]*$")] | None = None
    """Name of the registered MLflow model to which the network is added as a new version, without / and :. Default: the
    network is not registered."""
    outbox_bytes: Annotated[int, Number, Field(ge=1)] = 100_000_000
    """Approximate limit in bytes on the metrics that wait in the run's folder while the server is unreachable. Beyond
    it, every other one is dropped."""
    flush_timeout_s: NotNegative = 30.0
    """Time in seconds that a finished run waits for the upload of pending data."""

    @model_validator(mode="after")
    def _check_tags(self) -> "Tracking":
        for name in self.tags:
            if name in OWN_TAGS or (name.startswith("mlflow.") and not name.startswith(FREE_MLFLOW_TAGS)):
                raise ValueError(
                    f"tracking.tags must not set what ffdist or MLflow sets (given: {name}; reserved: "
                    f"{', '.join(OWN_TAGS)}, and names that start with mlflow.); choose another name"
                )
        return self

    @model_validator(mode="after")
    def _check_register(self) -> "Tracking":
        if self.register is not None and "model" not in self.artifacts:
            raise ValueError(
                f"tracking.register needs a model (tracking.artifacts: {self.artifacts}); add model to "
                "tracking.artifacts, or leave register out"
            )
        return self


class Reference(Section):
    """Errors to compare with the run in the table of results. They do not affect training."""

    paper_error: Fraction | None = None
    """Test error that the paper reports for the experiment, in [0, 1)."""
    target_error: Fraction | None = None
    """Test error to reach, in [0, 1): by goodness or class scores, or by a fitted readout if there are neither."""
