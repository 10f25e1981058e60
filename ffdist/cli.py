"""The commands."""

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ffdist.config import ConfigError, find_config, load_config

INTERRUPTED = 130


class Refused(click.ClickException):
    """A wrong setting or input, told in one paragraph."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ffdist")
def main() -> None:
    """Train Forward-Forward networks as a stream over Ray actors."""


@click.command()
@click.argument("words", nargs=-1, metavar="CONFIG [SECTION.KEY=VALUE]...")
@click.option(
    "--runner", type=click.Choice(["ray", "serial"]), default="ray", show_default=True, help="Where stages run."
)
@click.option("--address", help="Ray cluster to join; else RAY_ADDRESS, else a local Ray of the run's own.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Runs folder.",
)
@click.option("--summary", type=click.Path(path_type=Path, dir_okay=False), help="File for the final figures, as JSON.")
@click.pass_context
def train(
    context: click.Context,
    words: tuple[str, ...],
    runner: Any,
    address: str | None,
    runs: Path,
    summary: Path | None,
) -> None:
    """Train CONFIG, a YAML file or the name of a shipped one (digits, mnist, ...).

    SECTION.KEY=VALUE sets a value over the file's, such as training.epochs=10.
    """
    default = context.obj.get("address", "local") if context.obj else "local"
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if summary:
            summary.open("a").close()  # found out now rather than after the training
        names = [word for word in words if "=" not in word]
        if len(names) != 1:
            raise ConfigError(
                f"one configuration makes a run (given: {' '.join(names) or 'none'}); see ffdist train -h"
            )
        loaded = load_config(names[0], [word for word in words if "=" in word])
        from ffdist.trainer import train as run_training

        run = run_training(
            loaded,
            runner=runner,
            address=address or os.environ.get("RAY_ADDRESS") or default,
            runs=runs,
            name=find_config(names[0]).stem,
        )
        if summary:
            summary.write_text(json.dumps(run.summary, indent=2) + "\n")
    except ConfigError as error:
        raise Refused(str(error)) from error
    except OSError as error:
        if summary is None or error.filename != str(summary):
            raise
        raise Refused(f"--summary must be a file that can be written ({summary}: {error.strerror})") from error
    except KeyboardInterrupt:
        click.echo("interrupted; a run that had begun is marked as killed", err=True)
        sys.exit(INTERRUPTED)


main.add_command(train)


@main.command()
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
def ui(runs: Path, port: int) -> None:
    """Open the MLflow UI on the runs folder's database, on this machine only."""
    from ffdist.tracking.tracker import default_uri

    if not (runs / "mlflow.db").is_file():
        raise Refused(f"{runs} holds no tracked run; train one first, or set --runs DIR")
    program = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", default_uri(runs), "--port", str(port)]
    os.execv(sys.executable, program)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
