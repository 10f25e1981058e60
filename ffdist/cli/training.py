"""The commands that train."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ffdist.cli.words import check_writable, load, runs_option, told, words_argument
from ffdist.config import ConfigError, RunFailed

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


runner_option = click.option(
    "--runner", type=click.Choice(["ray", "serial"]), default="ray", show_default=True, help="Where stages run."
)
address_option = click.option(
    "--address", envvar="RAY_ADDRESS", help="Ray cluster to join; else RAY_ADDRESS, else a local Ray of its own."
)


@click.command()
@words_argument
@runner_option
@address_option
@run_options
@click.pass_context
def train(context: click.Context, /, words: tuple[str, ...], runner: Any, address: str | None, **run: Any) -> None:
    """Train CONFIG, a YAML file or the name of a shipped one (digits, mnist, ...).

    SECTION.KEY=VALUE sets a value over the file's, such as training.epochs=10.
    """
    default = context.obj.get("address", "local") if context.obj else "local"
    _train(words, **run, runner=runner, address=address or default)


@click.command()
@click.argument("names", nargs=-1, metavar="[CONFIG]...")
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs of each, counting on its seed."
)
@runner_option
@address_option
@runs_option
def reproduce(names: tuple[str, ...], seeds: int, runner: Any, address: str | None, runs: Path) -> None:
    """Train CONFIG after CONFIG, all that are shipped if none is named, and print their figures side by side.

    What the runs folder has of them is not trained again, and what was stopped goes on. Exit code 1 tells that a figure
    missed its configuration's target.
    """
    with told():
        from ffdist.reproduce import reproduce as run_them

        found = run_them(names, seeds=seeds, runs=runs, runner=runner, address=address or "local")
        click.echo(found.table)
        if found.missed:
            raise RunFailed(f"a target was missed by {', '.join(found.missed)}")


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
        if resume is not None and origin is not None:
            raise ConfigError(
                f"a run goes on or starts from another's weights, not both (--resume {resume}, --from {origin})"
            )
        from ffdist.start import find_run
        from ffdist.trainer import train as run_training

        run = run_training(
            config,
            runs=runs,
            name=name,
            resumed=None if resume is None else find_run(resume, runs, config),
            from_older=resume_from_older,
            origin=None if origin is None else find_run(origin, runs, config),
            **how,
        )
        if summary:
            summary.write_text(json.dumps(run.summary, indent=2) + "\n")
