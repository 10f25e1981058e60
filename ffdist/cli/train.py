"""Commands that train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ffdist.cli.commands import command
from ffdist.cli.options import (
    RUN_INTERRUPTED,
    check_writable,
    checkpoint_option,
    config_argument,
    load,
    report_errors,
    run_argument,
    runs_option,
    write_json,
)
from ffdist.config.schema import Config
from ffdist.errors import ConfigError, RunFailed

RUN_OPTIONS = (
    runs_option,
    click.option(
        "--summary", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for the summary of the run."
    ),
    click.option("--init-from", metavar="RUN", help="Warm start from the weights of RUN."),
    checkpoint_option,
)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of commands that train a new run."""
    for option in reversed(RUN_OPTIONS):
        command = option(command)
    return command


def runner_option(default: str | None) -> Callable[..., Any]:
    """Returns the option for the runner."""
    return click.option(
        "--runner",
        type=click.Choice(["ray", "serial"]),
        default=default,
        show_default=default or "that of the run",
        help="Run stages as Ray actors, or serially in this process.",
    )


address_option = click.option(
    "--address", envvar="RAY_ADDRESS", help="Ray cluster to join. Default: RAY_ADDRESS, or else a new local Ray."
)


@command()
@config_argument
@runner_option("ray")
@address_option
@run_options
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check CONFIG, its data and callbacks, and print the plan, memory and time. Ray is not started.",
)
@click.pass_context
def train(
    context: click.Context,
    /,
    arguments: tuple[str, ...],
    runner: Any,
    address: str | None,
    dry_run: bool,
    **run: Any,
) -> None:
    """Train a network.

    CONFIG is a YAML file, or the name of a shipped configuration (`ffdist config list`). SECTION.KEY=VALUE overrides a
    setting of the file, such as training.epochs=10.
    """
    if dry_run:
        with report_errors():
            from ffdist.training.plan import plan

            config = load(arguments)[0]
            source = _find_init_from(config, run["runs"], run["init_from"], run["checkpoint"])
            for name, text in plan(config, runner, init_from=source, checkpoint=run["checkpoint"]).items():
                click.echo(f"{name:<16}{text}")
        return
    _train(arguments, **run, runner=runner, address=address or default_address(context))


def default_address(context: click.Context) -> str | None:
    """Returns the address if none is given: `run.py` joins the cluster of its machine."""
    address: str | None = context.obj.get("address", "local") if context.obj else "local"
    return address


@command()
@run_argument
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@runner_option(None)
@address_option
@runs_option
@click.option("--skip-damaged", is_flag=True, help="Resume from an older checkpoint if the newest is damaged.")
@RUN_OPTIONS[1]
@click.pass_context
def resume(
    context: click.Context,
    /,
    run: str,
    overrides: tuple[str, ...],
    runner: Any,
    address: str | None,
    runs: Path,
    skip_damaged: bool,
    summary: Path | None,
) -> None:
    """Continue an interrupted run.

    RUN is the folder of the run, or its MLflow run id. It continues from its newest checkpoint, with its own
    configuration. SECTION.KEY=VALUE overrides settings that do not affect the weights. If the folder is
    lost, but not its checkpoints at checkpoint.uri, give its name and checkpoint.uri=URI.
    """
    with report_errors(RUN_INTERRUPTED):
        check_writable("--summary", summary)
        from ffdist.training.resume import find_interrupted
        from ffdist.training.trainer import train as run_training

        interrupted = find_interrupted(run, runs, overrides)
        _keep_memory(runner or interrupted.runner)
        result = run_training(
            interrupted.config,
            runs=interrupted.runs,
            runner=runner or interrupted.runner,
            address=address or default_address(context),
            resume=interrupted.folder,
            skip_damaged=skip_damaged,
        )
        write_json(summary, result.summary)


@command()
@click.argument("names", nargs=-1, metavar="[CONFIG]...")
@click.option("--all", "every", is_flag=True, help="Train all shipped configurations, which takes hours.")
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs per CONFIG, with consecutive seeds."
)
@runner_option("ray")
@address_option
@runs_option
def reproduce(names: tuple[str, ...], every: bool, seeds: int, runner: Any, address: str | None, runs: Path) -> None:
    """Train configurations, and print their results.

    Without CONFIG, the shipped configurations are listed.

    Finished runs in the runs folder are reused, and interrupted ones are resumed. The table is Markdown on a terminal,
    and tab-separated values elsewhere. The exit code is 1 if a run failed, or a result misses its configuration's
    target.
    """
    with report_errors(RUN_INTERRUPTED):
        if names and every:
            raise ConfigError(f"--all excludes CONFIG (given: {' '.join(names)}); leave one of them out")
        if not names and not every:
            from ffdist.cli.config import shipped_rows
            from ffdist.console import print_rows

            print_rows(shipped_rows())
            click.echo("give one or more of them, or --all, which takes hours and downloads missing datasets", err=True)
            return
        from ffdist.runs.results import print_results
        from ffdist.training.reproduce import reproduce as reproduce_results

        result = reproduce_results(names, seeds=seeds, runs=runs, runner=runner, address=address or "local")
        print_results(result.rows)
        if result.failed:
            raise RunFailed(f"{len(result.failed)} runs failed: {'; '.join(result.failed)}")
        if result.missed:
            raise RunFailed(f"a target was missed by {', '.join(result.missed)}")


@command()
@config_argument
@run_options
def baseline(arguments: tuple[str, ...], **run: Any) -> None:
    """Train the same layers by backpropagation.

    The layers of CONFIG are trained end to end, on the same data in the same order, as a baseline. All parameters are
    trained with training.readout_learning_rate, readout_weight_decay and momentum.
    """
    _train(arguments, **run, runner="backpropagation")


def _train(
    arguments: tuple[str, ...],
    *,
    runs: Path,
    summary: Path | None,
    init_from: str | None,
    checkpoint: str | None,
    **options: Any,
) -> None:
    with report_errors(RUN_INTERRUPTED):
        check_writable("--summary", summary)
        config, name = load(arguments)
        source = _find_init_from(config, runs, init_from, checkpoint)
        from ffdist.training.trainer import train as run_training

        _keep_memory(options["runner"])
        run = run_training(
            config,
            runs=runs,
            name=name,
            init_from=source,
            checkpoint=checkpoint,
            **options,
        )
        write_json(summary, run.summary)


def _find_init_from(config: Config, runs: Path, init_from: str | None, checkpoint: str | None) -> Path | None:
    """Returns the folder of the run that a run starts from, if any."""
    if init_from is None:
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint needs --init-from RUN (--checkpoint {checkpoint}); add it")
        return None
    from ffdist.runs.folder import find_run

    return find_run(init_from, runs, config.checkpoint.uri)


def _keep_memory(runner: str) -> None:
    if runner != "ray":  # this process trains, and does nothing else
        from ffdist.pipeline.runner import keep_memory

        keep_memory()
