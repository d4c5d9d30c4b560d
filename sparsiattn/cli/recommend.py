"""``sparsiattn recommend``."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import MODEL_OPTIONS, ModelRequest, model_command, unlabelled
from sparsiattn.cli.options import AsJson, Device, DType, ImageCount, Metric, dtype_of


@model_command(*MODEL_OPTIONS)
def recommend_setting(
    *,
    data: Annotated[
        str | None, typer.Option(help="Folder or .tar of images; labels do not matter.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="The least dense time over patched time, as 1.5.")
    ] = None,
    quality: Annotated[
        float | None, typer.Option(help="The least share of answers kept, or cosine of features.")
    ] = None,
    metric: Metric = None,
    images: ImageCount = 32,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images of a forward pass; what the budget allows.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds to take at most, about.")] = 60.0,
    device: Device = "cpu",
    dtype: DType = "float32",
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Find the setting of a patch that is fast enough, or good enough, on this machine.

    Settings are timed beside the dense model and compared with it on your images.
    Example: sparsiattn recommend deit_small_patch16_224 --pretrained --data photos --speedup 1.5
    """
    from sparsiattn import recommend

    if data is None:
        raise typer.BadParameter(
            "give a folder of images (no labels needed): quality on noise would mean nothing; "
            f"speed alone tells: sparsiattn bench {request.model} --strategy token_merge",
            param_hint="--data",
        )
    if speedup is None and quality is None:
        raise typer.BadParameter("give one or both", param_hint="--speedup, --quality")
    torch_dtype = dtype_of(dtype)
    model = request.create().eval().to(device, torch_dtype)
    size = min(images, batch_size or 32)
    found = recommend(
        model,
        unlabelled(data, model, images, size, request.image_size),
        speedup=speedup,
        quality=quality,
        metric=metric,  # type: ignore[arg-type]
        budget_s=budget,
        batch_size=batch_size,
    )
    print_result(as_json, {"name": request.model, "data": data, **found.to_dict()}, found)
