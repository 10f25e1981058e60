"""Commands for finished runs."""

import os
import socket
import sys
from pathlib import Path

import click

from ffdist.cli.options import (
    check_writable,
    checkpoint_option,
    data_argument,
    find_database,
    find_finished_run,
    report_errors,
    runs_option,
)
from ffdist.config.sections import Tracking
from ffdist.errors import ConfigError, RunFailed

run_argument = click.argument("run")


@click.command()
@run_argument
@data_argument
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labeled images to evaluate on: a Parquet file, a folder of them, or a folder with one folder per class.",
)
@checkpoint_option
@runs_option
def evaluate(run: str, overrides: tuple[str, ...], data: Path | None, checkpoint: str | None, runs: Path) -> None:
    """Evaluate RUN, the folder or MLflow run id of a finished run, on its test set or on --data.

    If the run's data has moved, set data.path=NEW or data.root=NEW.
    """
    with report_errors():
        from ffdist.runs.inference import evaluate_on

        click.echo(evaluate_on(find_finished_run(run, runs, checkpoint, overrides), data))


@click.command()
@run_argument
@click.option(
    "--input",
    "inputs",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="An image, a Parquet file or a folder of either; may be repeated.",
)
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), help="Parquet file for all predictions.")
@checkpoint_option
@runs_option
def predict(run: str, inputs: tuple[Path, ...], to: Path | None, checkpoint: str | None, runs: Path) -> None:
    """Predict the labels of images with RUN, the folder or MLflow run id of a finished run.

    The probability and goodness of each label are printed. If the output is not a terminal, the label, probability and
    goodness of each image are printed as tab-separated values.
    """
    with report_errors():
        check_writable("--to", to)
        from ffdist.runs.inference import predict_files

        predict_files(find_finished_run(run, runs, checkpoint), inputs, to)


@click.command()
@run_argument
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), required=True, help="New or empty folder.")
@checkpoint_option
@runs_option
def export(run: str, to: Path, checkpoint: str | None, runs: Path) -> None:
    """Export the network of RUN, the folder or MLflow run id of a finished run, to files that do not need the run."""
    with report_errors():
        from ffdist.runs.export import export_network

        for file in export_network(find_finished_run(run, runs, checkpoint), to):
            click.echo(file)


@click.command()
@run_argument
@data_argument
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), help="Output folder; else the run's folder.")
@checkpoint_option
@runs_option
def plot(run: str, overrides: tuple[str, ...], to: Path | None, checkpoint: str | None, runs: Path) -> None:
    """Draw the plots of RUN, the folder or MLflow run id of a finished run.

    If the run's data has moved, set data.path=NEW or data.root=NEW.
    """
    with report_errors():
        for file in find_finished_run(run, runs, checkpoint, overrides).plot(to):
            click.echo(file)


experiment_option = click.option(
    "--experiment", default=Tracking().experiment, show_default=True, help="MLflow experiment."
)


@click.command()
@click.argument("run")
@data_argument
@checkpoint_option
@runs_option
def readout(run: str, overrides: tuple[str, ...], checkpoint: str | None, runs: Path) -> None:
    """Fit a readout to the frozen layers of RUN, the folder or MLflow run id of a finished run, until convergence.

    The error is recorded with the run if the run's results are of the same checkpoint. If the run's data has moved, set
    data.path=NEW or data.root=NEW.
    """
    with report_errors():
        from ffdist.runs.readout import fit_readout

        fit_readout(find_finished_run(run, runs, checkpoint, overrides), runs=runs)


@click.command()
@click.argument("run", required=False)
@runs_option
def sync(run: str | None, runs: Path) -> None:
    """Upload the pending data of RUN, the folder or MLflow run id of a run, or of all runs in the runs folder.

    The destination is MLFLOW_TRACKING_URI, or else the runs folder's database. Rejected data is reported with the
    reason. The exit code is 1 if any data is still pending.
    """
    with report_errors():
        from ffdist.runs.folder import find_run
        from ffdist.tracking.server import tracking_uri
        from ffdist.tracking.sync import pending_runs, sync

        folders = [find_run(run, runs)] if run else list(pending_runs(runs))
        runs = folders[0].parent if run else runs
        num_incomplete = 0
        for line, is_incomplete in sync(folders, tracking_uri(Tracking(), runs), runs):
            click.echo(line)
            num_incomplete += is_incomplete
        if num_incomplete:
            raise RunFailed(f"not everything was uploaded (runs: {num_incomplete}); run the same command again later")
        if not folders:
            click.echo(f"nothing is pending in {runs}")


@click.command()
@runs_option
@experiment_option
def results(runs: Path, experiment: str) -> None:
    """Print a table of all finished runs in MLFLOW_TRACKING_URI, or else in the runs folder's database.

    The table is Markdown on a terminal, and tab-separated values elsewhere.
    """
    with report_errors():
        from ffdist.runs.results import finished_runs, print_results, result_rows
        from ffdist.tracking.server import default_uri, tracking_uri

        uri = tracking_uri(Tracking(), runs)
        finished = finished_runs(find_database(runs) if uri == default_uri(runs) else uri, experiment)
        print_results(result_rows(finished))


@click.command()
@runs_option
@experiment_option
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
def ui(runs: Path, experiment: str, port: int) -> None:
    """Serve the MLflow UI of the runs folder's database on localhost, and print the address of the runs."""
    with report_errors():
        from ffdist.tracking.server import runs_page, update_artifact_paths

        uri, port = find_database(runs), _free_port(port)
        update_artifact_paths(runs)
        click.echo(f"starting at http://127.0.0.1:{port}{runs_page(uri, experiment)}")
    program = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port)]
    # MLflow's jobs evaluate language models: eight more processes, which take 0.9 GB and print tracebacks at Ctrl-C.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.execv(sys.executable, program)


def _free_port(first: int) -> int:
    """Returns the first free port of this machine, starting at `first`."""
    for port in range(first, min(first + 100, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ConfigError(f"--port, or one of the 99 ports after it, must be free (--port {first}); set another one")
