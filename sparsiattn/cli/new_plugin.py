"""``sparsiattn new-plugin``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.options import AsJson, in_output


def write_plugin(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            rich_help_panel="Output",
            help="Name of the package, for example far-keys.",
        ),
    ],
    directory: Annotated[
        Path,
        in_output(
            metavar="FOLDER",
            show_default="the current folder",
            help="Folder in which the package's folder is made.",
        ),
    ] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Write an installable plug-in package: a strategy, a kernel, their tests and a README.

    Example: sparsiattn new-plugin far-keys
    """
    from sparsiattn.registry.new_plugin import new_plugin

    folder = new_plugin(name, directory)
    files = sorted(str(file) for file in folder.rglob("*") if file.is_file())
    text = f"{folder}: written. Next:\n  pip install -e '{folder}[dev]'\n  pytest {folder}"
    print_result(as_json, {"folder": str(folder), "files": files}, text)
