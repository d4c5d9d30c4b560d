"""Draw the imports between packages as ``docs/assets/packages.svg``.

``python tools/package_map.py`` writes the picture; ``--check`` fails if it is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "assets" / "packages.svg"

ADAPTERS = "sparsiattn_backbones"
PUBLIC = "public names"
"""The column of the root package, whose public names plug-in packages import."""

ROLES = {
    ADAPTERS: "adapters for model families (backbones/)",
    "methods": "published methods, written as plug-ins",
    "cli": "the commands, one per file",
    "testing": "suites for plug-ins, tiny models, doctor",
    "analysis": "inspect, profile, bench, search, show",
    "training": "calibrate, train, evaluate, data",
    "patching": "patch and its handle; discovery of attention",
    "serialization": "save, load, the Hub, export",
    "runtime": "hooks that run in a forward pass",
    "strategies": "selection of keys and tokens",
    "kernels": "computation of patterns",
    "attention": "sites, inputs, patterns, grids",
    "registry": "plug-ins and registered names",
    "errors": "all exceptions",
}

LEFT, BOX, ROW, STEP, TOP, GAP = 16, 436, 30, 34, 112, 8
INK, GREY, BLUE = "#212121", "#808080", "#5c6bc0"  # grey and blue show on white and on black


def layers() -> list[list[str]]:
    """The packages, highest layer first, from the import contract in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    (contract,) = (c for c in settings["importlinter"]["contracts"] if c["type"] == "layers")
    rows = [[name.strip() for name in row.split("|")] for row in contract["layers"]]
    rows[0] = [*rows[0], ADAPTERS]
    return [[name for name in row if not name.startswith("_")] for row in rows]


def package_of(module: str) -> str:
    """The package of a module, which is its row or column."""
    root, _, submodule = module.partition(".")
    return ADAPTERS if root == ADAPTERS else submodule.split(".")[0] or PUBLIC


def imports() -> set[tuple[str, str]]:
    """Pairs ``(importing, imported)`` of packages; imports inside functions count too."""
    sys.path[:0] = [str(ROOT), str(ROOT / "backbones")]
    graph = grimp.build_graph("sparsiattn", ADAPTERS, cache_dir=None)
    return {
        (package_of(module), package_of(imported))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    }


def text(x: float, y: float, words: str, **attributes: str | int) -> str:
    """An SVG text element; underscores in attribute names become hyphens."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}"{extra}>{words}</text>'


def draw(edges: set[tuple[str, str]]) -> str:
    """The picture: one row per package, and a dot for each package that it imports."""
    rows = layers()
    columns = [PUBLIC, *(name for row in rows[1:] for name in row)]
    place = {name: LEFT + BOX + 28 + STEP * i for i, name in enumerate(columns)}
    width, y, parts = place[columns[-1]] + 60, TOP, []
    for name, x in place.items():
        parts.append(
            text(x + 4, TOP - 14, name, fill=GREY, transform=f"rotate(-50 {x + 4} {TOP - 14})")
        )
    for row in rows:
        height = ROW * len(row)
        parts.append(
            f'<rect x="{LEFT}" y="{y}" width="{BOX}" height="{height}" rx="6" fill="#e8eaf6" '
            f'stroke="{BLUE}"/>'
        )
        for name in row:
            middle = y + ROW / 2
            parts += _row(name, middle, edges, place)
            y += ROW
        y += GAP
    size = f'viewBox="0 0 {width} {y + 28}" width="{width}"'
    note = (
        "A dot: the package on the left imports the one above. All dots are right of the squares."
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" '
            f'font-size="13" role="img" aria-label="{note}">',
            *parts,
            text(LEFT, y + 14, note, fill=GREY, font_size=12),
            "</svg>\n",
        ]
    )


def _row(
    name: str, middle: float, edges: set[tuple[str, str]], place: dict[str, float]
) -> list[str]:
    parts = [
        text(LEFT + 12, middle + 5, name, fill=INK, font_weight=600),
        text(LEFT + 184, middle + 5, ROLES[name], fill=INK, font_size=12),
        f'<path d="M{LEFT + BOX + 8} {middle:g}H{max(place.values()) + 8}" stroke="{GREY}" '
        'stroke-opacity="0.25"/>',
    ]
    for column, x in place.items():
        if column == name:
            parts.append(
                f'<rect x="{x - 5}" y="{middle - 5:g}" width="10" height="10" fill="{GREY}" '
                'fill-opacity="0.45"/>'
            )
        elif (name, column) in edges:
            parts.append(f'<circle cx="{x}" cy="{middle:g}" r="6" fill="{BLUE}"/>')
    return parts


def main() -> int:
    picture = draw(imports())
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(picture, encoding="utf-8")
    elif PICTURE.read_text(encoding="utf-8") != picture:
        print(f"{PICTURE.relative_to(ROOT)} does not match the imports: run `make map`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
