"""``sparsiattn eval``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from sparsiattn.cli.console import readable
from sparsiattn.cli.models import fresh, is_first, prepare, saved_in
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
    dtype_of,
    pairs,
    patch_options,
)
from sparsiattn.training.progress import bar


def evaluate_model(
    model: ModelName,
    data: Annotated[
        str, typer.Option(help="Folder or .tar of images, or READER/NAME[@FOLDER] of timm.")
    ],
    split: Annotated[str, typer.Option(help="train, validation, test ...")] = "validation",
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
    data_option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE: mean, std, crop_pct, interpolation; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many images, spread over the split.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Accuracy and images/s of a model, dense and patched in one pass, and how often they agree.

    Under torchrun every process takes its share. Weights are random without --pretrained or
    --checkpoint. Example: sparsiattn eval deit_small_patch16_224 --pretrained --data imagenet
    --strategy connectivity --k 0.25
    """

    from sparsiattn.training.evaluation import evaluate
    from sparsiattn.training.processes import leave

    planners = saved_in(model, planners, strategy)
    given = patch_options(strategy, k, keep, kernel, option, planners)
    options, reading = pairs(model_option, "--model-option"), pairs(data_option, "--data-option")
    kind = dtype_of(dtype)
    with readable():
        host = fresh(model, image_size, pretrained, checkpoint, **options)
        live = prepare(host, given, planners, checkpoint)
        with bar("images", shown=sys.stderr.isatty() and is_first()) as progress:
            found = evaluate(
                host.to(dtype=kind), data, batch_size=batch_size, split=split, limit=limit,
                workers=workers, image_size=image_size, augment=reading, progress=progress,
                device=device or _device(),
            )  # fmt: skip
    strategy_used = None if live is None else live.strategy.to_dict()
    about = {"name": model, "data": data, "split": split, "dtype": dtype, "strategy": strategy_used}
    if is_first():
        print(json.dumps({**about, **found.to_dict()}, indent=2) if as_json else found)
    leave()


def _device() -> str | None:
    """The GPU where there is one; of launched processes each has its own, which is found later."""
    import torch

    from sparsiattn.training.processes import waiting

    return "cuda" if torch.cuda.is_available() and not waiting() else None
