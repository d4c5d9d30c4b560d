"""``sparsiattn list``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sparsiattn.cli.console import print_result
from sparsiattn.cli.options import AsJson

if TYPE_CHECKING:
    from sparsiattn.registry.listing import Info


def list_all(as_json: AsJson = False) -> None:
    """Strategies, kernels, backbones and plug-ins: usable here, or why not.

    Example: sparsiattn list --json
    """
    from rich.table import Table

    listing, tables = contents(), []
    for kind, rows in listing.items():
        table = Table("name", "summary", "status", title=kind, title_justify="left")
        for row in rows:
            table.add_row(row["name"], row["summary"], row["status"])
        tables.append(table)
    print_result(as_json, listing, *tables)


def contents() -> dict[str, list[dict[str, Any]]]:
    """What `list_all` prints, as plain data."""
    from sparsiattn import list_backbones, list_kernels, list_plugins, list_strategies

    plugins = [
        {
            "name": plugin.name,
            "summary": f"{plugin.distribution}: {', '.join(plugin.provides) or 'nothing'}",
            "status": f"broken: {_text(plugin.error)}" if plugin.error else "working",
        }
        for plugin in list_plugins().values()
    ]
    return {
        "strategies": _rows(list_strategies()),
        "kernels": _rows(list_kernels()),
        "backbones": _rows(list_backbones()),
        "plugins": plugins,
    }


def _rows(infos: dict[str, Info]) -> list[dict[str, Any]]:
    names = {"inexact_reason": "inexact"}  # as the key was first called
    return [
        {
            **{names.get(name, name): value for name, value in asdict(info).items()},
            "status": "; ".join(info.reasons) or "usable",
        }
        for info in infos.values()
    ]


def _text(error: BaseException) -> str:
    """The error in words, also where all it has is its type."""
    return str(error) or type(error).__name__
