"""Other places than MLflow that get the metrics of a run: a CSV file and TensorBoard's event files."""

import csv
import importlib.util
import logging
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ffdist.errors import ConfigError
from ffdist.storage.files import file_in, path_in
from ffdist.tracking.outbox import Outbox, Point

FLUSH_INTERVAL_S = 10.0


class CsvSink:
    """Writes `metrics.csv`: name, number of samples seen, value and time in seconds since 1970."""

    def __init__(self, folder: Path) -> None:
        self._file = file_in(folder, "metrics.csv").open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(("metric", "step", "value", "time"))

    def add(self, points: Iterable[Point]) -> None:
        """Writes points."""
        self._writer.writerows((point.name, point.step, point.value, point.timestamp / 1000) for point in points)

    def flush(self) -> None:
        """Makes all points visible to readers."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardSink:
    """Writes event files into the folder `tensorboard`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        path = path_in(folder, "tensorboard")
        shutil.rmtree(path, ignore_errors=True)
        self._writer: Any = SummaryWriter(str(path))

    def add(self, points: Iterable[Point]) -> None:
        """Writes points."""
        for point in points:
            self._writer.add_scalar(point.name, point.value, point.step, walltime=point.timestamp / 1000)

    def flush(self) -> None:
        """Makes all points visible to readers."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


SINKS: dict[str, type[CsvSink | TensorBoardSink]] = {"csv": CsvSink, "tensorboard": TensorBoardSink}
"""Sinks, by their name in `tracking.also`."""


def check_packages(kinds: Sequence[str]) -> None:
    """Checks that the packages of sinks are installed.

    Raises:
        ConfigError: One is missing.
    """
    if "tensorboard" in kinds and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            f"tracking.also={list(kinds)} needs the package tensorboard, which is not installed; run `pip install "
            f"tensorboard`, or leave it out"
        )


class Sinks:
    """Copies the points of an outbox to sinks, in a thread of its own, so that training never waits.

    The outbox has the whole history of a run, so files are written anew when the run is resumed. An error ends the
    copying with a warning.

    Args:
        outbox: Outbox of the run.
        kinds: Keys of `SINKS`.
    """

    def __init__(self, outbox: Outbox, kinds: Sequence[str]) -> None:
        self._outbox, self._kinds, self._closing = outbox, sorted(set(kinds)), threading.Event()
        self._thread = threading.Thread(target=self._run, name="sinks", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Writes the rest, within a time limit."""
        self._closing.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            sinks = [SINKS[kind](self._outbox.folder) for kind in self._kinds]
            self._copy(sinks)
            for sink in sinks:
                sink.close()
        except Exception as error:  # a full disk, or a damaged outbox; training continues
            logging.getLogger(__name__).warning("tracking.also=%s stopped (%s)", self._kinds, error)

    def _copy(self, sinks: Sequence[CsvSink | TensorBoardSink]) -> None:
        steps, is_last = dict[str, int](), False
        while not is_last:
            is_last = self._closing.wait(FLUSH_INTERVAL_S)
            for points in self._outbox.points_after(steps):
                steps[points[-1].name] = points[-1].step
                for sink in sinks:
                    sink.add(points)
            for sink in sinks:
                sink.flush()
