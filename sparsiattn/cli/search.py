"""``sparsiattn search``."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import MODEL_OPTIONS, ModelRequest, model_command, unlabelled
from sparsiattn.cli.options import (
    AsJson,
    BatchSize,
    ImageCount,
    Metric,
    UnlabelledImages,
    budget,
    pairs,
)

if TYPE_CHECKING:
    from sparsiattn import SearchResult


Budget = Annotated[str | None, typer.Option(help="Budget: a share of the dense MACs, or a count.")]
Latency = Annotated[float | None, typer.Option(help="Budget: a share of the dense time here.")]
Agreement = Annotated[
    float | None,
    typer.Option(
        help="Floor: share of images predicted as by the dense model; mean cosine of features."
    ),
]
Trials = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Schedules to run on the images at most, all counted: uniform ones, single changes, "
        "proposals. By default all of the first two, and 60.",
    ),
]
Seconds = Annotated[
    float | None, typer.Option(help="Run nothing new after that, and take the best so far.")
]
OptionsGrid = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=LIST to choose from, e.g. tile=[1,[4,4]]; may be repeated. tile and background "
        "are tried where it is not given; none leaves options alone."
    ),
]


@model_command("strategy", "option", "planners", *MODEL_OPTIONS)
def search_model(
    *,
    data: UnlabelledImages,
    macs: Budget = None,
    latency: Latency = None,
    agreement: Agreement = None,
    out: Annotated[Path | None, typer.Option(help="The schedule, as JSON.")] = None,
    images: ImageCount = 256,
    batch_size: BatchSize = 64,
    trials: Trials = None,
    budget_seconds: Seconds = None,
    options_grid: OptionsGrid = None,
    metric: Metric = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Find which sites and blocks can do with fewer keys and tokens, for one budget of the model.

    Says on stderr how much it will run. Use what it writes with -o schedule=FILE and the options
    that it names. Example: sparsiattn search deit_small_patch16_224 --pretrained --data photos
    --strategy hybrid --macs 0.7 --out schedule.json
    """
    from sparsiattn import search

    target = _target({"macs": budget(macs), "latency": latency, "agreement": agreement})
    options, saved = pairs(request.option, "--option"), request.saved_patch()
    if saved is not None and (request.strategy is not None or options):
        raise typer.BadParameter("a saved patch has its own strategy", param_hint="--planners")
    model, _ = replace(request, strategy=None, option=None).build()
    result = search(
        model,
        unlabelled(data, model, images, batch_size, request.image_size),
        target,
        trials=trials,
        seed=seed,
        budget_s=budget_seconds,
        options_grid=grid_of(options_grid),
        metric=metric,  # type: ignore[arg-type]
        strategy=None if saved else request.strategy or "hybrid",
        **options,
    )
    if out is not None:
        result.save(out)
    document = {"name": request.model, "data": data, "out": None if out is None else str(out)}
    again = "" if out is None else f"in commands: {flags(result, out)}"
    print_result(as_json, {**document, **result.to_dict()}, result, again)


def _target(budgets: dict[str, Any]) -> dict[str, Any]:
    """The one budget that was given."""
    target = {name: value for name, value in budgets.items() if value is not None}
    if len(target) != 1:
        raise typer.BadParameter("give one of --macs, --latency and --agreement")
    return target


def grid_of(texts: list[str] | None) -> dict[str, Any] | None:
    """``["tile=[1,[4,4]]"]`` as `search` takes it; ``["none"]`` is an empty grid."""
    return {} if texts == ["none"] else pairs(texts, "--options-grid", "NAME=LIST") or None


def flags(result: SearchResult, schedule: Path) -> str:
    """What commands that patch need to use a schedule."""
    options = dict(result.to_dict()["options"])
    faster = options.pop("only_if_faster", None)
    pairs = {"schedule": str(schedule)} | {
        name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for name, value in options.items()
    }
    words = ["--strategy", result.strategy["name"]]
    words += [word for name, value in pairs.items() for word in ("-o", f"{name}={value}")]
    if faster is not None:
        words.append("--only-if-faster" if faster else "--no-only-if-faster")
    return shlex.join(words)
