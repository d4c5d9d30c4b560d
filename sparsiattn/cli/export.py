"""``sparsiattn export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import PATCH_OPTIONS, ModelRequest, model_command, noise
from sparsiattn.cli.options import AsJson, Device


@model_command(*PATCH_OPTIONS)
def export_model(
    *,
    out: Annotated[Path, typer.Option(help="The file: .onnx, or .pt2 for pt2 and aoti.")],
    format: Annotated[
        str, typer.Option(help="onnx, pt2 (torch.export) or aoti (AOTInductor).")
    ] = "onnx",
    request: ModelRequest,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="The only one the program takes; any if not given.")
    ] = None,
    device: Device = "cpu",
    tolerance: Annotated[float, typer.Option(help="Largest difference allowed.")] = 1e-4,
    as_json: AsJson = False,
) -> None:
    """Write a model, patched or dense, as a program that runs without this library.

    Its outputs are compared with the model's, and the file is written only if they agree. Example:
    sparsiattn export deit_small_patch16_224 --pretrained --strategy hybrid --format onnx --out
    deit_s.onnx
    """
    from rich.console import Console

    from sparsiattn import export
    from sparsiattn.serialization.exporters.formats import check

    with Console(stderr=True).status(f"exporting {request.model}"):
        check(format)
        model, _ = request.build()
        images = noise(model.eval().to(device), request.image_size, batch_size or 2)
        result = export(
            model, images, out, format, dynamic_batch=batch_size is None, tolerance=tolerance
        )
    print_result(as_json, {**result.to_dict(), "name": request.model}, result)
