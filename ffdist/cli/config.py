"""Commands that show configurations and settings."""

import re
from itertools import takewhile
from typing import Any

import click

from ffdist.cli.commands import Group
from ffdist.cli.options import config_argument, format_option, load, report_errors
from ffdist.config.loading import find_config, load_config, shipped_configs
from ffdist.config.reference import COLUMNS, setting_rows
from ffdist.config.schema import SECTIONS
from ffdist.console import print_rows
from ffdist.errors import ConfigError


@click.group(cls=Group)
def config() -> None:
    """Show configurations and settings."""


@config.command("list")
@format_option
def list_configs(form: str | None) -> None:
    """List the shipped configurations."""
    with report_errors():
        print_rows(shipped_rows(), form)


def shipped_rows() -> list[dict[str, Any]]:
    """Returns a row for each shipped configuration, with the first line of its comment."""
    rows = []
    for name, path in shipped_configs().items():
        config = load_config(str(path))
        rows.append(
            {
                "config": name,
                "data": config.data.name,
                "layers": "-".join(map(str, config.model.layers)),
                "negatives": config.negatives.kind,
                "epochs": config.num_epochs,
                "description": _first_sentence(path.read_text()),
            }
        )
    return rows


def _first_sentence(text: str) -> str:
    """Returns the first sentence of the comment at the start of a file."""
    lines = [line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), text.split("\n"))]
    return re.split(r"(?<=\w[.:]) ", " ".join(lines))[0].rstrip(".")


@config.command()
@config_argument
def show(arguments: tuple[str, ...]) -> None:
    """Print CONFIG with all settings, including defaults, as YAML that `ffdist train` reads."""
    with report_errors():
        click.echo(load(arguments)[0].to_yaml(), nl=False)


@config.command()
@click.argument("section", required=False, shell_complete=lambda *_: list(SECTIONS))
@format_option
def keys(section: str | None, form: str | None) -> None:
    """Print the settings of SECTION, or of all sections, with their values and defaults."""
    with report_errors():
        if section is not None and section not in SECTIONS:
            raise ConfigError(f"SECTION must be one of {', '.join(SECTIONS)} (given: {section})")
        rows = [row for name in ([section] if section else ["", *SECTIONS]) for row in setting_rows(name)]
        print_rows([dict(zip(COLUMNS, (cell.replace("`", "") for cell in row), strict=True)) for row in rows], form)


@config.command()
@config_argument
@format_option
def diff(arguments: tuple[str, ...], form: str | None) -> None:
    """Print the settings that differ between CONFIG and a second CONFIG, or between CONFIG and its overrides."""
    with report_errors():
        from ffdist.runs.listing import compare_configs

        names = [each for each in arguments if "=" not in each]
        overrides = [each for each in arguments if "=" in each]
        if len(names) not in (1, 2) or (len(names) == 1 and not overrides):
            raise ConfigError(f"give two configurations, or one and SECTION.KEY=VALUE (given: {' '.join(arguments)})")
        configs = {str(find_config(name)): load_config(name) for name in names}
        if overrides:
            configs = {**configs, "with overrides": load_config(names[-1], overrides)}
        print_rows(compare_configs(configs), form)
