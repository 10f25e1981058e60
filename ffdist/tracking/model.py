"""Logs and registers the network of a run as an MLflow model, which `mlflow models serve` can serve."""

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


def create_model(client: Any, run_id: str) -> str:
    """Creates an empty logged model for a run, which `log_model` fills, and returns its id."""
    model_id: str = client.create_logged_model(client.get_run(run_id).info.experiment_id, NAME, run_id).model_id
    return model_id


def log_model(
    client: Any, run_id: str, model_id: str, network: Network, class_names: Sequence[str], example: Tensor
) -> None:
    """Logs a network as a model of a run. Calling it again has no effect.

    Args:
        client: MLflow client.
        run_id: MLflow run id.
        model_id: Id returned by `create_model`.
        network: Network to log.
        class_names: Names of the classes; may be empty.
        example: Input example `[D]`.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    location = client.get_logged_model(model_id).artifact_location
    with TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        mlflow_model = Model(artifact_path=location, model_uuid=model_id, run_id=run_id, model_id=model_id)
        save_model(network, class_names, example, path, mlflow_model=mlflow_model)
        client.log_model_artifacts(model_id, str(path))
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)


def register_model(client: Any, run_id: str, model_id: str, name: str) -> None:
    """Registers the model of a run as a new version of a registered model, which is created if necessary."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if any(each.model_id == model_id for each in client.search_model_versions(f"run_id = '{run_id}'")):
        return  # registered by an earlier attempt whose response was lost
    # A database resolves models:/ URIs in the default store of the process, which may be another one.
    location = client.get_logged_model(model_id).artifact_location
    source = f"models:/{model_id}" if client.tracking_uri.startswith("http") else location
    client.create_model_version(name, source, run_id, model_id=model_id)


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
