"""The commands that prove what is said of ffdist."""

import json
from pathlib import Path

import click

from ffdist.cli.words import check_writable, load, told, words_argument
from ffdist.config import RunFailed


@click.command()
@words_argument
@click.option("--faults", type=click.IntRange(1), default=50, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Decides their order, victims and moments.")
@click.option("--minutes", type=float, default=40.0, show_default=True, help="When to stop injecting.")
@click.option("--json", "report", type=click.Path(path_type=Path, dir_okay=False), help="File for the table.")
@click.option("--simulated", type=click.IntRange(1), help="Schedules on simulated parts instead, without CONFIG.")
def chaos(
    words: tuple[str, ...], faults: int, seed: int, minutes: float, report: Path | None, simulated: int | None
) -> None:
    """Train CONFIG undisturbed, and again and again with faults, to show that they change nothing.

    All of it runs on this machine, on a Ray cluster of two nodes and with a tracking server of its own.
    """
    with told():
        if simulated:
            from ffdist.chaos.simulation import Broken, simulate

            try:
                outcome = simulate(simulated, seed)
            except Broken as error:
                raise RunFailed(str(error)) from error
            click.echo(
                f"{outcome.schedules:,} schedules with {outcome.faults:,} faults in {outcome.seconds:.0f} s: all ended "
                f"as the one without"
            )
            return
        check_writable("--json", report)
        from ffdist.chaos.campaign import Campaign, print_report

        found = Campaign(words, load(words)[0], faults=faults, seed=seed, minutes=minutes).run()
        print_report(found)
        if report:
            report.write_text(json.dumps({"rows": found.rows(), "faults": [fault._asdict() for fault in found.faults]}))
        if not found.unbroken:
            raise RunFailed("a fault was not survived, or left a trace")
