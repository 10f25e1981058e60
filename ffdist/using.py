"""What finished runs are used for: looking at images that they have not seen."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ffdist.config import ConfigError
from ffdist.data.inputs import Inputs, read_inputs, write_parquet
from ffdist.exported import save_network
from ffdist.finished import Run
from ffdist.tracking.model import NAME, save_model

PROGRAM = "readout.pt2"
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
            raise ConfigError(
                f"{data} must say the label of every image, from 0 to below {run.network.architecture.classes}"
            )
        images, labels = found.images, found.labels
    return f"test error {run.evaluate(images, labels).in_words()}, of {len(labels):,} samples"


def predict_files(run: Run, inputs: Sequence[Path], to: Path | None) -> None:
    """Prints what a run takes images for, the most probable labels of each, and keeps all of it where that is asked.

    Args:
        run: A finished one.
        inputs: Image files, Parquet files and folders of either.
        to: Parquet file to write: `input`, `label` by goodness (without labels by readout), `probability` and
            `goodness` of every label, the latter summed over the predicting layers.

    Raises:
        ConfigError: They cannot be read, or do not fit.
    """
    found = _read(run, inputs)
    seen, predict_from = run.predict(found.images), run.network.architecture.predict_from
    goodness = seen.goodness[predict_from - 1 :].sum(0)
    columns = {
        "input": found.places,
        "label": seen.label.tolist(),
        "probability": seen.probabilities.tolist(),
        "goodness": goodness.tolist(),
    }
    if to:
        write_parquet(columns, to)
    console, table = Console(highlight=False), Table("input", "label", "probability, and goodness", box=None)
    for place, label, probabilities, good in list(zip(*columns.values(), strict=True))[:ROWS]:
        best = sorted(range(len(probabilities)), key=lambda k: -probabilities[k])[:BEST]
        told = "; ".join(f"{k}: {probabilities[k]:.1%}" + (f", {good[k]:,.0f}" if good else "") for k in best)
        table.add_row(Path(place).name, str(label), told)
    console.print(table)
    if len(found.places) > ROWS:
        console.print(f"and {len(found.places) - ROWS:,} more; --to FILE keeps all")


def export_network(run: Run, to: Path) -> list[Path]:
    """Writes a run's network for use without ffdist's pipeline, and returns the files.

    They are the weights, the architecture (`ffdist.read_network` reads both), the way to the readout as a program that
    needs torch alone (`torch.export.load`; uint8 `[B, D]` to logits `[B, C]`), and all as an MLflow model.

    Raises:
        ConfigError: The folder holds something, or cannot be written.
    """
    network, example = run.network, run.summary["shape"]
    try:
        to.mkdir(parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise ConfigError(f"--to must be a folder that is new or empty ({to} holds {next(to.iterdir()).name})")
        save_network(network, to)
        images = torch.zeros(2, math.prod(example), dtype=torch.uint8)
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, to / PROGRAM)
        save_model(network, images[0], to / NAME)
    except OSError as error:
        raise ConfigError(f"{to} cannot be written ({error.strerror}); give another --to") from error
    return sorted(to.iterdir())


def _read(run: Run, paths: Sequence[Path]) -> Inputs:
    architecture = run.network.architecture
    return read_inputs(paths, run.config.data, architecture.shape, architecture.classes)
