"""What the commands share: their arguments, and the words for what went wrong."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ffdist.config import Config, ConfigError, RunFailed
from ffdist.config_file import find_config, load_config
from ffdist.interrupts import interrupts

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
    with interrupts() as interrupted:
        try:
            yield
        except BaseException as error:
            if isinstance(error, ConfigError):
                raise Refused(str(error)) from error
            if isinstance(error, RunFailed):
                raise Stopped(str(error)) from error
            if interrupted() or isinstance(error, KeyboardInterrupt):  # which libraries make others of
                said = str(error) if isinstance(error, KeyboardInterrupt) else ""
                click.echo(said or "interrupted; a run that had begun is marked as killed", err=True)
                sys.exit(INTERRUPTED)
            raise


def load(words: tuple[str, ...]) -> tuple[Config, str]:
    """Returns the configuration that the words name and change, and its name."""
    names = [word for word in words if "=" not in word or os.path.isfile(word)]  # noqa: PTH113, a value may be long
    if len(names) != 1:
        given = " ".join(names) or "none"
        raise ConfigError(
            f"one configuration makes a run (given: {given}); see {click.get_current_context().command_path} -h"
        )
    return load_config(names[0], [word for word in words if word not in names]), find_config(names[0]).stem


def check_writable(option: str, path: Path | None) -> None:
    """Finds out now, rather than after the work, that a file named by an option cannot be written."""
    if path is None:
        return
    there = path.exists() or path.is_symlink()
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
