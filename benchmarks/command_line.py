"""docs/cli.md, from the commands themselves."""

from __future__ import annotations

from typing import Any

import typer

from sparsiattn.cli import app

HEAD = """Each command is a thin layer over the Python function of the same name. MODEL is a timm
name, `hf:ORG/NAME` (or `hf:FOLDER`), `tv:NAME`, or a folder that `patch.save`
wrote; weights are random unless `--pretrained` is given. `--json` prints
one JSON document and nothing else to standard output; all else goes to standard error. Exit codes:
0 done, 1 failed, 2 wrong usage.
"""


def text() -> str:
    command = typer.main.get_command(app)
    parts = [HEAD]
    for name, one in command.commands.items():  # type: ignore[attr-defined]
        parts.append(_command(name, one))
    return "\n".join(parts)


def _command(name: str, command: Any) -> str:
    says = " ".join((command.help or "").split())
    about, _, example = says.partition("Example: ")
    lines = [f"## {name}", "", about.strip(), ""]
    if example:
        lines += ["```sh", example.strip().rstrip("."), "```", ""]
    rows = [_row(one) for one in command.params if one.name != "help"]
    if rows:
        lines += ["| argument or option | what it is |", "| --- | --- |", *rows, ""]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{one}`" for one in (*parameter.opts, *parameter.secondary_opts))
    says = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
    default = parameter.default
    if default not in (None, False, (), []) and not callable(default):
        says = f"{says} Default: `{default}`."
    return f"| {names} | {says} |"
