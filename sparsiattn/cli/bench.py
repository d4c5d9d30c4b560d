"""``sparsiattn bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import PATCH_OPTIONS, ModelRequest, model_command, noise
from sparsiattn.cli.options import AsJson, BatchSize, Device, DType, dtype_of

if TYPE_CHECKING:
    from rich.table import Table

    from sparsiattn import BenchResult


@model_command(*PATCH_OPTIONS, "only_if_faster")
def bench_model(
    *,
    request: ModelRequest,
    device: Device = "cpu",
    dtype: DType = "float32",
    batch_size: BatchSize = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Paired runs.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a model dense and patched, in paired runs, and its attention site by site.

    The strategy is connectivity unless another is named; weights cost no time.
    Example: sparsiattn bench vit_small_patch16_384 --k 0.25 --image-size 1024
    """
    from sparsiattn import bench
    from sparsiattn.training.progress import bar

    torch_dtype = dtype_of(dtype)
    model, _ = request.build(default_strategy="connectivity")
    model = model.eval().to(device, torch_dtype)
    images = noise(model, request.image_size, batch_size)
    with bar("rounds", rounds, shown=sys.stderr.isatty()) as progress:
        result = bench(model, images, rounds=rounds, progress=progress)
    document = {**result.to_dict(), "name": request.model}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    written = [] if out is None else [f"wrote {out}"]
    print_result(as_json, document, _table(request.model, result), result.report, *written)


def _table(name: str, result: BenchResult) -> Table:
    from rich.table import Table

    from sparsiattn.patching.text import shape_text

    shape = shape_text(result.input_shape)
    title = f"{name}, {result.strategy}, input {shape}, {result.dtype} on {result.device}"
    table = Table("", "median", "quartiles", title=title, title_justify="left")
    for side, median, (low, high) in (
        ("dense", result.dense_ms, result.dense_quartiles),
        ("patched", result.sparse_ms, result.sparse_quartiles),
    ):
        table.add_row(side, f"{median:.2f} ms", f"{low:.2f} to {high:.2f} ms")
    low, high = result.ratio_quartiles
    table.add_row("dense / patched", f"{result.ratio:.2f}x", f"{low:.2f} to {high:.2f}x")
    return table
