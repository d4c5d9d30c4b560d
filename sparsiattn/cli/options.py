"""Options that several commands take, and how their text is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
BatchSize = Annotated[int, typer.Option(min=1)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
DeviceOrGPU = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.")
]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Pixels, square.")]
ImageCount = Annotated[int, typer.Option(min=1, help="Number of images, spread over the data.")]
LabelledImages = Annotated[
    str, typer.Option(help="Folder or .tar of images, or READER/NAME[@FOLDER] of timm.")
]
Metric = Annotated[
    str | None, typer.Option(help="classes or features; what the model has by default.")
]
ModelName = Annotated[
    str,
    typer.Argument(
        help="A timm model (deit_small_patch16_224), hf:ORG/NAME or hf:FOLDER of transformers, "
        "tv:NAME of torchvision, or a folder that patch.save wrote."
    ),
]
UnlabelledImages = Annotated[
    str, typer.Option(help="Folder or .tar of images; labels do not matter.")
]


def pairs(
    texts: Iterable[str] | None,
    flag: str,
    form: str = "NAME=VALUE",
    is_name: Callable[[str], bool] = str.isidentifier,
) -> dict[str, Any]:
    """Names and values given on the command line.

    Args:
        texts: As ``["a=1", "b=x"]``.
        flag: The option that takes them.
        form: What each must be, in words.
        is_name: Whether a text is a name.

    >>> pairs(["predictor.epochs=2", "options.tile=[8,8]"], "--set", is_name=bool)
    {'predictor.epochs': 2, 'options.tile': [8, 8]}
    """
    values = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not is_name(name):
            raise typer.BadParameter(f"{form} is needed, got {text!r}", param_hint=flag)
        values[name] = value_of(value)
    return values


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
    """The torch dtype of that name, a floating one."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise typer.BadParameter(f"no floating dtype of torch: {name!r}", param_hint="--dtype")
    return dtype
