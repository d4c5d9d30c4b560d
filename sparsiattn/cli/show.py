"""``sparsiattn show``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import PATCH_OPTIONS, ModelRequest, model_command
from sparsiattn.cli.options import AsJson


@model_command(*PATCH_OPTIONS)
def show_model(
    *,
    image: Annotated[Path, typer.Argument(help="A photo: JPEG, PNG ...")],
    out: Annotated[
        list[Path] | None,
        typer.Option(help="A page (.html) or picture (.png, .svg, .pdf); may be repeated."),
    ] = None,
    view: Annotated[
        str, typer.Option(help="Of pictures: overview, layers, heads, tokens or density.")
    ] = "overview",
    layer: Annotated[
        list[str] | None,
        typer.Option(help="A site by number, name or glob, all if none; may be repeated."),
    ] = None,
    head: Annotated[
        list[int] | None, typer.Option(min=0, help="All if none; may be repeated.")
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(help="ROW,COLUMN of a patch; all if none; may be repeated."),
    ] = None,
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Which keys each patch of a photo attends to, and what the pattern keeps of that.

    The page lights up a patch's keys under the mouse. The strategy is connectivity unless another
    is named; dense shows plain attention. Weights are random without --pretrained or --checkpoint.
    Example: sparsiattn show deit_small_patch16_224 photo.jpg --pretrained --k 0.25 --out page.html
    """
    from sparsiattn import show
    from sparsiattn.training.progress import bar

    queries = positions(query)
    layers = None if layer is None else [int(x) if _is_int(x) else x for x in layer]
    model, patch = request.build(default_strategy="connectivity")
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
    written = [attention.save(path, view) for path in out or [Path("show.html")]]
    document = {"name": request.model, "photo": str(image), "out": [str(path) for path in written]}
    document |= {**attention.to_dict(), "strategy": patch.strategy.to_dict()}
    lines = [f"wrote {path}" for path in written]
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
