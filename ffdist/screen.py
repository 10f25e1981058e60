"""What is printed on, and bars for what takes a while."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from rich import progress
from rich.console import Console

Item = TypeVar("Item")


class Screen(Console):
    """A terminal, a file or a pipe."""

    def on_broken_pipe(self) -> None:
        """Goes on and says nothing more where nobody reads on, such as `head`; rich's own ends the process."""
        with suppress(SystemExit):
            super().on_broken_pipe()


def track(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Yields items while a bar tells how far that is; only where somebody looks, and gone at the end."""
    screen = Screen()
    unseen = not (screen.is_terminal or screen.is_jupyter)
    yield from progress.track(items, what, console=screen, transient=True, disable=unseen)
