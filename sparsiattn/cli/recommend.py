"""``sparsiattn recommend``."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.images import unlabelled
from sparsiattn.cli.model_command import MODEL_OPTIONS, ModelRequest, model_command
from sparsiattn.cli.options import (
    AsJson,
    Device,
    DType,
    ImageCount,
    Metric,
    Workers,
    in_data,
    in_goal,
    in_run,
    place_of,
)

Images = Annotated[
    str | None,
    in_data(metavar="SOURCE", help="Folder or .tar of images. Labels are not needed."),
]
Speedup = Annotated[
    float | None,
    in_goal(metavar="RATIO", help="Minimum speed-up, for example 1.5: dense time / patched time."),
]
Quality = Annotated[
    float | None,
    in_goal(
        metavar="SHARE",
        help="Minimum share of answers that stay the same, or minimum cosine of features.",
    ),
]
Batch = Annotated[
    int | None,
    in_run(
        min=1,
        metavar="N",
        show_default="what fits the time budget",
        help="Images in one forward pass.",
    ),
]
Budget = Annotated[float, in_run(metavar="SECONDS", help="Time limit, approximately.")]


@model_command(*MODEL_OPTIONS)
def recommend_setting(
    *,
    data: Images = None,
    speedup: Speedup = None,
    quality: Quality = None,
    metric: Metric = None,
    images: ImageCount = 32,
    batch_size: Batch = None,
    budget: Budget = 60.0,
    workers: Workers = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Find the patch that is fast enough, or good enough, for a model on this machine.

    Each candidate is timed in turn with the dense model, and their outputs are compared on your
    images. Give --speedup, --quality, or both.

    Example: sparsiattn recommend deit_small_patch16_224 --pretrained --data photos --speedup 1.5
    """
    if data is None:
        raise typer.BadParameter(
            "give a folder of images (no labels needed), because quality cannot be judged on "
            f"noise. To see speed alone: sparsiattn bench {request.model}",
            param_hint="--data",
        )
    if speedup is None and quality is None:
        raise typer.BadParameter("give one of them, or both", param_hint="--speedup, --quality")
    place = place_of(device, dtype)
    from sparsiattn import recommend

    model = request.create().eval().to(**place)
    size = min(images, batch_size or 32)
    found = recommend(
        model,
        unlabelled(data, model, request.image_size, workers, limit=images, batch_size=size),
        speedup=speedup,
        quality=quality,
        metric=None if metric is None else metric.value,
        budget_s=budget,
        batch_size=batch_size,
    )
    print_result(as_json, {"name": request.model, "data": data, **found.to_dict()}, found)
