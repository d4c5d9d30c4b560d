"""What ``--help`` prints: plain text in sections.

Without rich: importing it takes longer than ``--help`` may, and its tables cut long option names.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

SECTIONS = ("Model", "Patch", "Data", "Goal", "Run", "Output")
"""Sections of options, in this order; those of a name that is not here come last."""
OTHERS = "Other"
RENAMED = {"--planners": "--patch"}
"""Options of earlier versions, which still work with a warning."""
COLUMN = 28
"""Where descriptions begin; they stand below names that are longer."""
COMMAND_COLUMN = 14
"""The same in the list of commands."""


class Page:
    """Sections of a page that commands and their group have in common."""

    help: str | None

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The description, and an example that can be copied below it."""
        about, example = parts_of(self.help)
        for paragraph in about:
            formatter.write("\n" + filled(paragraph, formatter.width, "  "))
        if example:
            formatter.write(f"\nExample:\n{continued(example, formatter.width)}")


class Command(Page, TyperCommand):
    """A command, its options in sections."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say first what needs no look at values: old names, and what is missing."""
        if ctx.resilient_parsing:
            return self._read_for_completion(ctx, args)
        warn_of_old_names(args)
        self._refuse_missing(ctx, args)
        return super().parse_args(ctx, args)

    def _read_for_completion(self, ctx: Any, args: list[str]) -> list[str]:
        """What is given already, as text: values in their types would take pydantic."""
        given, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        for one in self.get_params(ctx):
            ctx.params[one.name], source = one.consume_value(ctx, given)
            ctx.set_parameter_source(one.name, source)
        ctx.args = rest
        return list(rest)

    def _refuse_missing(self, ctx: Any, args: list[str]) -> None:
        """typer would say so, too, but it imports pydantic before."""
        given: dict[str, Any] = self.make_parser(ctx).parse_args(args=list(args))[0]
        if given.get("help"):
            return
        for one in self.get_params(ctx):
            if one.required and given.get(one.name) is None:
                kind = "argument" if is_argument(one) else "option"
                ctx.fail(f"Missing {kind} {names_of(one)}.")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``MODEL [OPTIONS]``."""
        return [*(names_of(one) for one in self.get_params(ctx) if is_argument(one)), "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Options by section."""
        for section, parameters in sections(self.get_params(ctx)).items():
            rows = [(names_of(one), description_of(one)) for one in parameters]
            formatter.write(f"\n{section}:\n{aligned(rows, formatter.width, COLUMN)}")


class Commands(Page, TyperGroup):
    """The group of all commands, which are listed by what they are for."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Options of the group.

        typer's own flags for completion have no default, and it imports pydantic to make that of
        its type.
        """
        parameters: list[Any] = super().get_params(ctx)
        for one in parameters:
            if getattr(one, "is_flag", False) and one.default is None:
                one.default = False
        return parameters

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands by section, then the options of the group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            groups.setdefault(command.rich_help_panel, []).append((name, summary_of(command.help)))
        for section, rows in groups.items():
            formatter.write(f"\n{section}:\n{aligned(rows, formatter.width, COMMAND_COLUMN)}")
        options = [(names_of(one), description_of(one)) for one in self.get_params(ctx)]
        formatter.write(f"\nOptions:\n{aligned(options, formatter.width, COLUMN)}")


def warn_of_old_names(args: Iterable[str]) -> None:
    """A line on stderr for every option that has another name now."""
    for name in dict.fromkeys(text.partition("=")[0] for text in args):
        if name in RENAMED:
            typer.secho(f"warning: {name} is now {RENAMED[name]}", fg="yellow", err=True)


def is_argument(parameter: Any) -> bool:
    """Whether a parameter of a command has no name on the command line."""
    return bool(parameter.param_type_name == "argument")


def sections(parameters: Iterable[Any]) -> dict[str, list[Any]]:
    """Parameters that are shown, by section."""
    shown = [one for one in parameters if not getattr(one, "hidden", False)]
    found: dict[str, list[Any]] = {name: [] for name in SECTIONS}
    for one in shown:
        found.setdefault(getattr(one, "rich_help_panel", None) or OTHERS, []).append(one)
    return {name: rows for name, rows in found.items() if rows}


def names_of(parameter: Any) -> str:
    """``-o, --option NAME=VALUE``, ``--quick / --no-quick`` or ``MODEL``."""
    if is_argument(parameter):
        return str(parameter.metavar or parameter.name.upper())
    ordered = sorted(parameter.opts, key=lambda name: len(name) > 2)  # -o before --option
    names = ", ".join(name for name in ordered if name not in RENAMED)
    if parameter.secondary_opts:
        names = f"{names} / {', '.join(parameter.secondary_opts)}"
    return names if parameter.is_flag else f"{names} {parameter.metavar}"


def description_of(parameter: Any) -> str:
    """What a parameter is, and its default."""
    text = " ".join((getattr(parameter, "help", None) or "").split())
    default = default_of(parameter)
    if default is not None:
        return f"{text} [default: {default}]"
    needed = parameter.required and not is_argument(parameter)
    return f"{text} [required]" if needed else text


def default_of(parameter: Any) -> str | None:
    """The default in words; None where there is none to speak of."""
    shown, default = getattr(parameter, "show_default", None), parameter.default
    if isinstance(shown, str):
        return shown
    if default is True:
        return str(parameter.opts[0])
    if isinstance(default, Enum):
        return str(default.value)
    spoken = isinstance(default, (str, int, float, Path)) and default is not False
    return str(default) if spoken and not parameter.required else None


def parts_of(text: str | None) -> tuple[list[str], str]:
    """Paragraphs of a docstring, and the command line behind ``Example:``."""
    about, _, example = (text or "").partition("Example: ")
    paragraphs = (" ".join(part.split()) for part in about.split("\n\n"))
    return [part for part in paragraphs if part], " ".join(example.split())


def summary_of(text: str | None) -> str:
    """The first sentence of a docstring, as lists of commands have it."""
    about, _ = parts_of(text)
    return about[0].partition(". ")[0].removesuffix(".") + "." if about else ""


def filled(text: str, width: int, indent: str) -> str:
    """A paragraph with all its words whole."""
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "".join(f"{line}\n" for line in lines)


def continued(command: str, width: int) -> str:
    """A command line over as many lines as it needs, as a shell takes it.

    >>> print(continued("sparsiattn bench test_vit --k 0.25 --rounds 3", 34), end="")
      sparsiattn bench test_vit \\
          --k 0.25 --rounds 3
    """
    # an option and its value stay on one line
    glued = re.sub(r"( -{1,2}[\w-]+) (?!-)", "\\1\N{NO-BREAK SPACE}", command)
    text = filled(glued, width - 2, "      ").rstrip("\n").replace("\n", " \\\n")
    return text.replace("      ", "  ", 1).replace("\N{NO-BREAK SPACE}", " ") + "\n"


def aligned(rows: Iterable[tuple[str, str]], width: int, column: int) -> str:
    """Names and descriptions in two columns, of which the second begins at ``column``."""
    return "".join(_row(*row, width, column) for row in rows)


def _row(name: str, text: str, width: int, column: int) -> str:
    described = filled(text, width, " " * column) or "\n"
    if len(name) + 4 > column:
        return f"  {name}\n{described}"
    return f"  {name}".ljust(column) + described.removeprefix(" " * column)
