"""``sparsiattn export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsiattn.cli.console import readable
from sparsiattn.cli.models import fresh, noise, prepare, saved_in
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


def export_model(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The file: .onnx, or .pt2 for pt2 and aoti.")],
    format: Annotated[
        str, typer.Option(help="onnx, pt2 (torch.export) or aoti (AOTInductor).")
    ] = "onnx",
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
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="The only one the program takes; any if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    tolerance: Annotated[float, typer.Option(help="Largest difference allowed.")] = 1e-4,
    as_json: AsJson = False,
) -> None:
    """Write a model, patched or dense, as a program that runs without this library.

    Its outputs are compared with the model's, and the file is written only if they agree. Example:
    sparsiattn export deit_small_patch16_224 --pretrained --strategy hybrid --format onnx --out
    deit_s.onnx
    """
    from rich.console import Console

    from sparsiattn.serialization.exporters import export
    from sparsiattn.serialization.exporters.formats import check

    planners = saved_in(model, planners, strategy)
    given = patch_options(strategy, k, keep, kernel, option, planners)
    options = pairs(model_option, "--model-option")
    with Console(stderr=True).status(f"exporting {model}"), readable():
        check(format)
        host = fresh(model, image_size, pretrained, checkpoint, **options)
        prepare(host, given, planners, checkpoint)
        images = noise(host.eval().to(device), image_size, batch_size or 2)
        found = export(
            host, images, out, format, dynamic_batch=batch_size is None, tolerance=tolerance
        )
    print(json.dumps({**found.to_dict(), "name": model}, indent=2) if as_json else found)
