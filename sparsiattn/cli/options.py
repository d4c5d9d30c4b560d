"""Options that several commands take, and how their text is read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def budget(k: str | None) -> int | float | None:
    """``"20"`` is a count, ``"0.1"`` a share."""
    if k is None:
        return None
    try:
        return int(k) if k.lstrip("+-").isdigit() else float(k)
    except ValueError:
        raise typer.BadParameter(f"k must be a number, got {k!r}", param_hint="--k") from None


def dtype_of(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise typer.BadParameter(f"no floating dtype of torch: {name!r}", param_hint="--dtype")
    return found
