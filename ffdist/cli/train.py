"""Commands that train."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ffdist.cli.options import (
    RUN_INTERRUPTED,
    check_writable,
    checkpoint_option,
    config_argument,
    load,
    report_errors,
    runs_option,
)
from ffdist.errors import ConfigError, RunFailed

RUN_OPTIONS = (
    runs_option,
    click.option(
        "--summary", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for the summary of the run."
    ),
    click.option("--resume", metavar="RUN", help="Resume RUN, a folder or MLflow run id, from its newest checkpoint."),
    click.option("--skip-damaged", is_flag=True, help="Resume from an older checkpoint if the newest is damaged."),
    click.option("--init-from", metavar="RUN", help="Warm start from the weights of RUN."),
    checkpoint_option,
)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of all commands that train."""
    for option in reversed(RUN_OPTIONS):
        command = option(command)
    return command


runner_option = click.option(
    "--runner",
    type=click.Choice(["ray", "serial"]),
    default="ray",
    show_default=True,
    help="Run stages as Ray actors, or serially in this process.",
)
address_option = click.option(
    "--address", envvar="RAY_ADDRESS", help="Ray cluster to join. Default: RAY_ADDRESS, or else a new local Ray."
)


@click.command()
@config_argument
@runner_option
@address_option
@run_options
@click.pass_context
def train(context: click.Context, /, arguments: tuple[str, ...], runner: Any, address: str | None, **run: Any) -> None:
    """Train CONFIG, a YAML file or the name of a shipped one (digits, mnist, ...).

    SECTION.KEY=VALUE overrides a setting of the file, such as training.epochs=10.
    """
    default = context.obj.get("address", "local") if context.obj else "local"
    _train(arguments, **run, runner=runner, address=address or default)


@click.command()
@click.argument("names", nargs=-1, metavar="[CONFIG]...")
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs per CONFIG, with consecutive seeds."
)
@runner_option
@address_option
@runs_option
def reproduce(names: tuple[str, ...], seeds: int, runner: Any, address: str | None, runs: Path) -> None:
    """Train every CONFIG, by default all that are shipped, and print a table of the results.

    Finished runs in the runs folder are reused, and interrupted ones are resumed. The table is Markdown on a terminal,
    and tab-separated values elsewhere. The exit code is 1 if a result misses its configuration's target.
    """
    with report_errors(RUN_INTERRUPTED):
        from ffdist.runs.results import print_results
        from ffdist.training.reproduce import reproduce as reproduce_results

        result = reproduce_results(names, seeds=seeds, runs=runs, runner=runner, address=address or "local")
        print_results(result.rows)
        if result.missed:
            raise RunFailed(f"a target was missed by {', '.join(result.missed)}")


@click.command()
@config_argument
@run_options
def baseline(arguments: tuple[str, ...], **run: Any) -> None:
    """Train the layers of CONFIG end to end by backpropagation, on the same data in the same order, as a baseline.

    All parameters are trained with training.readout_learning_rate, readout_weight_decay and momentum.
    """
    _train(arguments, **run, runner="backpropagation")


def _train(
    arguments: tuple[str, ...],
    *,
    runs: Path,
    summary: Path | None,
    resume: str | None,
    skip_damaged: bool,
    init_from: str | None,
    checkpoint: str | None,
    **options: Any,
) -> None:
    with report_errors(RUN_INTERRUPTED):
        check_writable("--summary", summary)
        config, name = load(arguments)
        if resume is not None and init_from is not None:
            raise ConfigError(
                f"--resume excludes --init-from (--resume {resume}, --init-from {init_from}); leave one of them out"
            )
        if checkpoint is not None and init_from is None:
            raise ConfigError(f"--checkpoint needs --init-from RUN (--checkpoint {checkpoint}); add it")
        from ffdist.pipeline.runner import keep_memory
        from ffdist.runs.folder import find_run
        from ffdist.training.trainer import train as run_training

        if options["runner"] != "ray":  # this process trains, and does nothing else
            keep_memory()
        run = run_training(
            config,
            runs=runs,
            name=name,
            resume=None if resume is None else find_run(resume, runs, config),
            skip_damaged=skip_damaged,
            init_from=None if init_from is None else find_run(init_from, runs, config),
            checkpoint=checkpoint,
            **options,
        )
        if summary:
            summary.write_text(json.dumps(run.summary, indent=2) + "\n")
