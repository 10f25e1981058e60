"""What finished runs are used for: looking at images that they have not seen."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ffdist.config import ConfigError
from ffdist.data.inputs import Inputs, read_inputs, write_parquet
from ffdist.exported import ARCHITECTURE, WEIGHTS, save_network
from ffdist.ff.classify import total_goodness
from ffdist.ff.network import Network
from ffdist.finished import Run
from ffdist.screen import Screen, is_interactive, print_rows
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
            column = run.label_column or "label"
            raise ConfigError(
                f"{data} must say the label of every image, by a column of Parquet called {column}, of names where "
                f"classes have some, or by one folder for each class and nothing beside them (classes: {classes}; "
                f"{found.unlabelled})"
            )
        _note(f"labels: {found.meaning}")
        images, labels = found.images, found.labels
    unknown = torch.isin(labels, torch.tensor(run.network.architecture.untrained, dtype=labels.dtype)).sum().item()
    return f"test error {run.evaluate(images, labels).in_words()}, of {len(labels):,} samples" + (
        f"; of classes without training samples, which count as wrong: {unknown:,}" if unknown else ""
    )


def predict_files(run: Run, inputs: Sequence[Path], to: Path | None) -> None:
    """Prints what a run takes images for, and keeps all of it where that is asked.

    A terminal shows the most probable labels of some images; elsewhere there is a row of data for each image.

    Args:
        run: A finished one.
        inputs: Image files, Parquet files and folders of either.
        to: Parquet file to write: `input`, the `name` (where classes have some) and number (`label`) of the label by
            goodness (else by readout), `probability` and `goodness` of every label, the latter summed over the
            predicting layers.

    Raises:
        ConfigError: They cannot be read, or do not fit.
    """
    found = _read(run, inputs)
    seen = run.predict(found.images)
    goodness = total_goodness(seen.goodness, run.network.architecture.predict_from)
    labels, probability, names = seen.label.tolist(), seen.probabilities.tolist(), run.class_names
    columns: dict[str, list[Any]] = {"input": found.places}
    if names:
        columns["name"] = [names[label] for label in labels]
    columns["label"] = labels
    if to:
        write_parquet(columns | {"probability": probability, "goodness": goodness.tolist()}, to)
    if is_interactive(Screen()):
        _show(columns, probability, goodness, names)
        return
    chosen = seen.label.unsqueeze(1)
    columns["probability"] = seen.probabilities.gather(1, chosen).squeeze(1).tolist()
    if goodness.shape[1]:
        columns["goodness"] = goodness.gather(1, chosen).squeeze(1).tolist()
    print_rows([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def _show(
    columns: dict[str, list[Any]], probability: list[list[float]], goodness: Tensor, names: Sequence[str]
) -> None:
    """Prints the most probable labels of the first images, for people."""
    places, rows = columns["input"], list[dict[str, str]]()
    folder = os.path.commonpath([Path(place).absolute().parent for place in places])
    for place, label, each, good in zip(places[:ROWS], columns["label"], probability, goodness.tolist(), strict=False):
        ranked = sorted(range(len(each)), key=lambda k: -each[k])
        most = "; ".join(
            f"{names[k] if names else k}: {each[k]:.1%}" + (f", {good[k]:.5g}" if good else "")
            for k in ranked
            if k in (*ranked[:BEST], label)
        )
        where = str(Path(place).absolute().relative_to(folder))
        rows.append({"input": where, "label": names[label] if names else str(label), "probability, and goodness": most})
    print_rows(rows)
    if len(places) > ROWS:
        Console(highlight=False).print(f"and {len(places) - ROWS:,} more; --to FILE keeps all", markup=False)


def export_network(run: Run, to: Path) -> list[Path]:
    """Writes a run's network for use without ffdist's pipeline, and returns what is written.

    They are the weights, the architecture (`ffdist.read_network` reads both), the way to the readout as a program that
    needs torch alone (`torch.export.load`; uint8 `[B, D]` to logits `[B, C]`) and as ONNX (in float32, because runtimes
    lack products of bfloat16), and all as an MLflow model.

    Raises:
        ConfigError: The folder holds something, or cannot be written.
    """
    network = run.network
    in_float32 = Network.for_inference(replace(network.architecture, precision="float32"), network.state_dict())
    try:
        is_new = not to.exists()
        to.mkdir(parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise ConfigError(f"--to must be a folder that is new or empty ({to} holds {next(to.iterdir()).name})")
    except OSError as error:
        raise ConfigError(f"{to} cannot be written ({error.strerror}); give another --to") from error
    try:
        save_network(network, to, run.class_names)
        torch.export.save(_readout_program(network), to / PROGRAM)
        torch.onnx.export(_readout_program(in_float32), f=to / ONNX, verbose=False)
        save_model(network, run.class_names, torch.zeros(network.architecture.pixels, dtype=torch.uint8), to / NAME)
    except BaseException as error:  # half an export would be taken for a whole one, and refused by the next try
        for path in to.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if is_new:
            to.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"{to} cannot be written ({error.strerror}); give another --to") from error
        raise
    onnx = sorted(to.glob(f"{ONNX}*"))  # its weights lie beside it
    return [to / WEIGHTS, to / ARCHITECTURE, to / PROGRAM, *onnx, to / NAME]


def _readout_program(network: Network) -> torch.export.ExportedProgram:
    images = torch.zeros(2, network.architecture.pixels, dtype=torch.uint8)
    return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _read(run: Run, paths: Sequence[Path]) -> Inputs:
    architecture = run.network.architecture
    config = run.config.data.model_copy(update={"label_column": run.label_column})
    found = read_inputs(paths, config, architecture.shape, architecture.classes, run.class_names)
    if found.skipped:
        _note(f"skipped: {found.skipped}")
    return found


def _note(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
