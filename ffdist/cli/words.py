"""What the commands share: their arguments, and the words for what went wrong."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from ffdist.config import Config, ConfigError, RunFailed
from ffdist.config_file import find_config, load_config

INTERRUPTED = 130

words_argument = click.argument("words", nargs=-1, metavar="CONFIG [SECTION.KEY=VALUE]...")
runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Runs folder.",
)


class Refused(click.ClickException):
    """A wrong setting or input, told in one paragraph."""

    exit_code = 2


class Stopped(click.ClickException):
    """A run that had to stop, told in one paragraph."""


@contextmanager
def told() -> Iterator[None]:
    """Turns what went wrong into words and an exit code."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except ConfigError as error:
        raise Refused(str(error)) from error
    except RunFailed as error:
        raise Stopped(str(error)) from error
    except KeyboardInterrupt as interrupt:
        click.echo(str(interrupt) or "interrupted; a run that had begun is marked as killed", err=True)
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def load(words: tuple[str, ...]) -> tuple[Config, str]:
    """Returns the configuration that the words name and change, and its name."""
    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        given = " ".join(names) or "none"
        raise ConfigError(
            f"one configuration makes a run (given: {given}); see {click.get_current_context().command_path} -h"
        )
    return load_config(names[0], [word for word in words if "=" in word]), find_config(names[0]).stem


def check_writable(option: str, path: Path | None) -> None:
    """Finds out now, rather than after the work, that a file named by an option cannot be written."""
    if path is None:
        return
    there = path.exists()
    try:
        path.open("a").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option} must be a file that can be written ({path}: {error.strerror})") from error


def database(runs: Path) -> str:
    """Returns the tracking database of a runs folder."""
    from ffdist.tracking.server import default_uri

    if not (runs / "mlflow.db").is_file():
        raise ConfigError(f"{runs} holds no tracked run; train one first, or set --runs DIR")
    return default_uri(runs)
