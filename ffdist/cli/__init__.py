"""The command line."""

import os

import click

from ffdist.cli.developer import bench, chaos
from ffdist.cli.negatives import negatives
from ffdist.cli.runs import evaluate, export, plot, predict, readout, results, sync, ui
from ffdist.cli.train import baseline, reproduce, train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ffdist")
def main() -> None:
    """Train Forward-Forward networks as a pipeline of Ray actors."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # ffdist reports MLflow's errors, without a traceback


for command in (
    *(train, reproduce, baseline, negatives),
    *(evaluate, predict, plot, export, readout, results, sync, ui),
    *(chaos, bench),
):
    main.add_command(command)
