"""The commands."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

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


class Refused(click.ClickException):
    """A wrong setting or input, told in one paragraph."""

    exit_code = 2


class Stopped(click.ClickException):
    """A run that had to stop, told in one paragraph."""


@contextmanager
def told() -> Iterator[None]:
    """Turns what went wrong into words and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except ConfigError as error:
        raise Refused(str(error)) from error
    except RunFailed as error:
        raise Stopped(str(error)) from error
    except KeyboardInterrupt as interrupt:
        click.echo(str(interrupt) or "interrupted; a run that had begun is marked as killed", err=True)
        sys.exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _load(words: tuple[str, ...]) -> tuple[Config, str]:
    """Returns the configuration that the words name and change, and its name."""
    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        given = " ".join(names) or "none"
        raise ConfigError(f"one configuration makes a run (given: {given}); see {' '.join(sys.argv[1:2])} -h")
    return load_config(names[0], [word for word in words if "=" in word]), find_config(names[0]).stem


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ffdist")
def main() -> None:
    """Train Forward-Forward networks as a stream over Ray actors."""


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
        if summary:
            _check_writable(summary)
        config, name = _load(words)
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


def _check_writable(summary: Path) -> None:
    """Finds out now rather than after the training."""
    there = summary.exists()
    try:
        summary.open("a").close()
        if not there:
            summary.unlink()
    except OSError as error:
        raise ConfigError(f"--summary must be a file that can be written ({summary}: {error.strerror})") from error


main.add_command(train)
main.add_command(baseline)


@main.group()
def negatives() -> None:
    """Make negative data without training, and look at it."""


@negatives.command()
@words_argument
def make(words: tuple[str, ...]) -> None:
    """Fill negatives.store with the negatives of all epochs of CONFIG."""
    with told():
        config, _ = _load(words)
        from ffdist.offline import fill_store

        click.echo(f"{fill_store(config).uri} holds the negatives of {config.passes} epochs")


@negatives.command()
@click.argument("store")
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("negatives.png"),
    show_default=True,
    help="Where to draw samples beside their negatives.",
)
def show(store: str, picture: Path) -> None:
    """Check all of STORE, print what is in it and draw some of it."""
    with told():
        from ffdist.offline import show_store

        show_store(store, picture)


@main.command()
@click.argument("run")
@runs_option
def readout(run: str, runs: Path) -> None:
    """Fit a readout to the layers of RUN, a finished run's folder or MLflow run id, until it is converged."""
    with told():
        from ffdist.offline import fit_readout

        fit_readout(run, runs=runs)


@main.command()
@runs_option
@click.option("--experiment", default="ffdist", show_default=True, help="MLflow experiment.")
def results(runs: Path, experiment: str) -> None:
    """Print a table of all finished runs, in Markdown; MLFLOW_TRACKING_URI may name another store."""
    with told():
        from ffdist.tracking.results import results_table

        click.echo(results_table(os.environ.get("MLFLOW_TRACKING_URI") or _database(runs), experiment))


@main.command()
@runs_option
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
def ui(runs: Path, port: int) -> None:
    """Open the MLflow UI on the runs folder's database, on this machine only."""
    with told():
        uri = _database(runs)
    program = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port)]
    os.execv(sys.executable, program)


@main.command()
@words_argument
@click.option("--faults", type=click.IntRange(1), default=50, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Decides their order, victims and moments.")
@click.option("--minutes", type=float, default=40.0, show_default=True, help="When to stop injecting.")
@click.option("--json", "report", type=click.Path(path_type=Path, dir_okay=False), help="File for the table.")
@click.option("--simulated", type=click.IntRange(1), help="Schedules on simulated parts instead, without CONFIG.")
def chaos(
    words: tuple[str, ...], faults: int, seed: int, minutes: float, report: Path | None, simulated: int | None
) -> None:
    """Train CONFIG undisturbed, and again and again with faults, to show that they change nothing.

    All of it runs on this machine, on a Ray cluster of two nodes and with a tracking server of its own.
    """
    with told():
        if simulated:
            from ffdist.chaos.simulation import Broken, simulate

            try:
                outcome = simulate(simulated, seed)
            except Broken as error:
                raise RunFailed(str(error)) from error
            click.echo(
                f"{outcome.schedules:,} schedules with {outcome.faults:,} faults in {outcome.seconds:.0f} s: all ended "
                f"as the one without"
            )
            return
        if report:
            _check_writable(report)
        from ffdist.chaos.campaign import Campaign, print_report

        found = Campaign(words, _load(words)[0], faults=faults, seed=seed, minutes=minutes).run()
        print_report(found)
        if report:
            report.write_text(json.dumps({"rows": found.rows(), "faults": [fault._asdict() for fault in found.faults]}))
        if not found.unbroken:
            raise RunFailed("a fault was not survived, or left a trace")


def _database(runs: Path) -> str:
    from ffdist.tracking.server import default_uri

    if not (runs / "mlflow.db").is_file():
        raise ConfigError(f"{runs} holds no tracked run; train one first, or set --runs DIR")
    return default_uri(runs)


if __name__ == "__main__":
    main()
