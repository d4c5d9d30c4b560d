"""``sparsiattn search``."""

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
    ModelName,
    ModelOptions,
    Planners,
    Pretrained,
    Strategy,
    StrategyOptions,
    budget,
    pairs,
)


def search_model(
    model: ModelName,
    data: Annotated[str, typer.Option(help="Folder or .tar of images; labels do not matter.")],
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
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    trials: Annotated[int, typer.Option(min=1, help="Schedules to run.")] = 60,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    strategy: Strategy = None,
    option: StrategyOptions = None,
    planners: Planners = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    model_option: ModelOptions = None,
    image_size: ImageSize = None,
    as_json: AsJson = False,
) -> None:
    """Find which sites and blocks can do with fewer keys and tokens, for one budget of the model.

    Use what it writes with -o schedule=FILE. Example: sparsiattn search deit_small_patch16_224
    --pretrained --data photos --strategy hybrid --macs 0.7 --out schedule.json
    """
    import sparsiattn

    wanted = {"macs": budget(macs), "latency": latency, "agreement": agreement}
    given = {name: value for name, value in wanted.items() if value is not None}
    if len(given) != 1:
        raise typer.BadParameter("give one of --macs, --latency and --agreement")
    options, shape = pairs(option, "--option"), pairs(model_option, "--model-option")
    planners = saved_in(model, planners, strategy)
    if planners is not None and (strategy is not None or options):
        raise typer.BadParameter("a saved patch has its own strategy", param_hint="--planners")
    with readable():
        host = fresh(model, image_size, pretrained, checkpoint, **shape)
        prepare(host, None, planners, checkpoint)
        found = sparsiattn.search(
            host, _images(data, host, images, batch_size, image_size), given, trials=trials,
            seed=seed, progress=sys.stderr.isatty(),
            strategy=None if planners else strategy or "hybrid", **options,
        )  # fmt: skip
    if out is not None:
        found.save(out)
    about = {"name": model, "data": data, "out": None if out is None else str(out)}
    print(json.dumps({**about, **found.to_dict()}, indent=2) if as_json else found)


def _images(data: str, model: Any, count: int, batch: int, size: int | None) -> list[Any]:
    from sparsiattn.training.data import loader

    made = loader(data, model, batch_size=batch, limit=count, labels=False, image_size=size)
    return [x for x, _ in made]
