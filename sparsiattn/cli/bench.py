"""``sparsiattn bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sparsiattn.cli.bench_list import compared, heading
from sparsiattn.cli.console import check_file, print_result
from sparsiattn.cli.images import noise
from sparsiattn.cli.model_command import PATCH_OPTIONS, ModelRequest, model_command
from sparsiattn.cli.options import (
    AsJson,
    BatchSize,
    Device,
    DType,
    in_output,
    in_run,
    place_of,
)

if TYPE_CHECKING:
    from sparsiattn import BenchResult


@model_command(*PATCH_OPTIONS, "only_if_faster")
def bench_model(
    *,
    request: ModelRequest,
    device: Device = "cpu",
    dtype: DType = "float32",
    batch_size: BatchSize = 1,
    rounds: Annotated[
        int, in_run(min=1, metavar="N", help="Paired runs: dense and patched in turn.")
    ] = 10,
    out: Annotated[
        Path | None, in_output(metavar="FILE", help="Write the JSON document to this file, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time a model dense and patched, in paired runs on random input.

    Without options of a patch, it times one setting of each family that recommend tries. With such
    options, it times that patch and prints its report; --k without --strategy means connectivity.
    Weights may be random: they do not change the speed.

    Example: sparsiattn bench vit_small_patch16_384 --strategy hybrid --image-size 1024
    """
    check_file(out)
    place = place_of(device, dtype)
    if request.names_a_patch():
        document, parts = _one(request, place, batch_size, rounds)
    else:
        document, parts = compared(request, place, batch_size, rounds)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        parts.append(f"wrote {out}")
    print_result(as_json, document, *parts)


def _one(
    request: ModelRequest, place: dict[str, Any], batch_size: int, rounds: int
) -> tuple[dict[str, Any], list[Any]]:
    """The patch that was asked for, as a JSON document and as parts of a text."""
    from sparsiattn import bench
    from sparsiattn.training.progress import bar

    model, _ = request.build(default_strategy="connectivity", weights_matter=False)
    model = model.eval().to(**place)
    images = noise(model, request.image_size, batch_size)
    with bar("rounds", rounds, shown=sys.stderr.isatty()) as progress:
        result = bench(model, images, rounds=rounds, progress=progress)
    document = {**result.to_dict(), "name": request.model}
    return document, [heading(request.model, result, result.strategy), _rows(result), result.report]


def _rows(result: BenchResult) -> list[tuple[str, ...]]:
    times = (
        ("dense", result.dense_ms, result.dense_quartiles),
        ("patched", result.sparse_ms, result.sparse_quartiles),
    )
    rows = [
        (side, f"{ms:.2f} ms", f"{low:.2f} to {high:.2f} ms") for side, ms, (low, high) in times
    ]
    low, high = result.ratio_quartiles
    ratio = ("dense / patched", f"{result.ratio:.2f}x", f"{low:.2f} to {high:.2f}x")
    return [("", "median", "quartiles"), *rows, ratio]
