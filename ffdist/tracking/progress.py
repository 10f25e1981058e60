"""What the terminal shows while a run goes on."""

import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ffdist.evaluation import errors_in_words
from ffdist.screen import Screen

PLAIN_EVERY_S = 10.0
"""Seconds between lines where the output is no terminal."""
MUCH_WORSE = 0.05
"""Of the test error by goodness over that by readout: worth a note."""
PICTURES = {
    "goodness.png": "whether each layer tells positive from negative data",
    "negatives.png": "what it learned against",
    "fields.png": "what the first layer looks for",
    "timeline.png": "who computed and who waited",
}
"""What a run's pictures show; those that it has are named on its page."""


class Display:
    """A bar and a table of layers on a terminal, now and then a line elsewhere; open for the length of a `with` block.

    Args:
        epochs: Length of the run.
        minibatches: Minibatches an epoch.
        batch_size: Samples a minibatch.
    """

    def __init__(self, epochs: int, minibatches: int, batch_size: int) -> None:
        self.console = Screen(highlight=False)
        self._epochs, self._minibatches, self._batch_size = epochs, minibatches, batch_size
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[speed]:>9,.0f} samples/s"),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self._task = self._bar.add_task("starting", total=epochs * minibatches, speed=0.0)
        self._metrics: dict[str, float] = {}
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._plain_at = time.monotonic()

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line that stays, unless the terminal is gone."""
        with suppress(OSError):
            self.console.print(text, markup=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        """Shows what is going on, in front of the bar."""
        self._bar.update(self._task, description=what)

    def update(self, step: int, metrics: dict[str, float] | None = None) -> None:
        """Shows how far the training is.

        Args:
            step: Minibatches done.
            metrics: The newest metrics by name, where there are new ones.
        """
        self._metrics.update(metrics or {})
        speed = self._bar.tasks[0].speed or 0.0  # of the last 30 s; chunks come in bursts
        self._bar.update(self._task, completed=step, speed=speed * self._batch_size)
        self.doing(f"epoch {min(step // self._minibatches + 1, self._epochs)}/{self._epochs}")
        if (
            not self.console.is_terminal
            and "readout/loss" in self._metrics
            and time.monotonic() > self._plain_at + PLAIN_EVERY_S
        ):
            self._plain_at = time.monotonic()
            layers = [f"layer {row[0]} loss {row[1]} goodness {row[2]} | {row[3]}" for row in self._rows()]
            told = "; ".join(layers or [f"loss {self._metrics['readout/loss']:.4f}"])
            self.say(f"epoch {step / self._minibatches:.1f}/{self._epochs}: {told}")

    def _rows(self) -> list[list[str]]:
        rows, layer = [], 1
        while f"layer_{layer}/loss" in self._metrics:
            names = ("loss", "goodness_positive", "goodness_negative", "pairwise_error")
            loss, positive, negative, pairwise = (self._metrics[f"layer_{layer}/{name}"] for name in names)
            active = self._metrics.get(f"layer_{layer}/active_fraction")  # a short run has none
            row = [str(layer), f"{loss:.3f}", f"{positive:.4g}", f"{negative:.4g}", f"{pairwise:.4f}"]
            rows.append([*row, "" if active is None else f"{active:.2f}"])
            layer += 1
        return rows

    def _render(self) -> Group:
        table = Table(
            "layer", "loss", "goodness: positive", "negative", "pairwise error", "active", box=None, padding=(0, 2)
        )
        for row in self._rows():
            table.add_row(*row)
        return Group(self._bar, table) if table.rows else Group(self._bar)


def description(summary: dict[str, Any], folder: Path) -> str:
    """Returns what a run's page in MLflow says of it, as Markdown; the table of runs has room for the first line.

    Args:
        summary: The final figures.
        folder: The run's, which holds its pictures.
    """
    drawn = [f"`{name}` shows {what}" for name, what in PICTURES.items() if (folder / name).is_file()]
    layers = ", ".join(f"{error:.2%}" for error in summary["layer_errors"] or [])
    return (
        f"test error {errors_in_words(summary['test_goodness_error'], summary['test_readout_error'])}\n\n"
        + (f"{layers} by the goodness of each layer alone.\n\n" if layers else "")
        + f"Figures, plots and model are of the checkpoint {_checkpoint(summary)}.\n\n"
        + f"Artifacts: {', '.join(drawn)}; `config.yaml` trains it again."
    )


def _checkpoint(summary: dict[str, Any]) -> str:
    return f"{summary['checkpoint']} ({'best on validation' if summary['best_commit'] else 'last'})"


def closing_words(summary: dict[str, Any], folder: Path, *, look: str) -> str:
    """Returns what a run ends with.

    Args:
        summary: The final figures.
        folder: The run's.
        look: Command or address that shows what was tracked.
    """
    layers = ", ".join(f"{error:.2%}" for error in summary["layer_errors"] or [])
    predicted = summary["predicted_samples_per_s"]
    by_goodness, by_readout = summary["test_goodness_error"], summary["test_readout_error"]
    worse = by_goodness is not None and by_goodness > by_readout + MUCH_WORSE
    since = " since it was resumed" if any("resumed" in each["lost"] for each in summary["recoveries"]) else ""
    lines = {
        "test error": errors_in_words(summary["test_goodness_error"], summary["test_readout_error"]),
        "note": "goodness, by which labels are predicted, is far worse than the readout; train longer" * worse,
        "each layer": layers and f"{layers} by goodness alone",
        "trained in": f"{summary['train_s']:.1f} s; {summary['wall_s']:.1f} s with start and evaluation{since}",
        "speed": f"{summary['samples_per_s']:,.0f} samples/s" + (f"; predicted: {predicted:,.0f}" if predicted else ""),
        "precision": summary["precision"],
        "checkpoint": _checkpoint(summary),
        "weights_sha256": summary["weights_sha256"],
        "run": folder,
        "tracked": f"{summary['mlflow_tracking_uri']}, run {summary['mlflow_run_id']}",
        "look at it": look,
    }
    return "\n".join(f"{name:<16}{text}" for name, text in lines.items() if text)
