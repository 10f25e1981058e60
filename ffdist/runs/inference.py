"""Evaluation and inference with finished runs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ffdist.console import Screen, is_interactive, print_rows, write_rows
from ffdist.data.inputs import Inputs, read_inputs, read_table_inputs, write_parquet
from ffdist.errors import ConfigError
from ffdist.ff.classify import total_goodness
from ffdist.ff.encoders import ImageEncoder, TableEncoder
from ffdist.pipeline.evaluation import format_class_errors
from ffdist.runs.run import Run

MAX_LABELS, MAX_ROWS = 3, 100
"""Limits of the table on a terminal: most probable labels of a sample, and samples."""


def evaluate_on(
    run: Run, data: Path | None, *, image_column: str | None = None, label_column: str | None = None
) -> str:
    """Evaluates a run, and returns its errors as text.

    Args:
        run: The run.
        data: File or folder of labeled samples; by default the run's test set.
        image_column: Column of images in tables; by default that of training.
        label_column: Column of labels in tables; by default that of training, or else `label`.

    Raises:
        ConfigError: The samples cannot be read, have no labels, or do not fit the network.
    """
    if data is None:
        samples, labels = run.dataset.samples["test"], run.dataset.labels["test"]
    else:
        inputs = _read(run, [data], image_column, label_column)
        if inputs.labels is None:
            classes = ", ".join(run.class_names) or f"integers in [0, {run.network.architecture.classes})"
            column = label_column or run.label_column or "label"
            raise ConfigError(
                f"{data} must contain a label for every sample: in a column {column} of a table (class names, if the "
                f"classes have names), or as one folder per class and nothing else (classes: {classes}; "
                f"{inputs.label_problem})"
            )
        if label_column is not None and f"column {label_column}," not in inputs.label_source:
            raise ConfigError(f"{data} must have the column {label_column} (labels are in: {inputs.label_source})")
        _note(f"labels: {inputs.label_source}")
        samples, labels = inputs.samples, inputs.labels
    untrained = torch.isin(labels, torch.tensor(run.network.architecture.untrained, dtype=labels.dtype)).sum().item()
    result = run.evaluate(samples, labels)
    return (
        f"test error {result.describe()}, of {len(labels):,} samples"
        + (f"; of classes without training samples, which count as wrong: {untrained:,}" if untrained else "")
        + f"; balanced error {result.balanced_error:.2%}{format_class_errors(result.class_errors, run.class_names)}"
    )


def predict_files(run: Run, inputs: Sequence[Path], to: Path | None, *, image_column: str | None = None) -> None:
    """Prints a run's predictions: the most probable labels of some samples on a terminal, a row for each elsewhere.

    Args:
        run: The run.
        inputs: Image files, Parquet files, CSV files and folders.
        to: `.parquet` or `.json` file to write, with the columns `input`, `name` (if the classes have names), `label`
            (its number; predicted by goodness, or by the readout if no label is shown), `probability` and `goodness`
            (of every label; goodness is summed over the predicting layers). A `.csv` file has the printed rows.
        image_column: Column of images in tables; by default that of training.

    Raises:
        ConfigError: The samples cannot be read, or do not fit the network.
    """
    if to and to.suffix.lower() not in (".csv", ".json", ".parquet"):
        raise ConfigError(f"--output must end in .parquet, .json or .csv (given: {to}); rename it")
    if to and any(each.exists() and to.exists() and to.samefile(each) for each in inputs):
        raise ConfigError(f"--output must not replace an input ({to}); name another file")
    samples = _read(run, inputs, image_column)
    prediction = run.predict(samples.samples)
    goodness = total_goodness(prediction.goodness, run.network.architecture.predicting_layers)
    labels, probability, names = prediction.label.tolist(), prediction.probabilities.tolist(), run.class_names
    columns: dict[str, list[Any]] = {"input": samples.locations}
    if names:
        columns["name"] = [names[label] for label in labels]
    columns["label"] = labels
    index, of_all = prediction.label.unsqueeze(1), {"probability": probability, "goodness": goodness.tolist()}
    of_label = {"probability": prediction.probabilities.gather(1, index).squeeze(1).tolist()}
    if goodness.shape[1]:
        of_label["goodness"] = goodness.gather(1, index).squeeze(1).tolist()
    if to and to.suffix.lower() == ".parquet":
        write_parquet(columns | of_all, to)
    elif to:
        form = to.suffix.lower()[1:]
        write_rows(_rows(columns | (of_label if form == "csv" else of_all)), to, form)
    if is_interactive(Screen()):
        _show(columns, probability, goodness, names)
    else:
        print_rows(_rows(columns | of_label))


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _show(
    columns: dict[str, list[Any]], probability: list[list[float]], goodness: Tensor, names: Sequence[str]
) -> None:
    """Prints a table of the first samples with their most probable labels."""
    inputs, rows = columns["input"], list[dict[str, str]]()
    folder = os.path.commonpath([Path(each).absolute().parent for each in inputs])
    for each, label, p, g in zip(inputs[:MAX_ROWS], columns["label"], probability, goodness.tolist(), strict=False):
        ranking = sorted(range(len(p)), key=lambda k: -p[k])
        text = "; ".join(
            f"{names[k] if names else k}: {p[k]:.1%}" + (f", {g[k]:.5g}" if g else "")
            for k in ranking
            if k in (*ranking[:MAX_LABELS], label)
        )
        path = str(Path(each).absolute().relative_to(folder))
        rows.append({"input": path, "label": names[label] if names else str(label), "probability, and goodness": text})
    print_rows(rows)
    if len(inputs) > MAX_ROWS:
        Console(highlight=False).print(f"and {len(inputs) - MAX_ROWS:,} more; --output FILE writes all", markup=False)


def _read(run: Run, paths: Sequence[Path], image_column: str | None = None, label_column: str | None = None) -> Inputs:
    encoder, columns = run.network.architecture.encoder, {"label_column": label_column or run.label_column}
    if image_column is not None:
        columns["image_column"] = image_column
    config = run.config.data.model_copy(update=columns)
    if isinstance(encoder, ImageEncoder):
        channels, height, width = encoder.shape
        inputs = read_inputs(paths, config, (channels, height, width), encoder.classes, run.class_names)
    elif isinstance(encoder, TableEncoder) and len(run.features) == encoder.size:
        inputs = read_table_inputs(paths, config, run.features, encoder.classes, run.class_names)
    else:
        raise ConfigError(
            f"only images, and tables with the names of their columns, are read from files (the network reads: "
            f"{encoder.describe()} without names); use Run.predict"
        )
    if inputs.skipped:
        _note(f"skipped: {inputs.skipped}")
    return inputs


def _note(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
