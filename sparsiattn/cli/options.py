"""Options that several commands take, and how their text is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

ModelName = Annotated[
    str,
    typer.Argument(
        help="A timm model (deit_small_patch16_224), hf:ORG/NAME or hf:FOLDER of transformers, "
        "tv:NAME of torchvision, or a folder that patch.save wrote."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Pixels, square.")]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--model-option",
        "--model-kwargs",
        help="NAME=VALUE for what makes the model, e.g. img_size=32 of timm; may be repeated.",
    ),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download weights.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights of the model: .safetensors, or .pth as timm takes it.")
]

# how to patch: the same in every command; read by `patch_options`
Strategy = Annotated[
    str | None, typer.Option(help="As sparsiattn.patch takes it; none leaves the model dense.")
]
K = Annotated[str | None, typer.Option(help="0.1 is a share of the keys, 20 a count.")]
Keep = Annotated[
    str | None,
    typer.Option(help="Share of tokens token strategies keep; a list: [0.9,0.8,0.7]."),
]
Kernel = Annotated[str | None, typer.Option(help="auto, or a kernel's name.")]
StrategyOptions = Annotated[
    list[str] | None,
    typer.Option("-o", "--option", help="NAME=VALUE for the strategy; may be repeated."),
]
Planners = Annotated[
    Path | None,
    typer.Option(help="A folder that patch.save wrote: that patch instead of --strategy."),
]


def patch_options(
    strategy: str | None, k: str | None, keep: str | None, kernel: str | None,
    options: Iterable[str] | None, planners: Path | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """Keyword arguments of `sparsiattn.patch`; None where no strategy is asked for.

    >>> patch_options("hybrid", "0.25", "[0.9,0.7]", None, ["tile=[8,8]"])
    {'strategy': 'hybrid', 'k': 0.25, 'keep': [0.9, 0.7], 'tile': [8, 8]}
    """
    given = {
        "k": budget(k), "keep": None if keep is None else value_of(keep), "kernel": kernel,
    }  # fmt: skip
    found = {name: value for name, value in given.items() if value is not None}
    found |= pairs(options, "--option")
    if strategy is not None and planners is not None:
        raise typer.BadParameter(
            "a saved patch has its own strategy", param_hint="--strategy with --planners"
        )
    if strategy is None:
        if found:
            raise typer.BadParameter(
                f"{', '.join(found)} needs a strategy to go to", param_hint="--strategy"
            )
        return None
    return {"strategy": strategy, **found}


def pairs(texts: Iterable[str] | None, flag: str) -> dict[str, Any]:
    """``["a=1", "b=x"]`` as ``{"a": 1, "b": "x"}``."""
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"NAME=VALUE is needed, got {text!r}", param_hint=flag)
        found[name] = value_of(value)
    return found


def value_of(text: str) -> Any:
    """JSON where it is that, None, True and False as Python writes them, else the text itself."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


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
