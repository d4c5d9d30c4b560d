"""``sparsiattn profile``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from sparsiattn.cli.console import print_result
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


@model_command(*PATCH_OPTIONS, "only_if_faster")
def profile_model(
    *,
    request: ModelRequest,
    batch_size: BatchSize = 1,
    device: Device = "cpu",
    dtype: DType = "float32",
    accounting: Annotated[
        str,
        in_output(
            metavar="RULE",
            help="Which MACs count: own (query-key pairs that are kept), computed (all that "
            "kernels multiply), or paper (as in Sparsifiner's paper).",
        ),
    ] = "own",
    memory: Annotated[bool, in_run("--memory", help="Measure peak memory, too.")] = False,
    latency: Annotated[
        bool, in_run("--latency", help="Measure time, too: dense and patched in turn.")
    ] = False,
    rounds: Annotated[int, in_run(min=1, metavar="N", help="Paired runs of --latency.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Count the MACs of a model, dense and patched, by part and by site, on random input.

    Without --strategy or --patch only the dense model is counted.

    Example: sparsiattn profile deit_small_patch16_224 --strategy connectivity --k 0.1
    --accounting paper
    """
    from rich.console import Console

    place = place_of(device, dtype)
    from sparsiattn import profile

    _check_accounting(accounting)
    with Console(stderr=as_json).status(f"profiling {request.model}"):
        model, _ = request.build(weights_matter=False)
        model = model.eval().to(**place)
        images = noise(model, request.image_size, batch_size)
        result = profile(
            model,
            images,
            accounting=accounting,  # type: ignore[arg-type]
            memory=memory,
            latency=latency,
            rounds=rounds,
        )
    result = replace(result, model=request.model)
    print_result(as_json, {**result.to_dict(), "name": request.model}, *result.layout())


def _check_accounting(name: str) -> None:
    from sparsiattn.analysis.profiling.accounting import ACCOUNTINGS

    if name not in ACCOUNTINGS:
        raise typer.BadParameter(
            f"one of {', '.join(ACCOUNTINGS)} is needed, got {name!r}", param_hint="--accounting"
        )
