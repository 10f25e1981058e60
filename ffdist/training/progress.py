"""Progress of a run on the terminal, and the texts at its end."""

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ffdist.console import Screen, is_quiet
from ffdist.data.order import SampleOrder
from ffdist.pipeline.evaluation import Evaluation, format_class_errors, format_errors
from ffdist.pipeline.runner import Trained
from ffdist.pipeline.schedule import Evaluate
from ffdist.training.observer import Observer

PLAIN_EVERY_S = 10.0
"""Interval of lines if the output is not a terminal."""
MAX_EXCESS_ERROR = 0.05
"""Largest difference of the test errors by goodness and by readout that needs no note."""
MIN_COMPARED_S = 30.0
"""Shortest training time whose throughput is compared with the predicted one; of a shorter one, much is start-up."""
COLUMNS = {
    "loss": ("loss", ".3f"),
    "goodness_positive": ("goodness: positive", ".4g"),
    "goodness_negative": ("negative", ".4g"),
    "pairwise_error": ("pairwise error", ".4f"),
    "class_error": ("class error", ".4f"),
    "active_fraction": ("active", ".2f"),
}
"""Titles and formats of the columns of the table, by metric of a layer; those without values are left out."""
PLOTS = {
    "goodness.png": "how well each layer separates positive from negative data",
    "negatives.png": "the negatives that it was trained on",
    "errors_over_time.png": "the validation error over the epochs",
    "samples.png": "the scores of each layer for some test samples",
    "fields.png": "the receptive fields of the first layer",
    "timeline.png": "when each actor computed and waited",
}
"""Captions of plots for the description of a run in MLflow."""


