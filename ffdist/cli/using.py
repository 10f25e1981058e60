"""The commands that use what was trained."""

from pathlib import Path

import click

from ffdist.cli.words import (
    check_writable,
    checkpoint_option,
    find_finished,
    moved_argument,
    runs_option,
    told,
)

run_argument = click.argument("run")


@click.command()
@run_argument
@moved_argument
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labelled images instead: Parquet, a folder of it, or one with a folder for each class.",
)
@checkpoint_option
@runs_option
def evaluate(run: str, overrides: tuple[str, ...], data: Path | None, checkpoint: str | None, runs: Path) -> None:
    """Evaluate RUN, a finished run's folder or MLflow run id, on its test set.

    data.path=NEW or data.root=NEW says where its data is, if that has moved.
    """
    with told():
        from ffdist.using import evaluate_on

        click.echo(evaluate_on(find_finished(run, runs, checkpoint, overrides), data))


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
@checkpoint_option
@runs_option
def predict(run: str, inputs: tuple[Path, ...], to: Path | None, checkpoint: str | None, runs: Path) -> None:
    """Predict images by RUN, a finished run's folder or MLflow run id, with probability and goodness of each label.

    Where the output is no terminal, it is tab-separated values: of each image the label, its probability and goodness.
    """
    with told():
        check_writable("--to", to)
        from ffdist.using import predict_files

        predict_files(find_finished(run, runs, checkpoint), inputs, to)


@click.command()
@run_argument
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder, new or empty.")
@checkpoint_option
@runs_option
def export(run: str, to: Path, checkpoint: str | None, runs: Path) -> None:
    """Write the network of RUN, a finished run's folder or MLflow run id, as files that need no run."""
    with told():
        from ffdist.using import export_network

        for file in export_network(find_finished(run, runs, checkpoint), to):
            click.echo(file)


@click.command()
@run_argument
@moved_argument
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), help="Folder to draw into; else the run's.")
@checkpoint_option
@runs_option
def plot(run: str, overrides: tuple[str, ...], to: Path | None, checkpoint: str | None, runs: Path) -> None:
    """Draw the plots of RUN, a finished run's folder or MLflow run id.

    data.path=NEW or data.root=NEW says where its data is, if that has moved.
    """
    with told():
        for picture in find_finished(run, runs, checkpoint, overrides).plot(to):
            click.echo(picture)
