"""The commands that train."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ffdist.cli.words import (
    MARKED_AS_KILLED,
    check_writable,
    checkpoint_option,
    load,
    runs_option,
    told,
    words_argument,
)
from ffdist.config import ConfigError, RunFailed

RUN_OPTIONS = (
    runs_option,
    click.option(
        "--summary", type=click.Path(path_type=Path, dir_okay=False), help="File for the final figures, as JSON."
    ),
    click.option("--resume", metavar="RUN", help="Go on with RUN, a folder or MLflow run id, where it stopped."),
    click.option("--resume-from-older", is_flag=True, help="Pass over damaged commits of RUN."),
    click.option("--from", "origin", metavar="RUN", help="Start from the weights of RUN."),
    checkpoint_option,
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

    Finished runs in the runs folder are not trained again, and stopped ones are resumed. The table is in Markdown on a
    terminal, and tab-separated values elsewhere. Exit code 1 tells that a figure missed its configuration's target.
    """
    with told(MARKED_AS_KILLED):
        from ffdist.reproduce import reproduce as run_them
        from ffdist.tracking.results import print_results

        found = run_them(names, seeds=seeds, runs=runs, runner=runner, address=address or "local")
        print_results(found.rows)
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
    checkpoint: str | None,
    **how: Any,
) -> None:
    with told(MARKED_AS_KILLED):
        check_writable("--summary", summary)
        config, name = load(words)
        if resume is not None and origin is not None:
            raise ConfigError(
                f"a run goes on or starts from another's weights, not both (--resume {resume}, --from {origin})"
            )
        if checkpoint is not None and origin is None:
            raise ConfigError(f"--checkpoint belongs to --from RUN, which is not given (--checkpoint {checkpoint})")
        from ffdist.pipeline.runner import keep_memory
        from ffdist.start import find_run
        from ffdist.trainer import train as run_training

        if how["runner"] != "ray":  # this process trains, and does nothing else
            keep_memory()
        run = run_training(
            config,
            runs=runs,
            name=name,
            resumed=None if resume is None else find_run(resume, runs, config),
            from_older=resume_from_older,
            origin=None if origin is None else find_run(origin, runs, config),
            checkpoint=checkpoint,
            **how,
        )
        if summary:
            summary.write_text(json.dumps(run.summary, indent=2) + "\n")
