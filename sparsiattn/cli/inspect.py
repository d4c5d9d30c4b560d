"""``sparsiattn inspect``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import image_shape
from sparsiattn.cli.options import AsJson, ImageSize, ModelName


def inspect_model(
    model: ModelName,
    image_size: ImageSize = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="A strategy to try, all if none; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attention of a model: what can be patched, and what that could save. No weights needed.

    Example: sparsiattn inspect swin_tiny_patch4_window7_224 --strategy local
    """
    from rich.console import Console

    from sparsiattn import create_model, inspect
    from sparsiattn.serialization.creating import is_saved
    from sparsiattn.serialization.host import host_without_weights
    from sparsiattn.serialization.origin import without_memory

    with Console(stderr=as_json).status(f"inspecting {model}"):
        host = without_memory(
            partial(host_without_weights, model)
            if is_saved(model)
            else partial(create_model, model, image_size=image_size)
        )
        shape = None if image_size is None else image_shape(host, image_size)
        inspection = inspect(host, shape, strategies=strategy or None)
    parts = (*inspection.head(), inspection.table(), *inspection.tail())
    print_result(as_json, {**inspection.to_dict(), "name": model}, *parts)
