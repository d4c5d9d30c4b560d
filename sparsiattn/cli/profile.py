"""``sparsiattn profile``."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import typer

from sparsiattn.cli.console import cells, print_whole, readable, say
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


def profile_model(
    model: ModelName,
    strategy: Strategy = None,
    k: K = None,
    keep: Keep = None,
    kernel: Kernel = None,
    option: StrategyOptions = None,
    only_if_faster: Annotated[
        bool | None, typer.Option(help="Leave sites dense where sparse attention should lose.")
    ] = None,
    planners: Planners = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    model_option: ModelOptions = None,
    image_size: ImageSize = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
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

    from sparsiattn.analysis.profiling.profiler import profile

    planners = saved_in(model, planners, strategy)
    given = patch_options(strategy, k, keep, kernel, option, planners)
    if only_if_faster is not None:
        if given is None:
            raise typer.BadParameter("needs --strategy", param_hint="--only-if-faster")
        given["only_if_faster"] = only_if_faster
    options, kind = pairs(model_option, "--model-option"), dtype_of(dtype)
    counted = _accounting(accounting)
    console = Console(stderr=as_json)
    with console.status(f"profiling {model}"), readable():
        host = fresh(model, image_size, pretrained, checkpoint, **options)
        prepare(host, given, planners, checkpoint)
        host = host.eval().to(device, kind)
        found = profile(
            host, noise(host, image_size, batch_size), accounting=counted, memory=memory,
            latency=latency, rounds=rounds,
        )  # fmt: skip
    found = replace(found, model=model)
    if as_json:
        print(json.dumps({**found.to_dict(), "name": model}, indent=2))
        return
    _print(console, found)


def _accounting(name: str) -> Any:
    from sparsiattn.analysis.profiling.accounting import ACCOUNTINGS

    if name not in ACCOUNTINGS:
        raise typer.BadParameter(
            f"one of {', '.join(ACCOUNTINGS)} is needed, got {name!r}", param_hint="--accounting"
        )
    return name


def _print(console: Any, found: Any) -> None:
    for part in filter(None, found.layout()):
        if isinstance(part, str):
            say(console, part)
        else:
            print_whole(console, cells(part))
