"""Datasets that are given in Python: arrays, tensors, torch datasets, and files of arrays."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ffdist.config.sections import Data
from ffdist.console import track
from ffdist.data.images import Sample
from ffdist.data.listing import SPLIT_NAMES
from ffdist.data.readers import Encoded, LabelCheck, Origin, Splits, check_classes, read_encoded
from ffdist.errors import ConfigError
from ffdist.ff.custom import import_custom
from ffdist.storage.paths import kind_of, printable

TEST_FRACTION = 0.2
"""Fraction of the samples that are held out as a test set if none is given."""
HELD_OUT = "a fifth of the samples, stratified by class and chosen by the seed, is the test set"
COPY_BYTES = 2**24
"""Approximate size of the blocks in which inputs are copied."""
NPZ_NAMES = {"train": "train", "validation": "val", "test": "test"}
"""Names of the splits in the names of the arrays of an .npz file."""


class _Arrays(NamedTuple):
    """Inputs and labels of a split, as they are given."""

    inputs: np.ndarray[Any, Any]
    """Images `[N, C, H, W]`, or rows of a table `[N, D]`; may share memory with what the user gave."""
    labels: list[Any]
    """Integers or strings."""
    columns: tuple[str, ...]
    """Names of the columns of a table, or empty."""


def read_given(data: Any, config: Data, *, seed: int) -> Splits:
    """Returns a dataset that is given in Python, as a copy.

    Args:
        data: `(inputs, labels)`, a torch `Dataset` of such pairs, or a dict of either with the keys `train`, `test`
            and, optionally, `validation`. Without a dict, a fifth of the samples becomes the test set.
        config: Section `data` of the configuration.
        seed: Seed of the run, which chooses the test set.

    Raises:
        ConfigError: The data has another form, or a sample is invalid. The message states the rule and the fix.
    """
    parts = dict(data) if isinstance(data, Mapping) else {"train": data}
    if isinstance(data, Mapping) and not {"train", "test"} <= parts.keys() <= SPLIT_NAMES.keys():
        raise ConfigError(
            f"a dict of data must have the keys train, test and, optionally, validation (keys: "
            f"{', '.join(map(str, parts))})"
        )
    parts = {split: _pair_images(parts[split], split) for split in SPLIT_NAMES if split in parts}
    given = parts["train"]
    arrays = {split: _to_arrays(part, split) for split, part in parts.items() if not _holds_images(part, split)}
    if len(arrays) == len(parts) and not _must_resize(arrays, config):
        return _read_arrays(arrays, given, config, seed)
    for split, each in arrays.items():
        if each.inputs.ndim != 4:
            raise ConfigError(f"all splits must hold images, or all must hold rows of tables ({split}: a table)")
        parts[split] = _PairDataset(_PillowImages(each.inputs), each.labels)
    splits = _read_images(parts, given, config)
    return _hold_out_test(splits, seed) if len(parts) == 1 else splits


def _read_arrays(arrays: dict[str, _Arrays], train: Any, config: Data, seed: int) -> Splits:
    first, samples, labels = arrays["train"], {}, {}
    names, notes = _class_names(train, first.labels), tuple[str, ...]()
    check_classes(names, "the training labels", config)
    rows = {split: np.arange(len(each.inputs)) for split, each in arrays.items()}
    if len(arrays) == 1:
        arrays, rows, notes = {"train": first, "test": first}, _test_rows(first.labels, seed), (HELD_OUT,)
    check, to_class = LabelCheck(config, names), _class_numbers(names, first.labels[0])
    for split, each in arrays.items():
        if each.inputs.shape[1:] != first.inputs.shape[1:]:
            raise ConfigError(
                f"all splits must have samples of one shape (train: {list(first.inputs.shape[1:])}, {split}: "
                f"{list(each.inputs.shape[1:])})"
            )
        if each.columns != first.columns:
            raise ConfigError(f"all splits must have the same columns in the same order ({split} differs from train)")
        numbers = [to_class(label) for label in each.labels]
        check(numbers, f"{split} labels", 0)
        check.end_of_split(numbers)
        labels[split] = torch.tensor(numbers)[rows[split]]
        samples[split] = _copy(each, rows[split], split)
    kind = "table" if first.inputs.ndim == 2 else "image"
    return Splits(samples, labels, names, Origin(features=first.columns, notes=notes), kind)


def read_npz(config: Data) -> Splits:
    """Reads the arrays of an .npz file, named as by Keras (`x_train`, ...) or MedMNIST (`train_images`, ...).

    Raises:
        ConfigError: The file cannot be read, or lacks arrays.
    """
    assert config.path is not None, "checked by the configuration"
    path, parts, names = config.path, {}, list[str]()
    if kind_of(path) != "file":
        raise ConfigError(f"data.path must be an .npz file (no file: {printable(path)})")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            for split, part in NPZ_NAMES.items():
                for inputs, labels in ((f"x_{part}", f"y_{part}"), (f"{part}_images", f"{part}_labels")):
                    if inputs in arrays and labels in arrays:
                        parts[split] = arrays[inputs], arrays[labels]
    except Exception as error:  # damaged files raise errors of many kinds
        raise ConfigError(
            f"{printable(path)} cannot be read as an .npz file of numbers and strings ({error}); write it again with "
            f"numpy.savez, without Python objects"
        ) from error
    if not {"train", "test"} <= parts.keys():
        raise ConfigError(
            f"{printable(path)} must have the arrays x_train, y_train, x_test and y_test, or train_images, "
            f"train_labels, test_images and test_labels (arrays: {', '.join(names[:20])})"
        )
    return read_given(parts, config, seed=0)


def call_function(config: Data, *, seed: int) -> Any:
    """Returns the result of the function that `data.name` names, a form of data that `read_given` reads.

    It gets `data.options` as keyword arguments, and the seed of the run, if it has a parameter `seed`.

    Raises:
        ConfigError: It cannot be imported, takes other arguments, or fails.
    """
    try:
        function = import_custom(config.name)
        signature = inspect.signature(function)
    except Exception as error:  # a custom module may raise anything
        raise ConfigError(
            f"data.name={config.name} cannot be imported as a function ({type(error).__name__}: {error})"
        ) from error
    options = ({"seed": seed} if "seed" in signature.parameters else {}) | config.options
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"data.options do not fit {config.name}{signature} ({error}); correct them") from error
    try:
        return function(**options)
    except Exception as error:  # it may raise anything
        raise ConfigError(f"data.name={config.name} raised {type(error).__name__}: {error}") from error


class _PairDataset(Dataset[tuple[Any, Any]]):
    """Inputs and their labels."""

    def __init__(self, inputs: Any, labels: Sequence[Any]) -> None:
        self._inputs, self._labels = inputs, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._inputs[index], self._labels[index]


class _PillowImages:
    """Images `[N, C, H, W]` as a sequence of Pillow images."""

    def __init__(self, images: np.ndarray[Any, Any]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:
        image = self._images[index]
        return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def _must_resize(arrays: Mapping[str, _Arrays], config: Data) -> bool:
    """Returns whether all splits hold images, and some have another size than `data.image_size`."""
    shapes = [each.inputs.shape for each in arrays.values()]
    are_images = config.image_size is not None and all(len(shape) == 4 for shape in shapes)
    return are_images and any(shape[2:] != config.image_size for shape in shapes)


def _pair_images(part: Any, split: str) -> Any:
    """Returns data as it is, or, of a list of Pillow images and their labels, a torch Dataset."""
    if not isinstance(part, tuple | list) or len(part) != 2 or not isinstance(part[0], tuple | list):
        return part
    images, labels = part
    if not any(isinstance(image, Image.Image) for image in images):
        return part
    labels = _to_labels(labels, split)
    _check_lengths(len(images), len(labels), split)
    return _PairDataset(images, labels)


def _holds_images(part: Any, split: str) -> bool:
    """Returns whether data is a torch Dataset of Pillow images."""
    if not isinstance(part, Dataset) or not hasattr(part, "__len__") or not len(part):
        return False
    return isinstance(_item(part, 0, split)[0], Image.Image)


def _read_images(parts: Mapping[str, Any], given: Any, config: Data) -> Splits:
    """Reads torch datasets of Pillow images, such as torchvision's; `given` is the training set as it was given."""

    def samples(dataset: Any, split: str) -> Iterator[Sample]:
        for index in range(len(dataset)):
            image, label = _item(dataset, index, split)
            yield Sample(image, to_class(label), f"{split}[{index}]")

    train = parts["train"]
    first_label = _item(train, 0, "train")[1]
    labels = [_item(train, index, "train")[1] for index in range(len(train))] if isinstance(first_label, str) else [0]
    names = _class_names(given, labels)
    check_classes(names, "the training labels", config)
    to_class = _class_numbers(names, first_label)
    encoded = {split: Encoded(samples(part, split), len(part)) for split, part in parts.items()}
    return read_encoded(config, encoded, names, Origin())


