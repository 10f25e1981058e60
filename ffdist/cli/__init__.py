"""The command line."""

import os

import click

from ffdist.cli.commands import Sections
from ffdist.cli.config import config
from ffdist.cli.developer import bench, chaos
from ffdist.cli.inference import evaluate, export, fit_readout, plot, predict
from ffdist.cli.negatives import negatives
from ffdist.cli.runs import compare, results, rm, runs, sync, ui
from ffdist.cli.train import baseline, reproduce, resume, train


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ffdist")
def main() -> None:
    """Train Forward-Forward networks as a pipeline of Ray actors."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # ffdist reports MLflow's errors, without a traceback


main.add_section("Train", (train, resume, baseline, reproduce))
main.add_section("Configurations and negative data", (config, negatives))
main.add_section("Use a finished run", (evaluate, predict, plot, export, fit_readout))
main.add_section("Runs", (runs, compare, rm, results, sync, ui))
main.add_section("Develop ffdist", (bench, chaos))
