"""``sparsiattn bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsiattn.cli.console import readable, say
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
    dtype_of,
    pairs,
    patch_options,
)
from sparsiattn.training.progress import bar

if TYPE_CHECKING:
    from rich.table import Table


def bench_model(
    model: ModelName,
    strategy: Strategy = None,
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
    planners: Planners = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    model_option: ModelOptions = None,
    out: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a model dense and patched, in paired runs, and its attention site by site.

    The strategy is connectivity unless another is named; weights cost no time.
    Example: sparsiattn bench vit_small_patch16_384 --k 0.25 --image-size 1024
    """
    from rich.console import Console

    from sparsiattn.analysis.benchmark.whole_model import bench

    planners = saved_in(model, planners, strategy)
    name = strategy if planners else strategy or "connectivity"
    given = patch_options(name, k, keep, kernel, option, planners)
    options, kind = pairs(model_option, "--model-option"), dtype_of(dtype)
    if only_if_faster is not None:
        if given is None:
            raise typer.BadParameter("a saved patch has decided", param_hint="--only-if-faster")
        given["only_if_faster"] = only_if_faster
    with readable():
        host = fresh(model, image_size, pretrained, checkpoint, **options)
        prepare(host, given, planners, checkpoint)
        host = host.eval().to(device, kind)
        images = noise(host, image_size, batch_size)
        with bar("rounds", rounds, shown=sys.stderr.isatty()) as progress:
            found = bench(host, images, rounds=rounds, progress=progress)
    document = {**found.to_dict(), "name": model}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(document, indent=2))
        return
    console = Console()
    console.print(_benched(model, found))
    for line in str(found.report).splitlines():
        say(console, line)
    if out is not None:
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