def _item(dataset: Any, index: int, split: str) -> tuple[Any, Any]:
    """Returns an input and its label, which may be an array or a tensor without dimensions."""
    try:
        item = dataset[index]
    except Exception as error:  # it may raise anything
        raise ConfigError(f"{split}[{index}] cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ConfigError(
            f"{split}[{index}]: the items of a torch Dataset must be pairs of an input and a label (given: "
            f"{type(item).__name__})"
        )
    label = item[1]
    if not isinstance(label, np.generic | np.ndarray | Tensor):
        return item[0], label
    if math.prod(label.shape) != 1:
        raise ConfigError(
            f"{split}[{index}]: a label must be one integer or string (shape: {list(label.shape)}); convert one-hot "
            f"labels by argmax"
        )
    return item[0], label.item()


def _class_numbers(names: Sequence[str], first_label: Any) -> Callable[[Any], Any]:
    """Returns a function that converts a label to the number of its class; it returns unknown ones as they are.

    All labels are names if the first one is.
    """
    by_name: dict[Any, int] = {name: number for number, name in enumerate(names)}
    are_names = isinstance(first_label, str)

    def to_class(label: Any) -> Any:
        label = str(label) if are_names else label
        return by_name.get(label, label) if isinstance(label, str) else label

    return to_class


