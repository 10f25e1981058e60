"""Arguments, options and error handling of all commands."""

import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ffdist.cli.commands import DEBUG
from ffdist.config.loading import find_config, load_config, setting_names, shipped_configs
from ffdist.config.schema import Config
from ffdist.console import is_quiet
from ffdist.errors import ConfigError, RunFailed
from ffdist.signals import interrupts
from ffdist.storage.paths import find_in_subfolders, kind_of

if TYPE_CHECKING:
    from ffdist.runs.run import Run

EXIT_INTERRUPTED = 130
RUN_INTERRUPTED = "interrupted; a run that had started is marked as killed"
RUNS_VARIABLE = "FFDIST_RUNS"


def _complete_config(context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """Completes the name of a shipped configuration, the path of a file, and then settings."""
    settings = [CompletionItem(f"{name}=") for name in setting_names() if name.startswith(text)]
    if context.params.get(str(parameter.name)) or "." in text:
        return settings
    return [
        *(CompletionItem(name) for name in shipped_configs() if name.startswith(text)),
        CompletionItem(text, "file"),
    ]


def _complete_run(context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """Completes the folder of a run."""
    runs = Path(context.params.get("runs") or os.environ.get(RUNS_VARIABLE) or "runs")
    folders = map(str, (path.parent for path in find_in_subfolders(runs, "config.yaml")))
    return [CompletionItem(folder) for folder in folders if folder.startswith(text)]


config_argument = click.argument(
    "arguments", nargs=-1, metavar="CONFIG [SECTION.KEY=VALUE]...", shell_complete=_complete_config
)
run_argument = click.argument("run", shell_complete=_complete_run)
runs_argument = click.argument("folders", nargs=-1, required=True, metavar="RUN...", shell_complete=_complete_run)
runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    envvar=RUNS_VARIABLE,
    default=Path("runs"),
    help=f"Runs folder. Default: {RUNS_VARIABLE}, or else runs.",
)
format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "json"]),
    help="Format of the output. Default: a table on a terminal, and tab-separated values elsewhere.",
)
uri_option = click.option("--uri", help="MLflow tracking URI. Default: MLFLOW_TRACKING_URI.")
checkpoint_option = click.option(
    "--checkpoint",
    metavar="best|last|NAME",
    help="Checkpoint of RUN. Default: the best one if RUN was validated, else the last.",
)
data_argument = click.argument("overrides", nargs=-1, metavar="[data.path=NEW]")


class InvalidInput(click.ClickException):
    """An invalid setting or input: exit code 2."""

    exit_code = 2


class StoppedRun(click.ClickException):
    """A run that had to stop: exit code 1."""


@contextmanager
def report_errors(interrupted_text: str = "interrupted") -> Iterator[None]:
    """Reports expected errors in one paragraph, and exits with their exit code.

    Args:
        interrupted_text: Message for interrupts that have none.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that cannot be encoded must not end the command
    _set_environment()
    with interrupts() as interrupted:
        try:
            yield
            if sys.stdout:
                sys.stdout.flush()
        except BaseException as error:
            context = click.get_current_context(silent=True)
            if context and context.meta.get(DEBUG):
                traceback.print_exc()
            if isinstance(error, ConfigError):
                raise InvalidInput(str(error)) from error
            if isinstance(error, RunFailed):
                raise StoppedRun(str(error)) from error
            if interrupted() or isinstance(error, KeyboardInterrupt):  # libraries turn interrupts into other errors
                text = str(error) if isinstance(error, KeyboardInterrupt) else ""
                click.echo(text or interrupted_text, err=True)
                sys.exit(EXIT_INTERRUPTED)
            if isinstance(error, OSError) and error.errno != errno.EPIPE and _output_fails():
                raise StoppedRun(f"the output cannot be written ({error.strerror}); nothing else failed") from error
            raise


def _set_environment() -> None:
    """Sets a home folder if there is none, and keeps the working directory off the import path of child processes."""
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        Path.home()
    except RuntimeError:  # in some containers the user is not in /etc/passwd; importing MLflow needs a home folder
        os.environ["HOME"] = "/"


def _output_fails() -> bool:
    """Returns whether writing to standard output fails; if so, redirects it to /dev/null, so that the exit succeeds."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as devnull:  # noqa: PTH123, a descriptor is needed
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        return True
    return False


def load(arguments: tuple[str, ...]) -> tuple[Config, str]:
    """Loads the configuration that a command's arguments name, with their overrides; also returns its name."""
    names = [each for each in arguments if "=" not in each or os.path.isfile(each)]  # noqa: PTH113, it may be long
    if len(names) != 1:
        raise ConfigError(
            f"expected exactly one CONFIG (given: {' '.join(names) or 'none'}); for example: "
            f"{click.get_current_context().command_path} digits training.epochs=10"
        )
    overrides = [each for each in arguments if each not in names]
    return load_config(names[0], overrides), find_config(names[0]).stem


def check_writable(option: str, path: Path | None) -> None:
    """Raises ConfigError if the file of an option cannot be written, so that a command fails before its work."""
    if path is None:
        return
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block until it has a reader
            if not os.access(path, os.W_OK) or path.is_dir():
                raise OSError(errno.EACCES, "it is a folder or not writable")
            return
        target = Path(os.path.realpath(path))  # the target of a link may not exist yet
        is_new = not target.exists()
        target.open("a").close()
        if is_new:
            target.unlink()
    except OSError as error:
        raise ConfigError(f"{option} must be a file that can be written ({path}: {error.strerror})") from error


def write_json(path: Path | None, values: Mapping[str, Any]) -> None:
    """Writes values to the file of an option, if it is given."""
    if path:
        path.write_text(json.dumps(values, indent=2) + "\n")


def find_finished_run(name: str, runs: Path, checkpoint: str | None, overrides: tuple[str, ...] = ()) -> "Run":
    """Returns a finished run, and prints which of its checkpoints is used."""
    from ffdist.runs.run import Run

    run = Run.find(name, runs, checkpoint=checkpoint, overrides=overrides)
    if not is_quiet():
        click.echo(f"checkpoint: {run.checkpoint}", err=True)
    return run


def find_database(runs: Path) -> str:
    """Returns the URI of a runs folder's tracking database."""
    from ffdist.tracking.server import default_uri

    if kind_of(runs / "mlflow.db") != "file":
        raise ConfigError(f"{runs} holds no tracked run; train one first, or set --runs DIR")
    return default_uri(runs)
