"""Console output: tables and progress bars on a terminal, plain data in a file or a pipe."""

import csv
import importlib.util
import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ffdist.errors import ConfigError

Item = TypeVar("Item")
_is_quiet = False


def set_quiet(value: bool) -> None:
    """Sets whether this process prints only results, warnings and errors."""
    global _is_quiet
    _is_quiet = value


def is_quiet() -> bool:
    """Returns whether this process prints only results, warnings and errors."""
    return _is_quiet


class Screen(Console):
    """Standard output: a terminal, a notebook, a file or a pipe. A notebook without ipywidgets counts as a file."""

    def __init__(self, **options: Any) -> None:
        has_widgets = importlib.util.find_spec("ipywidgets") is not None  # without it, rich prints a warning
        super().__init__(force_jupyter=None if has_widgets else False, **options)

    def on_broken_pipe(self) -> None:
        """Discards further output if the reader has exited, such as `head`; rich would exit this process."""
        with suppress(SystemExit):
            super().on_broken_pipe()


def track(items: Iterable[Item], description: str) -> Generator[Item, None, None]:
    """Yields items with a progress bar that disappears at the end. Non-interactive output gets no bar."""
    screen = Screen()
    if is_interactive(screen) and not is_quiet():
        items = progress.track(items, description, console=screen, transient=True)
    yield from items


def is_interactive(screen: Console) -> bool:
    """Returns whether the output is a terminal or a notebook."""
    return screen.is_jupyter or screen.file.isatty()  # rich's is_terminal also follows FORCE_COLOR


def print_rows(rows: Sequence[Mapping[str, Any]], form: str | None = None) -> None:
    """Prints rows with equal columns.

    Args:
        rows: The rows.
        form: `csv` or `json`; by default a table on a terminal, and tab-separated values with a header elsewhere.
    """
    screen, columns = Screen(highlight=False), list(rows[0]) if rows else []
    if form or not is_interactive(screen):
        _write(rows, screen.file, form)
        return
    table = Table(*map(escape, columns), box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(escape(f"{value:,}" if type(value) is int else str(value)) for value in row.values()))
    screen.print(table)


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path, form: str) -> None:
    """Writes rows with equal columns to a file, as `csv` or `json`.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        with path.open("w") as file:
            _write(rows, file, form)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}); name another file") from error


def _write(rows: Sequence[Mapping[str, Any]], file: IO[str], form: str | None) -> None:
    if form == "json":
        print(json.dumps(rows, indent=2), file=file)
        return
    writer = csv.writer(file, "excel" if form else "excel-tab", lineterminator="\n")
    writer.writerows([list(rows[0]) if rows else [], *(row.values() for row in rows)])
