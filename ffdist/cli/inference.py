"""Commands that use the network of a finished run."""

from pathlib import Path

import click

from ffdist.cli.commands import command
from ffdist.cli.options import (
    check_writable,
    checkpoint_option,
    data_argument,
    find_finished_run,
    report_errors,
    run_argument,
    runs_option,
)

image_column_option = click.option("--image-column", help="Column of images in tables. Default: that of training.")


@command()
@run_argument
@data_argument
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labeled samples: a Parquet or CSV file, a folder of them, or a folder with one folder of images per class.",
)
@image_column_option
@click.option("--label-column", help="Column of labels in tables. Default: that of training, or else label.")
@checkpoint_option
@runs_option
def evaluate(
    run: str, overrides: tuple[str, ...], data: Path | None, checkpoint: str | None, runs: Path, **columns: str | None
) -> None:
    """Print the errors of a run.

    RUN, the folder or MLflow run id of a finished run, is evaluated on its test set or on --data. If the run's data has
    moved, set data.path=NEW or data.root=NEW.
    """
    with report_errors():
        from ffdist.runs.inference import evaluate_on

        click.echo(evaluate_on(find_finished_run(run, runs, checkpoint, overrides), data, **columns))


@command()
@run_argument
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the predictions: .parquet, .json or .csv (without the probability and goodness of all labels).",
)
@image_column_option
@checkpoint_option
@runs_option
def predict(
    run: str,
    inputs: tuple[Path, ...],
    output: Path | None,
    image_column: str | None,
    checkpoint: str | None,
    runs: Path,
) -> None:
    """Predict the labels of samples.

    RUN is the folder or MLflow run id of a finished run. INPUT is an image, a Parquet or CSV file, or a folder of them.
    The probability and goodness of each label are printed. If the output is not a terminal, the label, probability and
    goodness of each sample are printed as tab-separated values.
    """
    with report_errors():
        check_writable("--output", output)
        from ffdist.runs.inference import predict_files

        predict_files(find_finished_run(run, runs, checkpoint), inputs, output, image_column=image_column)


@command()
@run_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="New or empty folder."
)
@checkpoint_option
@runs_option
def export(run: str, output: Path, checkpoint: str | None, runs: Path) -> None:
    """Export the network of a run.

    The files do not need RUN, the folder or MLflow run id of a finished run.
    """
    with report_errors():
        from ffdist.runs.export import export_network

        for file in export_network(find_finished_run(run, runs, checkpoint), output):
            click.echo(file)


@command()
@run_argument
@data_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder. Default: the run's folder."
)
@checkpoint_option
@runs_option
def plot(run: str, overrides: tuple[str, ...], output: Path | None, checkpoint: str | None, runs: Path) -> None:
    """Draw the plots of a run.

    RUN is the folder or MLflow run id of a finished run. If the run's data has moved, set data.path=NEW or
    data.root=NEW.
    """
    with report_errors():
        for file in find_finished_run(run, runs, checkpoint, overrides).plot(output):
            click.echo(file)


@command()
@run_argument
@data_argument
@checkpoint_option
@runs_option
def fit_readout(run: str, overrides: tuple[str, ...], checkpoint: str | None, runs: Path) -> None:
    """Fit a readout to frozen layers.

    The layers are those of RUN, the folder or MLflow run id of a finished run. The readout is fitted until convergence.
    The error is recorded with the run if the run's results are of the same checkpoint. If the run's data has moved, set
    data.path=NEW or data.root=NEW.
    """
    with report_errors():
        from ffdist.runs.readout import fit_readout

        fit_readout(find_finished_run(run, runs, checkpoint, overrides), runs=runs)
