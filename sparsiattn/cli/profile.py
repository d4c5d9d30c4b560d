"""``sparsiattn profile``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import PATCH_OPTIONS, ModelRequest, model_command, noise
from sparsiattn.cli.options import AsJson, BatchSize, Device, DType, dtype_of


@model_command(*PATCH_OPTIONS, "only_if_faster")
def profile_model(
    *,
    request: ModelRequest,
    batch_size: BatchSize = 1,
    device: Device = "cpu",
    dtype: DType = "float32",
    accounting: Annotated[
        str,
        typer.Option(
            help="own (kept pairs), computed (with what kernels add), or paper (Sparsifiner)."
        ),
    ] = "own",
    memory: Annotated[bool, typer.Option("--memory", help="Also peak memory.")] = False,
    latency: Annotated[bool, typer.Option("--latency", help="Also time, in paired runs.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Paired runs for --latency.")] = 10,
    as_json: AsJson = False,
) -> None:
    """MACs of a model, dense and patched, by part and by site, counted from a run on noise.

    Without --strategy the model stays dense. Example: sparsiattn profile deit_small_patch16_224
    --strategy connectivity --k 0.1 --accounting paper
    """
    from rich.console import Console

    from sparsiattn import profile

    torch_dtype, rule = dtype_of(dtype), _accounting(accounting)
    with Console(stderr=as_json).status(f"profiling {request.model}"):
        model, _ = request.build()
        model = model.eval().to(device, torch_dtype)
        images = noise(model, request.image_size, batch_size)
        result = profile(
            model, images, accounting=rule, memory=memory, latency=latency, rounds=rounds
        )
    result = replace(result, model=request.model)
    print_result(as_json, {**result.to_dict(), "name": request.model}, *result.layout())


def _accounting(name: str) -> Any:
    from sparsiattn.analysis.profiling.accounting import ACCOUNTINGS

    if name not in ACCOUNTINGS:
        raise typer.BadParameter(
            f"one of {', '.join(ACCOUNTINGS)} is needed, got {name!r}", param_hint="--accounting"
        )
    return name
