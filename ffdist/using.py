"""What finished runs are used for: looking at images that they have not seen."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ffdist.config import ConfigError
from ffdist.data.inputs import Inputs, read_inputs, write_parquet
from ffdist.exported import ARCHITECTURE, WEIGHTS, save_network
from ffdist.ff.classify import total_goodness
from ffdist.ff.network import Network
from ffdist.finished import Run
from ffdist.tracking.model import NAME, save_model

PROGRAM, ONNX = "readout.pt2", "readout.onnx"
BEST, ROWS = 3, 100
"""Labels of an image, and images, that a table shows."""


def evaluate_on(run: Run, data: Path | None) -> str:
    """Evaluates a run on its test set or on labelled images, and says what came of it.

    Raises:
        ConfigError: They cannot be read, or do not fit.
    """
    if data is None:
        images, labels = run.dataset.images["test"], run.dataset.labels["test"]
    else:
        found = _read(run, [data])
        if found.labels is None:
            classes = ", ".join(run.class_names) or f"from 0 to below {run.network.architecture.classes}"
            raise ConfigError(
                f"{data} must say the label of every image, by an integer column of Parquet or by one folder for each "
                f"class and nothing beside them (classes: {classes}; {found.unlabelled})"
            )
        images, labels = found.images, found.labels
    return f"test error {run.evaluate(images, labels).in_words()}, of {len(labels):,} samples"


def predict_files(run: Run, inputs: Sequence[Path], to: Path | None) -> None:
    """Prints what a run takes images for, the most probable labels of each, and keeps all of it where that is asked.

    Args:
        run: A finished one.
        inputs: Image files, Parquet files and folders of either.
        to: Parquet file to write: `input`, `label` by goodness (else by readout), its `name` where classes have some,
            `probability` and `goodness` of every label, the latter summed over the predicting layers.

    Raises:
        ConfigError: They cannot be read, or do not fit.
    """
    found = _read(run, inputs)
    seen = run.predict(found.images)
    goodness = total_goodness(seen.goodness, run.network.architecture.predict_from)
    labels, probability, names = seen.label.tolist(), seen.probabilities.tolist(), run.class_names
    if to:
        named = {"name": [names[label] for label in labels]} if names else {}
        columns = {"input": found.places, "label": labels, **named, "probability": probability}
        write_parquet(columns | {"goodness": goodness.tolist()}, to)
    console, table = Console(highlight=False), Table("input", "label", "probability, and goodness", box=None)
    folder = os.path.commonpath([Path(place).absolute().parent for place in found.places])
    for place, label, each, good in list(zip(found.places, labels, probability, goodness.tolist(), strict=True))[:ROWS]:
        ranked = sorted(range(len(each)), key=lambda k: -each[k])
        told = "; ".join(
            f"{names[k] if names else k}: {each[k]:.1%}" + (f", {good[k]:.5g}" if good else "")
            for k in ranked
            if k in (*ranked[:BEST], label)
        )
        where = str(Path(place).absolute().relative_to(folder))
        table.add_row(*map(escape, (where, names[label] if names else str(label), told)))
    console.print(table)
    if len(found.places) > ROWS:
        console.print(f"and {len(found.places) - ROWS:,} more; --to FILE keeps all")


def export_network(run: Run, to: Path) -> Iterator[Path]:
    """Writes a run's network for use without ffdist's pipeline, and yields each file or folder that is written.

    They are the weights, the architecture (`ffdist.read_network` reads both), the way to the readout as a program that
    needs torch alone (`torch.export.load`; uint8 `[B, D]` to logits `[B, C]`) and as ONNX (in float32, because runtimes
    lack products of bfloat16), and all as an MLflow model.

    Raises:
        ConfigError: The folder holds something, or cannot be written.
    """
    network = run.network
    in_float32 = Network(replace(network.architecture, precision="float32"))
    in_float32.load_state_dict(network.state_dict())
    try:
        to.mkdir(parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise ConfigError(f"--to must be a folder that is new or empty ({to} holds {next(to.iterdir()).name})")
        save_network(network, to, run.class_names)
        yield from (to / WEIGHTS, to / ARCHITECTURE)
        torch.export.save(_readout_program(network), to / PROGRAM)
        yield to / PROGRAM
        torch.onnx.export(_readout_program(in_float32), f=to / ONNX, verbose=False)
        yield from sorted(to.glob(f"{ONNX}*"))  # its weights lie beside it
        save_model(network, run.class_names, torch.zeros(network.architecture.pixels, dtype=torch.uint8), to / NAME)
        yield to / NAME
    except OSError as error:
        raise ConfigError(f"{to} cannot be written ({error.strerror}); give another --to") from error


def _readout_program(network: Network) -> torch.export.ExportedProgram:
    images = torch.zeros(2, network.architecture.pixels, dtype=torch.uint8)
    return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _read(run: Run, paths: Sequence[Path]) -> Inputs:
    architecture = run.network.architecture
    return read_inputs(paths, run.config.data, architecture.shape, architecture.classes, run.class_names)
