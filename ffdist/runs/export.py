"""Export of the network of a finished run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ffdist.errors import ConfigError
from ffdist.export.ffdist_served_model import PROGRAM
from ffdist.export.network import ARCHITECTURE, WEIGHTS, Names, save_network
from ffdist.export.program import export_program, program_facts, save_program
from ffdist.ff.network import Network
from ffdist.runs.run import Run
from ffdist.tracking.model import NAME, save_model

ONNX = "classifier.onnx"


def export_network(run: Run, to: Path) -> list[Path]:
    """Exports a run's network for use without ffdist's pipeline, and returns the paths of the written files.

    Writes the weights and the architecture (`ffdist.load_network` reads both), an MLflow model, and the network as a
    program that needs only torch (`torch.export.load`) and as ONNX. These take samples `[B, *shape]` and return what
    `Classifier` does. ONNX computes in float32, because its runtimes lack bfloat16 matrix products.

    Raises:
        ConfigError: The folder is not empty, or cannot be written.
    """
    network, names = run.network, Names(run.class_names, run.features)
    try:
        is_new = not to.exists()
        to.mkdir(parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise ConfigError(f"--output must be a new or empty folder ({to} contains {next(to.iterdir()).name})")
    except OSError as error:
        raise ConfigError(f"{to} cannot be written ({error.strerror}); give another --output") from error
    files = [to / WEIGHTS, to / ARCHITECTURE, to / PROGRAM]
    try:
        save_network(network, to, names)
        save_program(network, names, to / PROGRAM)
        _save_onnx(network, names, to / ONNX)
        encoder = network.architecture.encoder
        example = torch.zeros(encoder.size, dtype=encoder.dtype)
        save_model(network.architecture, files, example, to / NAME, has_names=bool(names.class_names))
    except BaseException as error:  # a partial export would look complete, and the next attempt would refuse its folder
        for path in to.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if is_new:
            to.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"{to} cannot be written ({error.strerror}); give another --output") from error
        raise
    return [*files, *sorted(to.glob(f"{ONNX}*")), to / NAME]  # the weights of a very large network are in a second file


def _save_onnx(network: Network, names: Names, path: Path) -> None:
    """Writes a network as ONNX, in float32, with the facts about the program as metadata."""
    in_float32 = Network.for_inference(replace(network.architecture, precision="float32"), network.state_dict())
    facts = program_facts(in_float32, names)
    program = torch.onnx.export(export_program(in_float32), output_names=facts["outputs"], verbose=False)
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(value) for key, value in facts.items()})
    program.save(path)
