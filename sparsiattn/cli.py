"""The command line: ``sparsiattn list``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparsiattn import registry

app = typer.Typer(no_args_is_help=True, help="Sparse attention for any Vision Transformer.")


@app.callback()
def main() -> None:
    """Sparse attention for any Vision Transformer."""


@app.command("list")
def list_all(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Strategies, kernels, backbones and plug-ins: usable here, or why not.

    Example: sparsiattn list --json
    """
    listing = contents()
    if as_json:
        print(json.dumps(listing, indent=2))
        return
    console = Console()
    for kind, rows in listing.items():
        table = Table("name", "summary", "status", title=kind, title_justify="left")
        for row in rows:
            table.add_row(row["name"], row["summary"], row["status"])
        console.print(table)


def contents() -> dict[str, list[dict[str, Any]]]:
    """What `list` prints, as plain data."""
    kinds = {
        "strategies": registry.strategies(),
        "kernels": registry.kernels(),
        "backbones": registry.backbones(),
    }
    listing: dict[str, list[dict[str, Any]]] = {
        kind: [
            {**asdict(info), "status": "; ".join(info.reasons) or "usable"}
            for info in infos.values()
        ]
        for kind, infos in kinds.items()
    }
    listing["plugins"] = [
        {
            "name": plugin.name,
            "summary": f"{plugin.distribution}: {', '.join(plugin.provides) or 'nothing'}",
            "status": f"broken: {plugin.error}" if plugin.broken else "working",
        }
        for plugin in registry.plugins()
    ]
    return listing
