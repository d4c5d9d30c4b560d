"""``sparsiattn search``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import MODEL_OPTIONS, ModelRequest, model_command
from sparsiattn.cli.options import AsJson, BatchSize, UnlabelledImages, budget, pairs


@model_command("strategy", "option", "planners", *MODEL_OPTIONS)
def search_model(
    *,
    data: UnlabelledImages,
    macs: Annotated[
        str | None, typer.Option(help="Budget: a share of the dense model's MACs, or a count.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Budget: a share of the dense model's time here.")
    ] = None,
    agreement: Annotated[
        float | None, typer.Option(help="Floor: share of images predicted as by the dense model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The schedule, as JSON.")] = None,
    images: Annotated[int, typer.Option(min=1, help="So many, spread over the data.")] = 256,
    batch_size: BatchSize = 64,
    trials: Annotated[int, typer.Option(min=1, help="Schedules to run.")] = 60,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Find which sites and blocks can do with fewer keys and tokens, for one budget of the model.

    Use what it writes with -o schedule=FILE. Example: sparsiattn search deit_small_patch16_224
    --pretrained --data photos --strategy hybrid --macs 0.7 --out schedule.json
    """
    from sparsiattn import search
    from sparsiattn.training.data import loader

    budgets = {"macs": budget(macs), "latency": latency, "agreement": agreement}
    target = {name: value for name, value in budgets.items() if value is not None}
    if len(target) != 1:
        raise typer.BadParameter("give one of --macs, --latency and --agreement")
    options, saved = pairs(request.option, "--option"), request.saved_patch()
    if saved is not None and (request.strategy is not None or options):
        raise typer.BadParameter("a saved patch has its own strategy", param_hint="--planners")
    model, _ = replace(request, strategy=None, option=None).build()
    batches = loader(
        data,
        model,
        batch_size=batch_size,
        limit=images,
        labels=False,
        image_size=request.image_size,
    )
    result = search(
        model,
        [batch for batch, _ in batches],
        target,
        trials=trials,
        seed=seed,
        progress=sys.stderr.isatty(),
        strategy=None if saved else request.strategy or "hybrid",
        **options,
    )
    if out is not None:
        result.save(out)
    document = {"name": request.model, "data": data, "out": None if out is None else str(out)}
    print_result(as_json, {**document, **result.to_dict()}, result)
