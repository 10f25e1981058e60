"""What the commands share: their arguments, and the words for what went wrong."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ffdist.config import Config, ConfigError, RunFailed
from ffdist.config_file import find_config, load_config
from ffdist.interrupts import interrupts
from ffdist.paths import kind_of

if TYPE_CHECKING:
    from ffdist.finished import Run

INTERRUPTED = 130
MARKED_AS_KILLED = "interrupted; a run that had begun is marked as killed"

words_argument = click.argument("words", nargs=-1, metavar="CONFIG [SECTION.KEY=VALUE]...")
runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Runs folder.",
)
checkpoint_option = click.option(
    "--checkpoint",
    metavar="best|last|NAME",
    help="Checkpoint of RUN; without it the best one if RUN was validated, else the last.",
)
moved_argument = click.argument("overrides", nargs=-1, metavar="[data.path=NEW]")


class Refused(click.ClickException):
    """A wrong setting or input, told in one paragraph."""

    exit_code = 2


class Stopped(click.ClickException):
    """A run that had to stop, told in one paragraph."""


@contextmanager
def told(interrupted_text: str = "interrupted") -> Iterator[None]:
    """Turns what went wrong into words and an exit code.

    Args:
        interrupted_text: What an interrupt is answered with where it brings no text of its own.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name that its encoding lacks must not end the command
    _set_environment()
    with interrupts() as interrupted:
        try:
            yield
            if sys.stdout:
                sys.stdout.flush()
        except BaseException as error:
            if isinstance(error, ConfigError):
                raise Refused(str(error)) from error
            if isinstance(error, RunFailed):
                raise Stopped(str(error)) from error
            if interrupted() or isinstance(error, KeyboardInterrupt):  # which libraries make others of
                said = str(error) if isinstance(error, KeyboardInterrupt) else ""
                click.echo(said or interrupted_text, err=True)
                sys.exit(INTERRUPTED)
            if isinstance(error, OSError) and error.errno != errno.EPIPE and _output_fails():
                raise Stopped(f"the output cannot be written ({error.strerror}); nothing else failed") from error
            raise


def _set_environment() -> None:
    """Makes up for a user without a home, and keeps the working directory off the import path of other processes."""
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        Path.home()
    except RuntimeError:  # as in a container whose user is not in its passwd; MLflow cannot be imported without one
        os.environ["HOME"] = "/"


def _output_fails() -> bool:
    """Says whether standard output refuses what was printed, and if so, discards it, so that the exit does not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123, a descriptor is needed
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return True
    return False


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
    try:
        if path.exists() and not path.is_file():  # a pipe would block until somebody reads it
            if not os.access(path, os.W_OK) or path.is_dir():
                raise OSError(errno.EACCES, "it is a folder, or may not be written")
            return
        target = Path(os.path.realpath(path))  # of a link that points to no file yet
        is_new = not target.exists()
        target.open("a").close()
        if is_new:
            target.unlink()
    except OSError as error:
        raise ConfigError(f"{option} must be a file that can be written ({path}: {error.strerror})") from error


def find_finished(run: str, runs: Path, checkpoint: str | None, overrides: tuple[str, ...] = ()) -> "Run":
    """Returns a finished run, and says which of its checkpoints is used."""
    from ffdist.finished import Run

    found = Run.find(run, runs, checkpoint=checkpoint, overrides=overrides)
    click.echo(f"checkpoint: {found.checkpoint}", err=True)
    return found


def database(runs: Path) -> str:
    """Returns the tracking database of a runs folder."""
    from ffdist.tracking.server import default_uri

    if kind_of(runs / "mlflow.db") != "file":
        raise ConfigError(f"{runs} holds no tracked run; train one first, or set --runs DIR")
    return default_uri(runs)
