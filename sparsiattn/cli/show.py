"""``sparsiattn show``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsiattn.cli.console import readable
from sparsiattn.cli.models import fresh, prepare, saved_in
from sparsiattn.cli.options import (
    AsJson,
    Checkpoint,
    ImageSize,
    K,
    Keep,
    Kernel,
    ModelName,
    ModelOptions,
    Planners,
    Pretrained,
    Strategy,
    StrategyOptions,
    pairs,
    patch_options,
)
from sparsiattn.training.progress import bar


def show_model(
    model: ModelName,
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
    strategy: Strategy = None,
    k: K = None,
    keep: Keep = None,
    kernel: Kernel = None,
    option: StrategyOptions = None,
    planners: Planners = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    model_option: ModelOptions = None,
    image_size: ImageSize = None,
    as_json: AsJson = False,
) -> None:
    """Which keys each patch of a photo attends to, and what the pattern keeps of that.

    The page lights up a patch's keys under the mouse. The strategy is connectivity unless another
    is named; dense shows plain attention. Weights are random without --pretrained or --checkpoint.
    Example: sparsiattn show deit_small_patch16_224 photo.jpg --pretrained --k 0.25 --out page.html
    """
    from sparsiattn.analysis.visualization import show

    planners = saved_in(model, planners, strategy)
    if strategy is None and planners is None:
        strategy = "connectivity"
    given = patch_options(strategy, k, keep, kernel, option, planners)
    options, queries = pairs(model_option, "--model-option"), places(query)
    layers = None if layer is None else [int(x) if _is_int(x) else x for x in layer]
    with readable():
        host = fresh(model, image_size, pretrained, checkpoint, **options)
        live = prepare(host, given, planners, checkpoint)
        with bar("sites", shown=sys.stderr.isatty()) as progress:
            found = show(
                host, image, layers=layers, heads=head, queries=queries, image_size=image_size,
                progress=progress,
            )  # fmt: skip
        written = [found.save(path, view) for path in out or [Path("show.html")]]
    about = {"name": model, "photo": str(image), "out": [str(path) for path in written]}
    document = {**about, **found.to_dict(), "strategy": live.strategy.to_dict()}
    lines = [str(found), *(f"wrote {path}" for path in written)]
    print(json.dumps(document) if as_json else "\n".join(lines))


def places(texts: list[str] | None) -> list[tuple[int, int]] | None:
    """``["3,4"]`` as ``[(3, 4)]``.

    >>> places(["3,4", "0, 13"])
    [(3, 4), (0, 13)]
    """
    if texts is None:
        return None
    found: list[Any] = []
    for text in texts:
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 2 or not all(_is_int(part) for part in parts):
            raise typer.BadParameter(f"ROW,COLUMN is needed, got {text!r}", param_hint="--query")
        found.append((int(parts[0]), int(parts[1])))
    return found


def _is_int(text: str) -> bool:
    return text.lstrip("-").isdigit()
