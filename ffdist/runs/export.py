"""Export of the network of a finished run."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ffdist.errors import ConfigError
from ffdist.export.network import ARCHITECTURE, WEIGHTS, save_network
from ffdist.ff.network import Network
from ffdist.runs.run import Run
from ffdist.tracking.model import NAME, save_model

PROGRAM, ONNX = "readout.pt2", "readout.onnx"


def export_network(run: Run, to: Path) -> list[Path]:
    """Exports a run's network for use without ffdist's pipeline, and returns the paths of the written files.

    Writes the weights and the architecture (`ffdist.load_network` reads both), the readout as a program that needs only
    torch (`torch.export.load`; samples `[B, D]` to logits `[B, C]`) and as ONNX (in float32, because ONNX runtimes
    lack bfloat16 matrix products), and an MLflow model.

    Raises:
        ConfigError: The folder is not empty, or cannot be written.
    """
    network = run.network
    in_float32 = Network.for_inference(replace(network.architecture, precision="float32"), network.state_dict())
    try:
        is_new = not to.exists()
        to.mkdir(parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise ConfigError(f"--output must be a new or empty folder ({to} contains {next(to.iterdir()).name})")
    except OSError as error:
        raise ConfigError(f"{to} cannot be written ({error.strerror}); give another --output") from error
    try:
        save_network(network, to, run.class_names)
        torch.export.save(_readout_program(network), to / PROGRAM)
        torch.onnx.export(_readout_program(in_float32), f=to / ONNX, verbose=False)
        save_model(network, run.class_names, _zeros(network)[0], to / NAME)
    except BaseException as error:  # a partial export would look complete, and the next attempt would refuse its folder
        for path in to.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if is_new:
            to.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"{to} cannot be written ({error.strerror}); give another --output") from error
        raise
    onnx = sorted(to.glob(f"{ONNX}*"))  # the weights are in a second file
    return [to / WEIGHTS, to / ARCHITECTURE, to / PROGRAM, *onnx, to / NAME]


def _readout_program(network: Network) -> torch.export.ExportedProgram:
    return torch.export.export(network, (_zeros(network),), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _zeros(network: Network) -> Tensor:
    """Returns two samples of zeros `[2, D]`."""
    encoder = network.architecture.encoder
    return torch.zeros(2, encoder.size, dtype=encoder.dtype)
