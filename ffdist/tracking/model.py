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


def create_model(client: Any, run_id: str) -> str:
    """Makes a model of a run, by MLflow's client, that `log_model` fills, and returns its id."""
    model_id: str = client.create_logged_model(client.get_run(run_id).info.experiment_id, NAME, run_id).model_id
    return model_id


def log_model(client: Any, run_id: str, model_id: str, network: Network, names: Sequence[str], image: Tensor) -> None:
    """Logs a network as a model of a run; once more changes nothing.

    Args:
        client: MLflow's.
        run_id: The run's.
        model_id: The model's.
        network: What to log.
        names: Of the classes, where they have some.
        image: An example, uint8 `[D]`.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    where = client.get_logged_model(model_id).artifact_location
    with TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        facts = Model(artifact_path=where, model_uuid=model_id, run_id=run_id, model_id=model_id)
        save_model(network, names, image, path, mlflow_model=facts)
        client.log_model_artifacts(model_id, str(path))
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)


def register_model(client: Any, run_id: str, model_id: str, name: str) -> None:
    """Makes a run's model a new version of the registered model of a name, which may be new."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if any(each.model_id == model_id for each in client.search_model_versions(f"run_id = '{run_id}'")):
        return  # by an earlier try whose answer was lost
    # A database looks a model's own name up in the process's default store, which may be another.
    where = client.get_logged_model(model_id).artifact_location
    source = f"models:/{model_id}" if client.tracking_uri.startswith("http") else where
    client.create_model_version(name, source, run_id, model_id=model_id)


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
    # Without the input's type: MLflow would cast to it, and cut off what makes an image wrong.
    signature = ModelSignature(
        outputs=Schema([TensorSpec(np.dtype(kind), (-1, *shape), name) for name, (kind, shape) in named.items()])
    )
    package = Path(__file__).parent.parent
    with TemporaryDirectory() as folder:
        part = Path(folder) / package.name  # of the package: what predicts
        shutil.copytree(package / "ff", part / "ff", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("__init__.py", "exported.py", "files.py"):
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
