"""``sparsiattn export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsiattn.cli.console import check_file, print_result
from sparsiattn.cli.images import noise
from sparsiattn.cli.model_command import PATCH_OPTIONS, ModelRequest, model_command
from sparsiattn.cli.options import AsJson, Device, DType, in_output, in_run, place_of

FORMATS = {".onnx": ("onnx",), ".pt2": ("pt2", "aoti")}
"""Formats by the suffix of the file, the one that it stands for first."""


@model_command(*PATCH_OPTIONS, "only_if_faster")
def export_model(
    *,
    out: Annotated[
        Path, in_output(metavar="FILE", help="The file to write; its suffix is .onnx or .pt2.")
    ],
    format: Annotated[
        str | None,
        in_output(
            metavar="FORMAT",
            show_default="by the suffix of --out",
            help="Format: onnx, pt2 (torch.export) or aoti (AOTInductor, also .pt2).",
        ),
    ] = None,
    request: ModelRequest,
    batch_size: Annotated[
        int | None,
        in_run(
            min=1,
            metavar="N",
            show_default="any",
            help="The only batch size that the program will take.",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    tolerance: Annotated[
        float,
        in_run(
            metavar="DIFFERENCE",
            help="Write the file only if no output differs from the model's by more.",
        ),
    ] = 1e-4,
    as_json: AsJson = False,
) -> None:
    """Write a model, patched or dense, as a program that runs without this library.

    The program's outputs are compared with the model's, and the file is written only if they
    agree.

    Example: sparsiattn export deit_small_patch16_224 --pretrained --strategy hybrid --out
    deit_s.onnx
    """
    form = format_of(out, format)
    check_file(out)
    from rich.console import Console

    from sparsiattn import export
    from sparsiattn.serialization.exporters.formats import check

    with Console(stderr=True).status(f"exporting {request.model}"):
        check(form)
        place = place_of(device, dtype)
        model, _ = request.build()
        images = noise(model.eval().to(**place), request.image_size, batch_size or 2)
        result = export(
            model, images, out, form, dynamic_batch=batch_size is None, tolerance=tolerance
        )
    print_result(as_json, {**result.to_dict(), "name": request.model}, result)


def format_of(out: Path, format: str | None) -> str:
    """The format of a file, which must fit its suffix.

    >>> format_of(Path("vit.onnx"), None), format_of(Path("vit.pt2"), "aoti")
    ('onnx', 'aoti')
    """
    known = [name for names in FORMATS.values() for name in names]
    if format is not None and format not in known:
        raise typer.BadParameter(
            f"one of {', '.join(known)} is needed, got {format!r}", param_hint="--format"
        )
    fitting = FORMATS.get(out.suffix, ())
    if not fitting or format not in (None, *fitting):
        needed = next((end for end, names in FORMATS.items() if format in names), ".onnx or .pt2")
        raise typer.BadParameter(f"the file must end in {needed}, got {out}", param_hint="--out")
    return format or fitting[0]
