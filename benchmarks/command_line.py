"""docs/cli.md, from the commands themselves."""

from __future__ import annotations

from typing import Any

import typer

from sparsiattn.cli import app
from sparsiattn.cli.help_page import description_of, names_of, parts_of, sections, summary_of

HEAD = """Each command is a thin layer over the Python function of the same name. MODEL is a timm
name, `hf:ORG/NAME` (or `hf:FOLDER`), `tv:NAME`, or a folder that `patch.save` wrote. Weights are
random unless `--pretrained` or `--checkpoint` is given. Commands write only files that
you name, except the cache of `tune` and the folder of `new-plugin`.

- `-h` or `--help` after a command shows its options. `sparsiattn --version` shows the version.
  `sparsiattn --install-completion` sets up completion by the Tab key.
- `--json` prints one JSON document to standard output and nothing else. Messages go to standard
  error.
- Exit codes: 0 for success, 1 for failure, 2 for wrong usage.

| command | what it does |
| --- | --- |
"""


def text() -> str:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    rows = [f"| [`{name}`](#{name}) | {summary_of(one.help)} |" for name, one in commands.items()]
    return HEAD + "\n".join([*rows, "", *map(_command, commands, commands.values())])


def _command(name: str, command: Any) -> str:
    about, example = parts_of(command.help)
    lines = [f"## {name}", "", *(line for part in about for line in (part, ""))]
    lines += ["```sh", example, "```", ""]
    found = sections(one for one in command.params if one.name != "help")
    lines += ["| argument or option | what it is |", "| --- | --- |"]
    for section, parameters in found.items():
        lines += [f"| **{section}** | |", *map(_row, parameters)]
    return "\n".join([*lines, ""])


def _row(parameter: Any) -> str:
    says = description_of(parameter).replace("|", "\\|")
    return f"| `{names_of(parameter)}` | {says} |"
