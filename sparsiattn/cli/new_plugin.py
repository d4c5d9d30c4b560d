"""``sparsiattn new-plugin``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsiattn.cli.console import readable_errors
from sparsiattn.cli.options import AsJson


def write_plugin(
    name: Annotated[str, typer.Argument(help="Of the package, such as far-keys.")],
    directory: Annotated[Path, typer.Option(help="Where its folder is made.")] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Write an installable plug-in package: a strategy, a kernel, their tests, a README.

    Example: sparsiattn new-plugin far-keys
    """
    from sparsiattn.registry.new_plugin import new_plugin

    with readable_errors():
        folder = new_plugin(name, directory)
    if as_json:
        files = sorted(str(file) for file in folder.rglob("*") if file.is_file())
        print(json.dumps({"folder": str(folder), "files": files}, indent=2))
        return
    print(f"{folder}: written. Next:\n  pip install -e '{folder}[dev]'\n  pytest {folder}")
