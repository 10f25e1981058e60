"""Commands for negative data."""

from pathlib import Path

import click

from ffdist.cli.commands import Group
from ffdist.cli.options import config_argument, load, report_errors


@click.group(cls=Group)
def negatives() -> None:
    """Create negatives in advance; inspect them."""


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
    help="Image file for a plot of samples and their negatives. Default: no plot.",
)
def show(store: str, picture: Path | None) -> None:
    """Check STORE, and print its contents."""
    with report_errors():
        from ffdist.training.offline_negatives import show_store

        show_store(store, picture)