def _class_names(part: Any, labels: list[Any]) -> list[str]:
    """Returns the names of the classes: the training labels if they are strings, else `classes` of a torch Dataset."""
    strings = {label for label in labels if isinstance(label, str)}
    classes = getattr(part, "classes", None) if isinstance(part, Dataset) else None
    if not strings and isinstance(classes, tuple | list) and all(isinstance(name, str) for name in classes):
        return list(classes)
    return sorted(strings)


def _to_arrays(part: Any, split: str) -> _Arrays:
    if isinstance(part, Dataset):
        part = _stack(part, split)
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise ConfigError(
            f"the {split} data must be a pair (inputs, labels) or a torch Dataset of such pairs (given: "
            f"{type(part).__name__})"
        )
    inputs, columns = part[0], tuple(map(str, getattr(part[0], "columns", ())))
    labels = _to_labels(part[1], split)
    array = _to_layout(_to_array(inputs), split)
    _check_lengths(len(array), len(labels), split)
    return _Arrays(array, labels, columns)


def _check_lengths(num_inputs: int, num_labels: int, split: str) -> None:
    if num_inputs != num_labels or not num_labels:
        raise ConfigError(
            f"the {split} data must have a label for each input (inputs: {num_inputs}, labels: {num_labels})"
        )


def _stack(dataset: Any, split: str) -> tuple[Any, list[Any]]:
    """Returns the inputs of a torch Dataset as one array, and its labels."""
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise ConfigError(f"the {split} data must be a torch Dataset with a length and at least one item")
    first = _to_array(_item(dataset, 0, split)[0])
    inputs, labels = np.empty((len(dataset), *first.shape), first.dtype), []
    for index in track(range(len(dataset)), f"reading {split} data"):
        value, label = _item(dataset, index, split)
        array = _to_array(value)
        if array.shape != first.shape or array.dtype != first.dtype:
            raise ConfigError(
                f"{split}[{index}]: all inputs must be of one shape and type (first: {list(first.shape)}, "
                f"{first.dtype}; this: {list(array.shape)}, {array.dtype})"
            )
        inputs[index] = array
        labels.append(label)
    return inputs, labels


