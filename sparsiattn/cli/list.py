"""``sparsiattn list``."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.options import AsJson

if TYPE_CHECKING:
    from rich.table import Table

    from sparsiattn.registry.listing import Info


class Kind(Enum):
    """What can be listed."""

    STRATEGIES = "strategies"
    KERNELS = "kernels"
    BACKBONES = "backbones"
    PLUGINS = "plugins"


def list_all(
    kind: Annotated[
        Kind | None,
        typer.Argument(
            metavar="[KIND]",
            rich_help_panel="Output",
            help="strategies, kernels, backbones or plugins, with a line about each; without it "
            "an overview.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List strategies, kernels, backbones and plug-ins, and the reason if one cannot be used here.

    A strategy is exact at full budget if, keeping everything, it gives the dense model's outputs.

    Example: sparsiattn list strategies
    """
    listing = contents()
    if kind is None:
        print_result(as_json, listing, *_overview(listing))
        return
    rows = listing[kind.value]
    print_result(as_json, {kind.value: rows}, _detailed(kind.value, rows))


def _overview(listing: dict[str, list[dict[str, Any]]]) -> list[Any]:
    """A line for each strategy, and names of the rest."""
    head = ("strategy", "makes fewer", "needs training", "exact at full budget")
    strategies = [
        (
            row["name"],
            {"attention": "keys"}.get(row["kind"], row["kind"]),
            "yes" if row["needs_training"] else "no",
            "no" if row["inexact"] else "yes",
        )
        for row in listing["strategies"]
    ]
    lines = [_names(kind, rows) for kind, rows in listing.items() if kind != "strategies"]
    return [[head, *strategies], *lines, "More about each: sparsiattn list strategies, kernels ..."]


def _names(kind: str, rows: list[dict[str, Any]]) -> str:
    """Names on one line; what cannot be used with the reason."""
    names = (
        row["name"] if row["status"] in _FINE else f"{row['name']} ({row['status']})"
        for row in rows
    )
    return f"{kind}: {', '.join(names) or 'none'}"


def _detailed(kind: str, rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("name", "summary", *(["status"] if any(map(_fault, rows)) else []), title=kind)
    for row in rows:
        table.add_row(row["name"], row["summary"], *filter(None, [_fault(row)]))
    return table


_FINE = ("usable", "working")


def _fault(row: dict[str, Any]) -> str:
    return "" if row["status"] in _FINE else str(row["status"])


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
