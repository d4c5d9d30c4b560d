"""``sparsiattn search``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsiattn.cli.console import check_file, print_result
from sparsiattn.cli.images import unlabelled
from sparsiattn.cli.model_command import MODEL_OPTIONS, ModelRequest, model_command
from sparsiattn.cli.options import (
    AsJson,
    BatchSize,
    Device,
    DType,
    ImageCount,
    Metric,
    Seed,
    UnlabelledImages,
    Workers,
    budget,
    flags_of,
    in_goal,
    in_output,
    in_patch,
    in_run,
    pairs,
    place_of,
)

if TYPE_CHECKING:
    from sparsiattn import SearchResult


Macs = Annotated[
    str | None,
    in_goal(metavar="BUDGET", help="Maximum MACs: a share of the dense model's (0.7), or a count."),
]
Latency = Annotated[
    float | None,
    in_goal(metavar="SHARE", help="Maximum time: a share of the dense model's on this machine."),
]
Agreement = Annotated[
    float | None,
    in_goal(
        metavar="SHARE",
        help="Minimum quality: share of images with the dense model's prediction, or mean cosine "
        "of features.",
    ),
]
Trials = Annotated[
    int | None,
    in_run(
        min=1,
        metavar="N",
        show_default="all uniform ones and single changes, and 60 more",
        help="Maximum number of schedules to run on the images.",
    ),
]
Seconds = Annotated[
    float | None,
    in_run(
        metavar="SECONDS",
        show_default="no limit",
        help="Time limit: after it, no further schedule is tried.",
    ),
]
OptionsGrid = Annotated[
    list[str] | None,
    in_patch(
        metavar="NAME=LIST",
        show_default="some values of tile and background",
        help="Values of an option to try, for example tile=[1,[4,4]]; or none, to keep the "
        "options as they are. Repeatable.",
    ),
]


@model_command("strategy", "option", "patch", *MODEL_OPTIONS)
def search_model(
    *,
    data: UnlabelledImages,
    macs: Macs = None,
    latency: Latency = None,
    agreement: Agreement = None,
    out: Annotated[
        Path | None, in_output(metavar="FILE", help="Write the schedule to this JSON file.")
    ] = None,
    images: ImageCount = 256,
    batch_size: BatchSize = 64,
    trials: Trials = None,
    budget_seconds: Seconds = None,
    request: ModelRequest,
    options_grid: OptionsGrid = None,
    metric: Metric = None,
    seed: Seed = 0,
    workers: Workers = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Find how many keys each layer needs, and how many tokens each block needs, for one goal.

    Give one of --macs, --latency and --agreement. The command first prints how much it will run.
    To use the schedule that it writes, pass --option schedule=FILE and the options that it prints.
    The strategy is hybrid unless you name another.

    Example: sparsiattn search deit_small_patch16_224 --pretrained --data photos --strategy hybrid
    --macs 0.7 --out schedule.json
    """
    target = _target({"macs": budget(macs, "--macs"), "latency": latency, "agreement": agreement})
    check_file(out)
    options, place = pairs(request.option, "--option"), place_of(device, dtype)
    from sparsiattn import search

    saved = request.saved_patch()
    if saved is not None and (request.strategy is not None or options):
        raise typer.BadParameter("a saved patch has its own strategy", param_hint="--patch")
    model, _ = replace(request, strategy=None, option=None).build()
    model.to(**place)
    size = request.image_size
    result = search(
        model,
        list(unlabelled(data, model, size, workers, limit=images, batch_size=batch_size)),
        target,
        trials=trials,
        seed=seed,
        budget_s=budget_seconds,
        options_grid=grid_of(options_grid),
        metric=None if metric is None else metric.value,
        strategy=None if saved else request.strategy or "hybrid",
        **options,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
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
    own = {"strategy": result.strategy["name"], "schedule": str(schedule)}
    return flags_of({**own, **result.to_dict()["options"]})