def _to_array(values: Any) -> np.ndarray[Any, Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ConfigError(f"data must be arrays, tensors or lists of equal lengths ({error})") from error


def _to_layout(array: np.ndarray[Any, Any], split: str) -> np.ndarray[Any, Any]:
    """Returns a view of images as `[N, C, H, W]`, or rows of a table `[N, D]` as they are."""
    given, is_image = f"{split}: {array.dtype} {list(array.shape)}", array.dtype == np.uint8
    if array.ndim == 2 and array.dtype.kind in "biuf" and not is_image:
        return array
    if array.ndim == 2 and is_image:
        raise ConfigError(
            f"uint8 of shape [N, D] may be images or a table ({given}); reshape images to [N, H, W], and convert a "
            f"table to float32"
        )
    if array.ndim not in (3, 4) or not is_image:
        raise ConfigError(
            f"inputs must be images, uint8 of shape [N, H, W], [N, C, H, W] or [N, H, W, C], or a table, numbers of "
            f"shape [N, D] ({given}); convert pixels from 0 to 1 by (255 * images).round() to uint8"
        )
    if array.ndim == 3:
        return array[:, np.newaxis]
    is_first, is_last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
    if is_first == is_last:
        raise ConfigError(
            f"images must have 1 or 3 channels, in the second or in the last dimension ({given}); give grayscale "
            f"images as [N, H, W], and others as [N, C, H, W]{', padded to more pixels' if is_first else ''}"
        )
    return array if is_first else array.transpose(0, 3, 1, 2)


def _to_labels(values: Any, split: str) -> list[Any]:
    array = _to_array(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ConfigError(
            f"{split} labels must be of shape [N] (given: {list(array.shape)}); convert one-hot labels by argmax(1)"
        )
    labels: list[Any] = array.tolist()
    if array.dtype.kind == "b":
        return [str(label) for label in labels]
    types = {type(label) for label in labels}
    if array.dtype.kind == "U" and isinstance(values, list | tuple):  # numpy converts numbers among strings
        types = {str if isinstance(value, str) else type(value) for value in values}
    if types == {str} or array.dtype.kind in "iu" or types == {int}:
        return labels
    given = " and ".join(sorted(each.__name__ for each in types))
    raise ConfigError(f"{split} labels must all be integers, or all be strings (given: {given}); convert them")


def _copy(arrays: _Arrays, rows: np.ndarray[Any, Any], split: str) -> Tensor:
    """Returns rows of the inputs in memory of their own: uint8 images, or float32 rows of a table."""
    inputs = arrays.inputs
    copied = np.empty((len(rows), *inputs.shape[1:]), np.uint8 if inputs.ndim == 4 else np.float32)
    block = max(1, COPY_BYTES // max(1, inputs[0].nbytes))
    with np.errstate(over="ignore"):  # found below
        for start in range(0, len(rows), block):  # the selected rows of all would be another copy of the whole
            copied[start : start + block] = inputs[rows[start : start + block]]
    if copied.ndim == 2 and not np.isfinite(copied).all():
        row, column = np.argwhere(~np.isfinite(copied))[0].tolist()
        name = arrays.columns[column] if arrays.columns else column
        row = int(rows[row])
        raise ConfigError(
            f"{split}, row {row}: the column {name} must hold a finite 32-bit number (value: "
            f"{inputs[row, column]}); fill it in, or remove the row or the column"
        )
    return torch.from_numpy(copied)


def _test_rows(labels: list[Any], seed: int) -> dict[str, Any]:
    """Returns the rows of the training and of the test set, in ascending order."""
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(
            np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=seed % 2**32
        )
    except ValueError as error:
        raise ConfigError(
            f"a fifth of the samples cannot be held out as a test set ({error}); give a dict with train and test"
        ) from error
    return {"train": np.sort(train), "test": np.sort(test)}


def _hold_out_test(splits: Splits, seed: int) -> Splits:
    rows = _test_rows(splits.labels["train"].tolist(), seed)
    samples, labels = ({split: each["train"][rows[split]] for split in rows} for each in splits[:2])
    return splits._replace(samples=samples, labels=labels, origin=Origin(notes=(*splits.origin.notes, HELD_OUT)))
