"""Draws ``docs/assets/logo.svg`` and ``favicon.svg``: a grid of patches, a query and the keys it
keeps. ``python tools/pages/logo.py``."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "docs" / "assets"
QUERY, KEYS = (2, 1), {(0, 0), (1, 3), (2, 2), (3, 1)}  # row and column in the grid of 4 x 4
STEP, SIDE, LEFT = 15, 11, 4


def square(row: int, column: int) -> str:
    """One patch: the query in yellow, its keys white, the others faint."""
    place = f'x="{LEFT + STEP * column}" y="{LEFT + STEP * row}"'
    kept = (row, column) in KEYS
    look = (
        'fill="#ffca28"'
        if (row, column) == QUERY
        else f'fill="#fff" opacity="{1 if kept else 0.3}"'
    )
    return f'<rect {place} width="{SIDE}" height="{SIDE}" rx="2" {look}/>'


def picture(back: str) -> str:
    """Return the drawing as SVG; ``back`` is the SVG element behind it, or empty."""
    patches = "".join(square(row, column) for row in range(4) for column in range(4))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">{back}{patches}</svg>\n'


if __name__ == "__main__":
    (ASSETS / "logo.svg").write_text(picture(""), encoding="utf-8")
    back = '<rect width="64" height="64" rx="12" fill="#3f51b5"/>'
    (ASSETS / "favicon.svg").write_text(picture(back), encoding="utf-8")
