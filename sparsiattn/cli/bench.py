"""``sparsiattn bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsiattn.cli.console import readable, say
from sparsiattn.cli.models import with_noise
from sparsiattn.cli.options import (
    ImageSize,
    K,
    Keep,
    Kernel,
    ModelName,
    Strategy,
    StrategyOptions,
    dtype_of,
    patch_options,
)

if TYPE_CHECKING:
    from rich.table import Table


def bench_model(
    model: ModelName,
    strategy: Strategy = "connectivity",
    k: K = None,
    keep: Keep = None,
    kernel: Kernel = None,
    option: StrategyOptions = None,
    only_if_faster: Annotated[
        bool | None, typer.Option(help="Leave sites dense where sparse attention should lose.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    image_size: ImageSize = None,
    rounds: Annotated[int, typer.Option(min=1, help="Paired runs.")] = 10,
    pretrained: Annotated[bool, typer.Option(help="Download weights (they cost no time).")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Time a timm model dense and patched, in paired runs, and its attention site by site.

    Example: sparsiattn bench vit_small_patch16_384 --k 0.25 --image-size 1024
    """
    from rich.console import Console

    from sparsiattn.benchmark import bench

    given = patch_options(strategy, k, keep, kernel, option) or {}
    if only_if_faster is not None:
        given["only_if_faster"] = only_if_faster
    with readable():
        host, images = with_noise(
            model, image_size, batch_size, device, dtype_of(dtype), pretrained
        )
        found = bench(host, images, rounds=rounds, **given)
    console = Console()
    console.print(_benched(model, found))
    for line in str(found.report).splitlines():
        say(console, line)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {**found.to_dict(), "name": model}
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {out}", soft_wrap=True)


def _benched(name: str, found: Any) -> Table:
    from rich.table import Table

    shape = "x".join(map(str, found.input_shape))
    title = f"{name}, {found.strategy}, input {shape}, {found.dtype} on {found.device}"
    table = Table("", "median", "quartiles", title=title, title_justify="left")
    for side, middle, (low, high) in (
        ("dense", found.dense_ms, found.dense_quartiles),
        ("patched", found.sparse_ms, found.sparse_quartiles),
    ):
        table.add_row(side, f"{middle:.2f} ms", f"{low:.2f} to {high:.2f} ms")
    low, high = found.ratio_quartiles
    table.add_row("dense / patched", f"{found.ratio:.2f}x", f"{low:.2f} to {high:.2f}x")
    return table
