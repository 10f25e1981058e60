"""Commands for negative data."""

from pathlib import Path

import click

from ffdist.cli.options import config_argument, load, report_errors


@click.group()
def negatives() -> None:
    """Create negative data in advance, and inspect it."""


@negatives.command()
@config_argument
def make(arguments: tuple[str, ...]) -> None:
    """Create the negatives of all epochs of CONFIG in negatives.store."""
    with report_errors():
        config, _ = load(arguments)
        from ffdist.training.offline_negatives import fill_store

        click.echo(f"{fill_store(config).uri} holds the negatives of {config.num_epochs} epochs")


@negatives.command()
@click.argument("store")
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("negatives.png"),
    show_default=True,
    help="Image file for a plot of samples and their negatives.",
)
def show(store: str, picture: Path) -> None:
    """Check STORE, print its contents and plot some of its negatives."""
    with report_errors():
        from ffdist.training.offline_negatives import show_store

        show_store(store, picture)
