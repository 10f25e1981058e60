"""The commands that train."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ffdist.cli.words import check_writable, load, runs_option, told, words_argument
from ffdist.config import ConfigError

RUN_OPTIONS = (
    runs_option,
    click.option(
        "--summary", type=click.Path(path_type=Path, dir_okay=False), help="File for the final figures, as JSON."
    ),
    click.option("--resume", metavar="RUN", help="Go on with RUN, a folder or MLflow run id, where it stopped."),
    click.option("--resume-from-older", is_flag=True, help="Pass over damaged commits of RUN."),
    click.option("--from", "origin", metavar="RUN", help="Start from the weights of RUN."),
)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds what every command that trains takes."""
    for option in reversed(RUN_OPTIONS):
        command = option(command)
    return command


@click.command()
@words_argument
@click.option(
    "--runner", type=click.Choice(["ray", "serial"]), default="ray", show_default=True, help="Where stages run."
)
@click.option("--address", help="Ray cluster to join; else RAY_ADDRESS, else a local Ray of the run's own.")
@run_options
@click.pass_context
def train(context: click.Context, /, words: tuple[str, ...], runner: Any, address: str | None, **run: Any) -> None:
    """Train CONFIG, a YAML file or the name of a shipped one (digits, mnist, ...).

    SECTION.KEY=VALUE sets a value over the file's, such as training.epochs=10.
    """
    default = context.obj.get("address", "local") if context.obj else "local"
    _train(words, **run, runner=runner, address=address or os.environ.get("RAY_ADDRESS") or default)


@click.command()
@words_argument
@run_options
def baseline(words: tuple[str, ...], **run: Any) -> None:
    """Train the layers of CONFIG by backpropagation end to end, on the same data in the same order, as a reference.

    All of it learns by training.readout_learning_rate, readout_weight_decay and smoothing.
    """
    _train(words, **run, runner="backpropagation")


def _train(
    words: tuple[str, ...],
    *,
    runs: Path,
    summary: Path | None,
    resume: str | None,
    resume_from_older: bool,
    origin: str | None,
    **how: Any,
) -> None:
    with told():
        check_writable("--summary", summary)
        config, name = load(words)
        if resume and origin:
            raise ConfigError(
                f"a run goes on or starts from another's weights, not both (--resume {resume}, --from {origin})"
            )
        from ffdist.start import find_run
        from ffdist.trainer import train as run_training

        run = run_training(
            config,
            runs=runs,
            name=name,
            resumed=find_run(resume, runs, config) if resume else None,
            from_older=resume_from_older,
            origin=find_run(origin, runs, config) if origin else None,
            **how,
        )
        if summary:
            summary.write_text(json.dumps(run.summary, indent=2) + "\n")
