"""``sparsiattn calibrate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import PATCH_OPTIONS, ModelRequest, model_command
from sparsiattn.cli.options import AsJson, BatchSize, UnlabelledImages


@model_command(*PATCH_OPTIONS)
def calibrate_model(
    *,
    data: UnlabelledImages,
    out: Annotated[Path, typer.Option(help="Folder for the fitted patch.")],
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch_size: BatchSize = 64,
    lr: float = 1e-2,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the images.")] = 0,
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Fit a strategy's predictors to the model's own attention; run it again to go on after a kill.

    The folder is what eval --planners and sparsiattn.load read. Example: sparsiattn calibrate
    deit_small_patch16_224 --pretrained --data photos --k 0.1 --out deit_s.sparse
    """
    from sparsiattn import calibrate

    model, patch = request.build(default_strategy="connectivity")
    losses = calibrate(
        model,
        data,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        out=out / "fit",
        progress=sys.stderr.isatty(),
    )
    patch.save(out)
    strategy = patch.strategy.to_dict()
    document = {"name": request.model, "data": data, "strategy": strategy, "out": str(out)}
    text = f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps; wrote {out}"
    print_result(as_json, {**document, "losses": losses}, text)
