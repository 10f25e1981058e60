"""Saves the network of a run as an MLflow model, which `mlflow models serve` can serve."""

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ffdist.export.network import save_network
from ffdist.ff.network import Network

NAME = "model"
REQUIREMENTS = ("mlflow", "numpy", "safetensors", "torch")
"""Packages that serving the model requires."""
INFERENCE_PACKAGES = ("export", "ff", "storage")
"""Subpackages of ffdist that inference requires. They are stored with the model, each as a whole: the environment that
serves it may have another version of ffdist, and Python searches a package in one folder only."""


def save_model(network: Network, class_names: Sequence[str], example: Tensor, path: Path, **options: Any) -> None:
    """Writes a network as an MLflow model into a new folder.

    Args:
        network: Network to write.
        class_names: Names of the classes; may be empty.
        example: Input example `[D]`.
        path: The folder, which must not exist.
        **options: Further arguments of `mlflow.pyfunc.save_model`.
    """
    import numpy as np
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    architecture = network.architecture
    outputs = {"label": (np.int64, ()), "probability": (np.float32, (architecture.classes,))}
    outputs["goodness"] = (np.float32, (architecture.classes if architecture.goodness_predicts else 0,))
    if class_names:
        outputs["name"] = (np.str_, ())
    # The signature has no input type: MLflow would cast inputs to it, which hides invalid pixel values.
    signature = ModelSignature(
        outputs=Schema([TensorSpec(np.dtype(dtype), (-1, *shape), name) for name, (dtype, shape) in outputs.items()])
    )
    package = Path(__file__).parent.parent
    with TemporaryDirectory() as folder:
        code = Path(folder) / package.name
        for name in INFERENCE_PACKAGES:
            shutil.copytree(package / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(package / "__init__.py", code)
        shutil.copy(package / "errors.py", code)
        network_folder = Path(folder) / "network"
        network_folder.mkdir()
        save_network(network, network_folder, class_names)
        pyfunc.save_model(
            path,
            loader_module="ffdist.export.served",
            data_path=str(network_folder),
            code_paths=[str(code)],
            signature=signature,
            input_example=example.view(1, *architecture.encoder.shape).numpy(),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
            **options,
        )
