"""The network of a run as an MLflow model, that `mlflow models serve` answers requests with."""

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ffdist import exported
from ffdist.ff.network import Network

NAME = "model"
NEEDED = ("mlflow", "numpy", "safetensors", "torch")
"""What the model needs where it is served; the part of ffdist that predicts goes with it."""


def log_model(
    client: Any, run_id: str, network: Network, names: Sequence[str], image: Tensor, register: str | None
) -> None:
    """Logs a network as the model of a run, and registers it where there is a name for that.

    Args:
        client: MLflow's.
        run_id: The run's.
        network: What to log.
        names: Of the classes, where they have some.
        image: An example, uint8 `[D]`.
        register: Name of a registered model, which gets a new version.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    model = client.create_logged_model(client.get_run(run_id).info.experiment_id, NAME, run_id)
    with TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        facts = Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
        )
        save_model(network, names, image, path, mlflow_model=facts)
        client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    if register:
        try:
            client.create_registered_model(register)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A database looks a model's own name up in the process's default store, which may be another.
        source = f"models:/{model.model_id}" if client.tracking_uri.startswith("http") else model.artifact_location
        client.create_model_version(register, source, run_id, model_id=model.model_id)


def save_model(network: Network, names: Sequence[str], image: Tensor, path: Path, **facts: Any) -> None:
    """Writes a network as an MLflow model into a folder that is not there yet.

    Args:
        network: What to write.
        names: Of the classes, where they have some.
        image: An example, uint8 `[D]`.
        path: The folder.
        **facts: As MLflow's `save_model` takes them.
    """
    import numpy as np
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    architecture = network.architecture
    named = {"label": (np.int64, ()), "probability": (np.float32, (architecture.classes,))}
    named["goodness"] = (np.float32, (architecture.classes if architecture.goodness_predicts else 0,))
    if names:
        named["name"] = (np.str_, ())
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.uint8), (-1, *architecture.shape))]),
        Schema([TensorSpec(np.dtype(kind), (-1, *shape), name) for name, (kind, shape) in named.items()]),
    )
    package = Path(__file__).parent.parent
    with TemporaryDirectory() as folder:
        part = Path(folder) / package.name  # of the package: what predicts
        shutil.copytree(package / "ff", part / "ff", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("__init__.py", "exported.py"):
            shutil.copy(package / name, part)
        kept = Path(folder) / "network"
        kept.mkdir()
        exported.save_network(network, kept, names)
        pyfunc.save_model(
            path,
            loader_module=exported.__name__,
            data_path=str(kept),
            code_paths=[str(part)],
            signature=signature,
            input_example=image.view(1, *architecture.shape).numpy(),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in NEEDED],
            **facts,
        )
