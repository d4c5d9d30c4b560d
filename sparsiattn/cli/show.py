"""``sparsiattn show``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsiattn.cli.console import check_file, print_result
from sparsiattn.cli.model_command import PATCH_OPTIONS, ModelRequest, model_command
from sparsiattn.cli.options import AsJson, Device, DType, in_output, place_of

UNWRITTEN = "nothing written: --out page.html writes a page to explore, --out keys.png a picture"


Photo = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", rich_help_panel="Data", help="A photo: JPEG, PNG ..."),
]
ShowFiles = Annotated[
    list[Path] | None,
    in_output(
        metavar="FILE",
        help="Write a page (.html) or a picture (.png, .svg, .pdf). Repeatable. Without it, "
        "figures are printed and nothing is written.",
    ),
]
View = Annotated[
    str,
    in_output(
        metavar="NAME",
        help="What a picture shows: overview, layers, heads, tokens or density. A page has "
        "all of them.",
    ),
]
Layers = Annotated[
    list[str] | None,
    in_output(
        metavar="LAYER",
        show_default="all",
        help="Layer to show: a number, a name or a pattern (blocks.1*). Repeatable.",
    ),
]
Heads = Annotated[
    list[int] | None,
    in_output(min=0, metavar="N", show_default="all", help="Attention head to show. Repeatable."),
]
Queries = Annotated[
    list[str] | None,
    in_output(metavar="ROW,COLUMN", show_default="all", help="Image patch to show. Repeatable."),
]


@model_command(*PATCH_OPTIONS)
def show_model(
    *,
    image: Photo,
    out: ShowFiles = None,
    view: View = "overview",
    layer: Layers = None,
    head: Heads = None,
    query: Queries = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Show which keys each patch of a photo attends to, and which of them a strategy keeps.

    On the page, hover over a patch to see its keys. The strategy is connectivity unless you name
    another; dense shows exact attention only.

    Example: sparsiattn show deit_small_patch16_224 photo.jpg --pretrained --k 0.25 --out page.html
    """
    queries, place = positions(query), place_of(device, dtype)
    from sparsiattn import show
    from sparsiattn.analysis.visualization.view import check_view
    from sparsiattn.training.progress import bar

    for path in out or ():
        check_file(path)
        check_view(path, view)
    layers = None if layer is None else [int(x) if _is_int(x) else x for x in layer]
    model, patch = request.build(default_strategy="connectivity")
    model.to(**place)
    with bar("sites", shown=sys.stderr.isatty()) as progress:
        attention = show(
            model,
            image,
            layers=layers,
            heads=head,
            queries=queries,
            image_size=request.image_size,
            progress=progress,
        )
    written = [attention.save(path, view) for path in out or ()]
    document = {"name": request.model, "photo": str(image), "out": [str(path) for path in written]}
    document |= {**attention.to_dict(), "strategy": patch.strategy.to_dict()}
    lines = [f"wrote {path}" for path in written] or [UNWRITTEN]
    print_result(as_json, document, attention, *lines, indent=None)


def positions(texts: list[str] | None) -> list[tuple[int, int]] | None:
    """Rows and columns of patches, as `sparsiattn.show` takes them.

    >>> positions(["3,4", "0, 13"])
    [(3, 4), (0, 13)]
    """
    if texts is None:
        return None
    places = []
    for text in texts:
        match = re.fullmatch(r"\s*(-?\d+)\s*,\s*(-?\d+)\s*", text)
        if match is None:
            raise typer.BadParameter(f"ROW,COLUMN is needed, got {text!r}", param_hint="--query")
        places.append((int(match[1]), int(match[2])))
    return places


def _is_int(text: str) -> bool:
    return text.lstrip("-").isdigit()
