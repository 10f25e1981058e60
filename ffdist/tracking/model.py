"""Saves the network of a run as an MLflow model, which `mlflow models serve` can serve."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ffdist.ff.architecture import Architecture

NAME, CHECKPOINT = "model", "checkpoint"
"""Name of the model of a run's results, and tag of a model with the name of its checkpoint."""
REQUIREMENTS = ("mlflow", "numpy", "torch")
"""Packages that serving the model requires."""
LOADER = "ffdist_served_model"
"""Module that is stored with the model as its only code."""
DATA = "network"
"""Folder of the files of the network in the model's data."""


def export_in_subprocess(architecture: Architecture, folder: Path, path: Path) -> None:
    """Exports the network in a folder as a program, in another process: exporting would disturb a training here.

    Args:
        architecture: Architecture of the network, whose custom modules this process has imported.
        folder: Folder of the network.
        path: File to write.

    Raises:
        ValueError: The network cannot be exported.
        OSError: The other process was stopped, or the file cannot be written.
    """
    command = [sys.executable, "-P", "-m", "ffdist.export.program", str(folder), str(path)]
    command += architecture.custom_modules
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # finds the same modules as this process
    process = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        is_temporary = process.returncode < 0 or process.returncode == os.EX_TEMPFAIL
        raise (OSError if is_temporary else ValueError)(f"the network cannot be exported ({reason})")


def save_model(
    architecture: Architecture, files: Iterable[Path], example: Tensor, path: Path, *, has_names: bool, **options: Any
) -> None:
    """Writes a network as an MLflow model into a new folder.

    Args:
        architecture: Architecture of the network.
        files: Files of the network, one of which is its exported program.
        example: Input example `[D]`.
        path: The folder, which must not exist.
        has_names: Whether the classes have names.
        **options: Further arguments of `mlflow.pyfunc.save_model`.
    """
    import numpy as np
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    outputs = {"label": (np.int64, ()), "probability": (np.float32, (architecture.classes,))}
    if architecture.goodness_predicts:
        outputs["goodness"] = (np.float32, (architecture.classes,))
    if has_names:
        outputs["name"] = (np.str_, ())
    # The signature has no inputs: MLflow would refuse all but one shape and type, or cast to it, which hides invalid
    # values such as the pixel 350.
    signature = ModelSignature(
        outputs=Schema([TensorSpec(np.dtype(dtype), (-1, *shape), name) for name, (dtype, shape) in outputs.items()])
    )
    with TemporaryDirectory() as folder:
        data = Path(folder) / DATA
        data.mkdir()
        for file in files:
            shutil.copyfile(file, data / file.name)
        pyfunc.save_model(
            path,
            loader_module=LOADER,
            data_path=str(data),
            code_paths=[str(Path(__file__).parent.parent / "export" / f"{LOADER}.py")],
            signature=signature,
            input_example=example.view(1, *architecture.encoder.shape).numpy(),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
            **options,
        )
