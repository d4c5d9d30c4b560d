"""Formats reports as text and as JSON: tables, numbers, names of fields."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

Row = tuple[str, ...]


def aligned(rows: Sequence[Row]) -> list[str]:
    """Rows of cells as lines of text.

    >>> aligned([("site", "tokens"), ("blocks.0.attn", "65")])
    ['site           tokens', 'blocks.0.attn  65']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def plain(parts: Iterable[str | Sequence[Row]]) -> str:
    """Join lines, and tables given as rows of cells, into one text."""
    lines: list[str] = []
    for part in parts:
        lines += [part] if isinstance(part, str) else aligned(part)
    return "\n".join(lines)


def plain_data(report: Any, **old_names: str) -> dict[str, Any]:
    """A dataclass as plain data for JSON, which keeps the old names of renamed fields."""
    return asdict(report, dict_factory=lambda items: {old_names.get(k, k): v for k, v in items})


def macs_text(macs: int | None) -> str:
    """MACs in millions (M) or billions (G).

    >>> macs_text(1_258_000_000), macs_text(405_600), macs_text(None)
    ('1.258 G', '0.41 M', 'unknown')
    """
    if macs is None:
        return "unknown"
    return f"{macs / 1e9:.3f} G" if macs >= 1e9 else f"{macs / 1e6:.2f} M"


def percent(share: float | None) -> str:
    """A share in percent: ``0.123`` is ``12.3 %``, None is ``?``."""
    # adding 0.0 turns -0.0, which rounding can give, into 0.0
    return "?" if share is None else f"{round(100 * share, 1) + 0.0:.1f} %"


def speed_text(ratio: float | None) -> str:
    """A speed relative to dense attention: ``1.5`` is ``1.50x``, None is ``-``."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def shape_text(shape: object) -> str:
    """The sizes of a tensor, grid or tile, as ``1x3x224x224``; anything but a tuple as `str`."""
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)


def structure_lines(sites: Iterable[Any]) -> tuple[str, ...]:
    """One line for each structure of a sequence, with the sites that have it.

    Args:
        sites: Objects with a ``name`` and a ``structure``.
    """
    names: dict[str, list[str]] = {}
    for site in sites:
        names.setdefault(str(site.structure), []).append(site.name)
    return tuple(
        f"tokens of {first}{f' and {len(others)} more' if others else ''}: {structure}"
        for structure, (first, *others) in names.items()
    )
