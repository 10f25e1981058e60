"""Output: a terminal gets tables and progress bars, a file or a pipe gets data."""

import csv
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Item = TypeVar("Item")


class Screen(Console):
    """A terminal, a file or a pipe."""

    def on_broken_pipe(self) -> None:
        """Goes on and says nothing more where nobody reads on, such as `head`; rich's own ends the process."""
        with suppress(SystemExit):
            super().on_broken_pipe()


def track(items: Iterable[Item], what: str) -> Generator[Item, None, None]:
    """Yields items while a bar tells how far that is; only where somebody looks, and gone at the end."""
    screen = Screen()
    if is_interactive(screen):
        items = progress.track(items, what, console=screen, transient=True)
    yield from items


def is_interactive(screen: Console) -> bool:
    """Says whether somebody looks at it: what is not a terminal or a notebook gets no progress bar."""
    return screen.is_jupyter or screen.file.isatty()  # rich's is_terminal also follows FORCE_COLOR


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows with the same columns: a table on a terminal, tab-separated values with a header elsewhere."""
    screen, columns = Screen(highlight=False), list(rows[0]) if rows else []
    if not is_interactive(screen):
        writer = csv.writer(screen.file, "excel-tab", lineterminator="\n")
        writer.writerows([columns, *(row.values() for row in rows)])
        return
    table = Table(*map(escape, columns), box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(escape(f"{value:,}" if isinstance(value, int) else str(value)) for value in row.values()))
    screen.print(table)
