"""The commands."""

import os

import click

from ffdist.cli.around import negatives, readout, results, sync, ui
from ffdist.cli.proof import bench, chaos
from ffdist.cli.training import baseline, reproduce, train
from ffdist.cli.using import evaluate, export, plot, predict


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ffdist")
def main() -> None:
    """Train Forward-Forward networks as a stream over Ray actors."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # its errors are reported here, without its traceback


for command in (
    train,
    reproduce,
    baseline,
    evaluate,
    predict,
    plot,
    export,
    readout,
    results,
    sync,
    ui,
    negatives,
    chaos,
    bench,
):
    main.add_command(command)