class Display(Observer):
    """Shows a progress bar and a table of layers on a terminal, and prints a line at intervals elsewhere.

    Args:
        num_epochs: Number of epochs of the run.
        order: Order of the training samples.
    """

    def __init__(self, num_epochs: int, order: SampleOrder) -> None:
        self.console = Screen(highlight=False)
        self._epochs, self._minibatches, self._batch_size = num_epochs, order.num_minibatches, order.batch_size
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[speed]:>9,.0f} samples/s"),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self._task = self._bar.add_task("starting", total=num_epochs * order.num_minibatches, speed=0.0)
        self._metrics: dict[str, float] = {}
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._plain_at = time.monotonic()

    def __enter__(self) -> "Display":
        if self.console.is_terminal and not is_quiet():
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line, unless the terminal is gone; with `--quiet`, only a warning."""
        if not is_quiet() or text.startswith("warning: "):
            self.print(text)

    def print(self, text: str) -> None:
        """Prints a text, unless the terminal is gone."""
        with suppress(OSError):
            self.console.print(text, markup=False, soft_wrap=True)

    def status(self, text: str) -> None:
        """Shows a status in front of the bar."""
        self._bar.update(self._task, description=text)

    def show(self, metrics: dict[str, float]) -> None:
        """Shows new values of metrics, by name, from the next chunk on."""
        self._metrics.update(metrics)

    def on_chunk(self, trained: Trained, step: int) -> None:
        """Updates the bar."""
        self.update(step)

    def on_block(self, block: Evaluate) -> None:
        """Shows which split is evaluated."""
        self.status(f"evaluating, {block.split}")

    def on_evaluation(self, split: str, evaluation: Evaluation, step: int) -> None:
        """Prints the validation error, and shows the epoch again."""
        if split == "validation":
            errors = f"{evaluation.describe()}; balanced {evaluation.balanced_error:.2%}"
            self.say(f"epoch {step // self._minibatches}: validation error {errors}")
        self.update(step)

    def update(self, step: int) -> None:
        """Shows that `step` minibatches are done."""
        speed = self._bar.tasks[0].speed or 0.0  # over the last 30 s, because chunks arrive in bursts
        self._bar.update(self._task, completed=step, speed=speed * self._batch_size)
        self.status(f"epoch {min(step // self._minibatches + 1, self._epochs)}/{self._epochs}")
        if (
            not self.console.is_terminal
            and {"readout/loss", "layer_1/loss"} & self._metrics.keys()
            and time.monotonic() > self._plain_at + PLAIN_EVERY_S
        ):
            self._plain_at = time.monotonic()
            layers = [self._layer_text(layer) for layer in self._layers()]
            details = "; ".join(layers or [f"loss {self._metrics['readout/loss']:.4f}"])
            remaining = self._bar.tasks[0].time_remaining
            left = "" if remaining is None else f", {timedelta(seconds=round(remaining))} left"
            pace = f"{speed * self._batch_size:,.0f} samples/s{left}; " if speed else ""
            self.say(f"epoch {step / self._minibatches:.1f}/{self._epochs}: {pace}{details}")

    def _layers(self) -> Iterator[int]:
        """Yields the numbers of the layers with metrics."""
        return takewhile(lambda layer: f"layer_{layer}/loss" in self._metrics, count(1))

    def _layer_text(self, layer: int) -> str:
        text = f"layer {layer} loss {self._value(layer, 'loss')}"
        positive, negative = (self._value(layer, name) for name in ("goodness_positive", "goodness_negative"))
        if error := self._value(layer, "class_error"):
            return f"{text}, class error {error}"
        return f"{text}, goodness {positive} positive, {negative} negative" if positive else text

    def _value(self, layer: int, metric: str) -> str:
        """Returns a metric as text; empty if there is none, such as `active_fraction` in a short run."""
        value = self._metrics.get(f"layer_{layer}/{metric}")
        return "" if value is None else format(value, COLUMNS[metric][1])

    def _render(self) -> Group:
        columns = {name: title for name, (title, _) in COLUMNS.items() if self._value(1, name)}
        table = Table("layer", *columns.values(), box=None, padding=(0, 2))
        for layer in self._layers():
            table.add_row(str(layer), *(self._value(layer, name) for name in columns))
        return Group(self._bar, table) if table.rows else Group(self._bar)


def description(summary: dict[str, Any], folder: Path) -> str:
    """Returns the description of a run for its page in MLflow, as Markdown; the table of runs shows the first line.

    Args:
        summary: Results of the run.
        folder: Folder of the run, which contains its plots.
    """
    plots = [f"`{name}` shows {caption}" for name, caption in PLOTS.items() if (folder / name).is_file()]
    layers = ", ".join(f"{error:.2%}" for error in summary["layer_errors"] or [])
    classes = format_class_errors(summary["class_errors"], summary["class_names"])
    return (
        f"test error {format_errors(summary['test_goodness_error'], summary['test_readout_error'])}\n\n"
        f"Balanced error, the mean over the classes: {summary['test_balanced_error']:.2%}{classes}.\n\n"
        + (f"{layers} by the goodness of each layer alone.\n\n" if layers else "")
        + (f"Stopped early: {summary['stopped']}.\n\n" if summary["stopped"] else "")
        + f"Results, plots and model belong to the checkpoint {_checkpoint(summary)}.\n\n"
        + f"Artifacts: {', '.join(plots)}; `config.yaml` reproduces the run."
    )


def _checkpoint(summary: dict[str, Any]) -> str:
    return f"{summary['checkpoint']} ({'best on validation' if summary['best_checkpoint'] else 'last'})"


def closing_text(summary: dict[str, Any], folder: Path, *, look: str) -> str:
    """Returns the text to print at the end of a run.

    Args:
        summary: Results of the run.
        folder: Folder of the run.
        look: Command or address that shows the tracked metrics.
    """
    layers = ", ".join(f"{error:.2%}" for error in summary["layer_errors"] or [])
    chosen = summary["chosen_layers"]
    predicted = summary["predicted_samples_per_s"] if summary["train_s"] >= MIN_COMPARED_S else None
    by_goodness, by_readout = summary["test_goodness_error"], summary["test_readout_error"]
    is_worse = None not in (by_goodness, by_readout) and by_goodness > by_readout + MAX_EXCESS_ERROR
    suffix = " since it was resumed" if any("resumed" in each["lost"] for each in summary["recoveries"]) else ""
    lines = {
        "test error": format_errors(summary["test_goodness_error"], summary["test_readout_error"]),
        "note": "goodness, which predicts the labels, is far worse than the readout; train longer" * is_worse,
        "each layer": layers and f"{layers} by goodness alone",
        "predicted by": chosen and "layers {} to {}, with the least validation error".format(*chosen),
        "stopped": summary["stopped"],
        "trained in": f"{summary['train_s']:.1f} s; {summary['wall_s']:.1f} s with start and evaluation{suffix}",
        "speed": f"{summary['samples_per_s']:,.0f} samples/s" + (f"; predicted: {predicted:,.0f}" if predicted else ""),
        "precision": summary["precision"],
        "checkpoint": _checkpoint(summary),
        "weights_sha256": summary["weights_sha256"],
        "run": folder,
        "tracked": f"{summary['mlflow_tracking_uri']}, run {summary['mlflow_run_id']}" * bool(summary["mlflow_run_id"]),
        "view with": look,
    }
    return "\n".join(f"{name:<16}{text}" for name, text in lines.items() if text)
