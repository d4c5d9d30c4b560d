"""Tables and numbers as text, for reports of all kinds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Row = tuple[str, ...]


def aligned(rows: Sequence[Row]) -> list[str]:
    """Rows of cells as lines of text.

    >>> aligned([("site", "tokens"), ("blocks.0.attn", "65")])
    ['site           tokens', 'blocks.0.attn  65']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def plain(parts: Iterable[str | Sequence[Row]]) -> str:
    """Lines, and tables as rows of cells, as one text."""
    lines: list[str] = []
    for part in parts:
        lines += [part] if isinstance(part, str) else aligned(part)
    return "\n".join(lines)


def macs_text(macs: int | None) -> str:
    """MACs in millions or thousands of millions.

    >>> macs_text(1_258_000_000), macs_text(405_600), macs_text(None)
    ('1.258 G', '0.41 M', 'unknown')
    """
    if macs is None:
        return "unknown"
    return f"{macs / 1e9:.3f} G" if macs >= 1e9 else f"{macs / 1e6:.2f} M"


def percent(share: float | None) -> str:
    """A share: ``0.123`` is ``12.3 %``, unknown ``?``."""
    # adding zero turns minus zero, which rounding leaves behind, into zero
    return "?" if share is None else f"{round(100 * share, 1) + 0.0:.1f} %"


def speed_text(ratio: float | None) -> str:
    """A speed relative to dense attention: ``1.5`` is ``1.50x``, unknown ``-``."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def shape_text(shape: Iterable[int]) -> str:
    """The sizes of a tensor, grid or tile: ``(1, 3, 224, 224)`` is ``1x3x224x224``."""
    return "x".join(map(str, shape))
