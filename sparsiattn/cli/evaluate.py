"""``sparsiattn eval``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

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
    Metric,
    Workers,
    device_of,
    dtype_of,
    in_data,
    pairs,
)

Split = Annotated[
    str,
    in_data(metavar="NAME", help="Part of the data: train, validation, test ... if it has parts."),
]
DataOptions = Annotated[
    list[str] | None,
    in_data(
        metavar="NAME=VALUE",
        help="How images are read: mean, std, crop_pct, interpolation. Repeatable.",
    ),
]
Limit = Annotated[
    int | None,
    in_data(
        min=1,
        metavar="N",
        show_default="all",
        help="Number of images to use, spread over the split.",
    ),
]


@model_command(*PATCH_OPTIONS, "only_if_faster")
def evaluate_model(
    *,
    data: LabelledImages,
    split: Split = "validation",
    request: ModelRequest,
    data_option: DataOptions = None,
    limit: Limit = None,
    metric: Metric = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: DeviceOrGPU = None,
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure accuracy, images/s and speed-up of a model, dense and patched, in one pass.

    Without labels (a model without a head, or --metric), outputs are compared with the dense
    model's. Without --strategy or --patch only the dense model runs. Under torchrun every process
    takes its share of the images.

    Example: sparsiattn eval deit_small_patch16_224 --pretrained --data imagenet
    --strategy connectivity --k 0.25
    """
    preprocessing, torch_dtype = pairs(data_option, "--data-option"), dtype_of(dtype)
    place = _device(device)
    from sparsiattn import evaluate
    from sparsiattn.training.processes import leave
    from sparsiattn.training.progress import bar

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
            device=place,
        )
    if is_first_process():
        strategy = None if patch is None else patch.strategy.to_dict()
        settings = {"name": request.model, "data": data, "split": split, "dtype": dtype}
        document = {**settings, "strategy": strategy, **evaluation.to_dict()}
        print_result(as_json, document, evaluation)
    leave()


def _device(name: str | None) -> Any:
    """As `device_of`; of launched processes each has its own GPU, which is found later."""
    from sparsiattn.training.processes import waiting

    return None if name is None and waiting() else device_of(name)
