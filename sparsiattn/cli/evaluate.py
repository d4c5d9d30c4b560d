"""``sparsiattn eval``."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import (
    PATCH_OPTIONS,
    ModelRequest,
    is_first_process,
    model_command,
)
from sparsiattn.cli.options import (
    AsJson,
    BatchSize,
    DeviceOrGPU,
    DType,
    LabelledImages,
    dtype_of,
    pairs,
)


class Compared(Enum):
    """Values of ``--metric``."""

    FEATURES = "features"
    CLASSES = "classes"


@model_command(*PATCH_OPTIONS)
def evaluate_model(
    *,
    data: LabelledImages,
    split: Annotated[str, typer.Option(help="train, validation, test ...")] = "validation",
    request: ModelRequest,
    data_option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE: mean, std, crop_pct, interpolation; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many images, spread over the split.")
    ] = None,
    metric: Annotated[
        Compared | None,
        typer.Option(help="What is compared without labels; default: as the model has a head."),
    ] = None,
    batch_size: BatchSize = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: DeviceOrGPU = None,
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Accuracy and images/s of a model, dense and patched in one pass, and how often they agree.

    Of headless models, or with --metric features, how much of the features stays, without labels.
    Under torchrun every process takes its share. Weights are random without --pretrained or
    --checkpoint. Example: sparsiattn eval deit_small_patch16_224 --pretrained --data imagenet
    --strategy connectivity --k 0.25
    """
    from sparsiattn import evaluate
    from sparsiattn.training.processes import leave
    from sparsiattn.training.progress import bar

    preprocessing, torch_dtype = pairs(data_option, "--data-option"), dtype_of(dtype)
    model, patch = request.build()
    with bar("images", shown=sys.stderr.isatty() and is_first_process()) as progress:
        evaluation = evaluate(
            model.to(dtype=torch_dtype),
            data,
            batch_size=batch_size,
            split=split,
            limit=limit,
            workers=workers,
            image_size=request.image_size,
            augment=preprocessing,
            metric=None if metric is None else metric.value,
            progress=progress,
            device=device or _device(),
        )
    if is_first_process():
        strategy = None if patch is None else patch.strategy.to_dict()
        settings = {"name": request.model, "data": data, "split": split, "dtype": dtype}
        document = {**settings, "strategy": strategy, **evaluation.to_dict()}
        print_result(as_json, document, evaluation)
    leave()


def _device() -> str | None:
    """The GPU where there is one; of launched processes each has its own, which is found later."""
    import torch

    from sparsiattn.training.processes import waiting

    return "cuda" if torch.cuda.is_available() and not waiting() else None
