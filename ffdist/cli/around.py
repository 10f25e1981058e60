"""The commands around a run: what can be made before it and seen after it."""

import os
import sys
from pathlib import Path

import click

from ffdist.cli.words import database, load, runs_option, told, words_argument
from ffdist.sections import Tracking

experiment_option = click.option(
    "--experiment", default=Tracking().experiment, show_default=True, help="MLflow experiment."
)


@click.group()
def negatives() -> None:
    """Make negative data without training, and look at it."""


@negatives.command()
@words_argument
def make(words: tuple[str, ...]) -> None:
    """Fill negatives.store with the negatives of all epochs of CONFIG."""
    with told():
        config, _ = load(words)
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


@click.command()
@click.argument("run")
@runs_option
def readout(run: str, runs: Path) -> None:
    """Fit a readout to the layers of RUN, a finished run's folder or MLflow run id, until it is converged."""
    with told():
        from ffdist.offline import fit_readout

        fit_readout(run, runs=runs)


@click.command()
@runs_option
@experiment_option
def results(runs: Path, experiment: str) -> None:
    """Print a table of all finished runs, in Markdown; MLFLOW_TRACKING_URI may name another store."""
    with told():
        from ffdist.tracking.results import finished_runs, result_rows, results_table
        from ffdist.tracking.server import default_uri, tracking_uri

        uri = tracking_uri(Tracking(), runs)
        found = finished_runs(database(runs) if uri == default_uri(runs) else uri, experiment)
        click.echo(results_table(result_rows(found)))


@click.command()
@runs_option
@experiment_option
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
def ui(runs: Path, experiment: str, port: int) -> None:
    """Serve the MLflow UI on the runs folder's database, to this machine only, and say where the runs are in it."""
    with told():
        from ffdist.tracking.server import runs_page

        uri = database(runs)
        click.echo(f"in some seconds: http://127.0.0.1:{port}{runs_page(uri, experiment)}")
    program = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port)]
    # Eight processes more, which judge language models, take 0.9 GB, and write tracebacks at Ctrl-C.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.execv(sys.executable, program)
