"""The commands that use what was trained."""

from pathlib import Path

import click

from ffdist.cli.words import check_writable, runs_option, told

run_argument = click.argument("run")


@click.command()
@run_argument
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labelled images instead: Parquet, a folder of it, or one with a folder for each class.",
)
@runs_option
def evaluate(run: str, data: Path | None, runs: Path) -> None:
    """Evaluate RUN, a finished run's folder or MLflow run id, on its test set."""
    with told():
        from ffdist.finished import Run
        from ffdist.using import evaluate_on

        click.echo(evaluate_on(Run.find(run, runs), data))


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
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), help="Parquet file for all that is found.")
@runs_option
def predict(run: str, inputs: tuple[Path, ...], to: Path | None, runs: Path) -> None:
    """Predict images by RUN, a finished run's folder or MLflow run id, with probability and goodness of each label."""
    with told():
        check_writable("--to", to)
        from ffdist.finished import Run
        from ffdist.using import predict_files

        predict_files(Run.find(run, runs), inputs, to)


@click.command()
@run_argument
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder, new or empty.")
@runs_option
def export(run: str, to: Path, runs: Path) -> None:
    """Write the network of RUN, a finished run's folder or MLflow run id, as files that need no run."""
    with told():
        from ffdist.finished import Run
        from ffdist.using import export_network

        for file in export_network(Run.find(run, runs), to):
            click.echo(file)


@click.command()
@run_argument
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), help="Folder to draw into; else the run's.")
@runs_option
def plot(run: str, to: Path | None, runs: Path) -> None:
    """Draw the pictures of RUN, a finished run's folder or MLflow run id."""
    with told():
        from ffdist.finished import Run

        for picture in Run.find(run, runs).plot(to):
            click.echo(picture)
