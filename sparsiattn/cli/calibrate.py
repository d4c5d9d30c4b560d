"""``sparsiattn calibrate``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

from sparsiattn.cli.console import check_folder, print_result
from sparsiattn.cli.images import unlabelled
from sparsiattn.cli.model_command import PATCH_OPTIONS, ModelRequest, model_command
from sparsiattn.cli.options import (
    AsJson,
    BatchSize,
    DeviceOrGPU,
    DType,
    Seed,
    UnlabelledImages,
    Workers,
    in_output,
    in_run,
    place_of,
)


@model_command(*PATCH_OPTIONS)
def calibrate_model(
    *,
    data: UnlabelledImages,
    out: Annotated[
        Path, in_output(metavar="FOLDER", help="Folder to save the calibrated patch in.")
    ],
    steps: Annotated[
        int, in_run(min=1, metavar="N", help="Optimiser steps, one batch of images each.")
    ] = 300,
    batch_size: BatchSize = 64,
    lr: Annotated[
        float, in_run(metavar="RATE", help="Learning rate at the start; it decays to zero.")
    ] = 1e-2,
    seed: Seed = 0,
    workers: Workers = 0,
    device: DeviceOrGPU = None,
    dtype: DType = "float32",
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Fit a strategy's predictors to the model's own attention. No labels are needed.

    The same command resumes a run that was interrupted. The folder that it writes is what --patch
    and sparsiattn.load read.

    Example: sparsiattn calibrate deit_small_patch16_224 --pretrained --data photos --k 0.1
    --option scores=predictor --out deit_s.sparse
    """
    check_folder(out)
    place = place_of(device, dtype)
    from sparsiattn import calibrate

    model, patch = request.build(default_strategy="connectivity")
    model.to(**place)
    order = {"split": "train", "training": True, "batch_size": batch_size, "seed": seed}
    losses = calibrate(
        model,
        unlabelled(data, model, request.image_size, workers, **order),
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        out=out / "fit",
        progress=sys.stderr.isatty(),
    )
    patch.save(out)
    # checkpoints are for going on; who uploads the folder needs none
    shutil.rmtree(out / "fit", ignore_errors=True)
    strategy = patch.strategy.to_dict()
    document = {"name": request.model, "data": data, "strategy": strategy, "out": str(out)}
    text = f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps; wrote {out}"
    print_result(as_json, {**document, "losses": losses}, text)
