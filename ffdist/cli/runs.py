"""Commands for the runs in a runs folder, and for what is tracked of them."""

import os
import socket
import sys
from pathlib import Path

import click

from ffdist.cli.commands import command
from ffdist.cli.options import (
    find_database,
    format_option,
    report_errors,
    runs_argument,
    runs_option,
    uri_option,
)
from ffdist.config.sections import Tracking
from ffdist.console import print_rows
from ffdist.errors import ConfigError, RunFailed

experiment_option = click.option(
    "--experiment", help="MLflow experiment. Default: that of MLflow's variables, or else ffdist."
)


@command()
@runs_option
@format_option
def runs(runs: Path, form: str | None) -> None:
    """List runs, and how to resume them.

    The runs folder may contain finished, running, failed and killed runs.
    """
    with report_errors():
        from ffdist.runs.listing import list_runs

        rows = list_runs(runs)
        if not rows:
            raise ConfigError(f"{runs} contains no run; train one first, or set --runs DIR")
        print_rows(rows, form)


@command()
@runs_argument
@runs_option
@format_option
def compare(folders: tuple[str, ...], runs: Path, form: str | None) -> None:
    """Compare runs.

    The settings that differ between RUNs, folders or MLflow run ids, and their results are printed.
    """
    with report_errors():
        from ffdist.runs.listing import compare_runs

        print_rows(compare_runs(folders, runs), form)


@command()
@runs_argument
@runs_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(folders: tuple[str, ...], runs: Path, yes: bool) -> None:
    """Remove runs.

    The folders of RUNs are removed, with their checkpoints, and the runs are marked as deleted in MLflow. Checkpoints
    at checkpoint.uri are kept.
    """
    with report_errors():
        from ffdist.runs.folder import find_run
        from ffdist.runs.listing import remove_run

        run_folders = list(dict.fromkeys(find_run(name, runs) for name in folders))
        if not yes:
            click.confirm(f"remove {', '.join(map(str, run_folders))} with all files?", abort=True, err=True)
        for folder in run_folders:
            click.echo(remove_run(folder, runs))


@command()
@click.argument("run", required=False)
@runs_option
def sync(run: str | None, runs: Path) -> None:
    """Upload pending data to MLflow.

    RUN is the folder or MLflow run id of a run. Default: all runs in the runs folder. The destination is
    MLFLOW_TRACKING_URI, or else the runs folder's database. Rejected data is reported with the reason. The exit code is
    1 if any data is still pending.
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


@command()
@runs_option
@uri_option
@experiment_option
@format_option
def results(runs: Path, uri: str | None, experiment: str | None, form: str | None) -> None:
    """Print a table of results.

    It has a row for each configuration with finished runs at --uri, or else in the runs folder's database. The table is
    Markdown on a terminal, and tab-separated values elsewhere.
    """
    with report_errors():
        from ffdist.runs.results import finished_runs, print_results, result_rows
        from ffdist.tracking.server import default_uri, tracking_uri

        if uri:
            os.environ["MLFLOW_TRACKING_URI"] = uri
        uri = tracking_uri(Tracking(), runs)
        finished = finished_runs(find_database(runs) if uri == default_uri(runs) else uri, experiment)
        print_results(result_rows(finished), form)


@command()
@runs_option
@experiment_option
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port, if it is free.")
def ui(runs: Path, experiment: str | None, port: int) -> None:
    """Serve the MLflow UI.

    It shows the runs folder's database on localhost. The address of the runs is printed.
    """
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
