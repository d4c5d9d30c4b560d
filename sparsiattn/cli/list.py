"""``sparsiattn list``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sparsiattn.cli.options import AsJson


def list_all(
    as_json: AsJson = False,
) -> None:
    """Strategies, kernels, backbones and plug-ins: usable here, or why not.

    Example: sparsiattn list --json
    """
    listing = contents()
    if as_json:
        print(json.dumps(listing, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for kind, rows in listing.items():
        table = Table("name", "summary", "status", title=kind, title_justify="left")
        for row in rows:
            table.add_row(row["name"], row["summary"], row["status"])
        console.print(table)


def contents() -> dict[str, list[dict[str, Any]]]:
    """What `list` prints, as plain data."""
    from sparsiattn.registry import listing as registered

    kinds = {
        "strategies": registered.list_strategies(),
        "kernels": registered.list_kernels(),
        "backbones": registered.list_backbones(),
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
            "status": f"broken: {_fault(plugin.error)}" if plugin.error else "working",
        }
        for plugin in registered.list_plugins().values()
    ]
    return listing


def _fault(error: BaseException) -> str:
    """The error in words, also where all it has is its type."""
    return str(error) or type(error).__name__
