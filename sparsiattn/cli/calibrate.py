"""``sparsiattn calibrate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

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


def calibrate_model(
    model: ModelName,
    data: Annotated[str, typer.Option(help="Folder or .tar of images; labels do not matter.")],
    out: Annotated[Path, typer.Option(help="Folder for the fitted patch.")],
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: float = 1e-2,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the images.")] = 0,
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
    """Fit a strategy's predictors to the model's own attention; run it again to go on after a kill.

    The folder is what eval --planners and sparsiattn.load read. Example: sparsiattn calibrate
    deit_small_patch16_224 --pretrained --data photos --k 0.1 --out deit_s.sparse
    """
    import sparsiattn

    planners = saved_in(model, planners, strategy)
    name = strategy if planners else strategy or "connectivity"
    given = patch_options(name, k, keep, kernel, option, planners)
    options = pairs(model_option, "--model-option")
    with readable():
        host = fresh(model, image_size, pretrained, checkpoint, **options)
        live = prepare(host, given, planners, checkpoint)
        losses = sparsiattn.calibrate(
            host, data, steps=steps, lr=lr, batch_size=batch_size, seed=seed, out=out / "fit",
            progress=sys.stderr.isatty(),
        )  # fmt: skip
        live.save(out)
    about = {"name": model, "data": data, "strategy": live.strategy.to_dict(), "out": str(out)}
    if as_json:
        print(json.dumps({**about, "losses": losses}, indent=2))
    else:
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps; wrote {out}")
