"""Classes of commands: options that all of them take, hints for unknown options, and help in sections."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import click

from ffdist import console
from ffdist.config.loading import find_setting
from ffdist.ff.custom import working_directory_importable

DEBUG = "ffdist.debug"
"""Key of `Context.meta`: whether tracebacks are printed."""


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[DEBUG] = value


def _set_quiet(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    console.set_quiet(value)


def _import(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> None:
    for name in names:
        try:
            with working_directory_importable():
                import_module(name)
        except Exception as error:  # a module of the user may raise anything
            raise click.BadParameter(f"{name} cannot be imported ({type(error).__name__}: {error})") from error


class Command(click.Command):
    """A command with the options `--import`, `--debug` and `--quiet`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        flag = partial(click.Option, is_flag=True, expose_value=False)
        self.params += [
            click.Option(
                ["--import", "modules"],
                multiple=True,
                metavar="MODULE",
                callback=_import,
                expose_value=False,
                help="Import a module of yours first, which a run needs.",
            ),
            flag(["--quiet"], callback=_set_quiet, help="Print only results, warnings and errors."),
            flag(["--debug"], callback=_set_debug, envvar="FFDIST_DEBUG", help="Print the tracebacks of errors."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses arguments. If a setting was given as an option, the error says how to write it."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            setting = find_setting(error.option_name.lstrip("-"))
            if setting and any(parameter.name in ("arguments", "overrides") for parameter in self.params):
                hint = f"Settings are written without dashes: {setting}=VALUE."
                raise click.UsageError(f"{error.format_message()} {hint}", ctx) from error
            raise


class Group(click.Group):
    """A group of `Command`s."""

    command_class = Command


class Sections(Group):
    """A group whose help lists its commands in sections."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._sections: dict[str, list[str]] = {}

    def add_section(self, title: str, commands: Sequence[click.Command]) -> None:
        """Adds commands, which the help lists in this order under a title."""
        for command in commands:
            self.add_command(command)
        self._sections[title] = [str(command.name) for command in commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands of each section with their short help."""
        width = max(map(len, self.commands))
        for title, names in self._sections.items():
            with formatter.section(title):
                limit = formatter.width - width - 6
                formatter.write_dl(
                    [(name.ljust(width), self.commands[name].get_short_help_str(limit)) for name in names]
                )


command: Callable[..., Callable[[Callable[..., Any]], Command]] = partial(click.command, cls=Command)
"""Decorator of a command."""
