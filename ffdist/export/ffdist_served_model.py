"""Loader of the MLflow model of a network. It is stored with the model as its only code.

It must not import ffdist: the model is served where torch, numpy and mlflow are installed, with any version of ffdist
or none. Its name is unique, because MLflow puts its folder before the installed packages in the import path.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROGRAM, FACTS = "classifier.pt2", "classifier.json"
"""File of the exported program, and the file inside it that describes its inputs and outputs."""


class ServedModel:
    """Model that MLflow calls for each request.

    Args:
        program: Takes samples `[B, ...]` and returns the outputs.
        facts: Shape and type of a sample, names of the outputs and of the classes, and the batch size.
    """

    def __init__(self, program: Any, facts: dict[str, Any]) -> None:
        self._program, self._facts = program, facts

    def predict(self, samples: Any, params: Any = None) -> dict[str, Any]:
        """Classifies samples.

        Args:
            samples: An array or a data frame of numbers: `[N, ...]` in the shape of the training samples (of images,
                pixels from 0 to 255 `[N, channels, height, width]`, or `[N, height, width]` if they are grayscale), or
                flat `[N, D]`. A data frame with one column holds a sample in each cell. If the network was trained on
                a table, the columns of a data frame are selected by their names.
            params: Ignored; part of MLflow's interface.

        Returns:
            `label` `[N]`, predicted by goodness, or by the readout if goodness cannot predict; `probability` `[N, C]`,
            by the readout, or the softmax of `goodness` if there is none; `goodness` `[N, C]` if it can predict; and
            `name` `[N]` if the classes have names.

        Raises:
            MlflowException: The samples have a wrong shape or invalid values.
        """
        try:
            batches = torch.split(self._convert(samples), self._facts["batch"])
        except (TypeError, ValueError) as error:
            raise _invalid_request(str(error)) from error
        with torch.no_grad():
            parts = zip(*map(self._program, batches), strict=True)
        outputs = {name: torch.cat(part).numpy() for name, part in zip(self._facts["outputs"], parts, strict=True)}
        names = self._facts["class_names"]
        return outputs | ({"name": np.array(names)[outputs["label"]]} if names else {})

    def _convert(self, samples: Any) -> Tensor:
        """Returns samples in the shape and type that the program takes."""
        values = np.ascontiguousarray(self._select_features(samples))
        if values.dtype == object and values.ndim == 2 and values.shape[1] == 1:
            values = np.array(values[:, 0].tolist())
        if values.dtype.kind not in "biuf":
            raise ValueError(f"samples must be numbers (given: {values.dtype})")
        shape, dtype = list(self._facts["shape"]), np.dtype(self._facts["dtype"])
        accepted = [shape, *[shape[1:]] * (shape[0] == 1 and len(shape) > 1), [int(np.prod(shape))]]
        if list(values.shape[1:]) not in accepted or not len(values):
            texts = dict.fromkeys(f"[N, {str(each)[1:]}" for each in accepted)
            raise ValueError(f"samples must have the shape {' or '.join(texts)} (given: {list(values.shape)})")
        _check_values(values, dtype)
        with np.errstate(over="ignore"):
            converted = torch.from_numpy(values.astype(dtype))
        if not bool(torch.isfinite(converted).all()):
            raise ValueError("samples must be finite numbers")
        return converted.view(-1, *shape)

    def _select_features(self, samples: Any) -> Any:
        """Returns the columns of a data frame, or of a dict of columns, that the network was trained on, in order."""
        names, columns = self._facts.get("features"), getattr(samples, "columns", ())
        by_name = {str(name): name for name in (samples if isinstance(samples, dict) else columns)}
        if not names or not by_name or (len(by_name) == 1 < len(names)):  # a single column holds whole samples
            return samples
        if missing := [name for name in names if name not in by_name]:
            if list(by_name) == [str(number) for number in range(len(names))]:
                return samples  # columns without names, in their order
            raise ValueError(
                f"samples must have the columns that the network was trained on (missing: {', '.join(missing[:10])})"
            )
        return np.column_stack([samples[by_name[name]] for name in names])


def _check_values(values: Any, dtype: Any) -> None:
    """Raises ValueError if numbers would be changed by a conversion to a type of integers."""
    if dtype.kind not in "iu" or values.dtype == dtype:
        return
    limits, noun = np.iinfo(dtype), "pixels" if dtype == np.uint8 else "samples"
    rule = f"{noun} must be whole numbers from {limits.min} to {limits.max}"
    with np.errstate(invalid="ignore"):  # infinity has no remainder
        invalid = values[~((values >= limits.min) & (values <= limits.max) & (values % 1 == 0))]
    if invalid.size:
        raise ValueError(f"{rule} (given: {invalid[0].item()})")
    if values.dtype.kind == "f" and values.max() == 1:
        raise ValueError(f"{rule}, not 0.0 to 1.0")


def _invalid_request(reason: str) -> Exception:
    """Returns an error whose response is only `reason`; MLflow's server would put all samples before it."""
    from mlflow.exceptions import MlflowException

    class InvalidRequest(MlflowException):
        def serialize_as_json(self) -> str:
            return json.dumps({"error_code": self.error_code, "message": reason})

    request_error: Exception = InvalidRequest.invalid_parameter_value(reason)
    return request_error


def _load_pyfunc(path: str) -> ServedModel:
    """Loads a model from its data path; MLflow requires this name."""
    files = {FACTS: ""}
    program = torch.export.load(str(Path(path) / PROGRAM), extra_files=files)
    return ServedModel(program.module(), json.loads(files[FACTS]))
