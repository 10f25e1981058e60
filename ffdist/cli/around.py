"""The commands around a run: what can be made before it and seen after it."""

import os
import socket
import sys
from pathlib import Path

import click

from ffdist.cli.words import (
    checkpoint_option,
    database,
    find_finished,
    load,
    moved_argument,
    runs_option,
    told,
    words_argument,
)
from ffdist.config import ConfigError, RunFailed
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
@moved_argument
@checkpoint_option
@runs_option
def readout(run: str, overrides: tuple[str, ...], checkpoint: str | None, runs: Path) -> None:
    """Fit a readout to the layers of RUN, a finished run's folder or MLflow run id, until it is converged.

    data.path=NEW or data.root=NEW says where its data is, if that has moved. The error is kept with the run if the
    checkpoint is the one that the run's own figures belong to.
    """
    with told():
        from ffdist.offline import fit_readout

        fit_readout(find_finished(run, runs, checkpoint, overrides), runs=runs)


@click.command()
@click.argument("run", required=False)
@runs_option
def sync(run: str | None, runs: Path) -> None:
    """Upload what is pending of RUN, a run's folder or MLflow run id, or of all runs in the runs folder.

    It goes to the runs folder's database, or where MLFLOW_TRACKING_URI says. What was rejected is reported with the
    reason. The exit code is 1 if something is left.
    """
    with told():
        from ffdist.start import find_run
        from ffdist.tracking.sending import pending_runs, sync
        from ffdist.tracking.server import tracking_uri

        folders = [find_run(run, runs)] if run else pending_runs(runs)
        runs = folders[0].parent if run else runs
        left = 0
        for line, is_left in sync(folders, tracking_uri(Tracking(), runs), runs):
            click.echo(line)
            left += is_left
        if left:
            raise RunFailed(f"not everything was uploaded (runs: {left}); run the same command again later")
        if not folders:
            click.echo(f"nothing is pending in {runs}")


@click.command()
@runs_option
@experiment_option
def results(runs: Path, experiment: str) -> None:
    """Print a table of all finished runs; MLFLOW_TRACKING_URI may name another store.

    It is in Markdown on a terminal, and tab-separated values elsewhere.
    """
    with told():
        from ffdist.tracking.results import finished_runs, print_results, result_rows
        from ffdist.tracking.server import default_uri, tracking_uri

        uri = tracking_uri(Tracking(), runs)
        found = finished_runs(database(runs) if uri == default_uri(runs) else uri, experiment)
        print_results(result_rows(found))


@click.command()
@runs_option
@experiment_option
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
def ui(runs: Path, experiment: str, port: int) -> None:
    """Serve the MLflow UI on the runs folder's database, to this machine only, and say where the runs are in it."""
    with told():
        from ffdist.tracking.server import follow_folder, runs_page

        uri, port = database(runs), _free_port(port)
        follow_folder(runs)
        click.echo(f"in some seconds: http://127.0.0.1:{port}{runs_page(uri, experiment)}")
    program = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port)]
    # Eight processes more, which judge language models, take 0.9 GB, and write tracebacks at Ctrl-C.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.execv(sys.executable, program)


def _free_port(first: int) -> int:
    """Returns the first port, from a given one on, that nothing on this machine listens on."""
    for port in range(first, min(first + 100, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ConfigError(f"no port from {first} on is free; set --port to another")
