"""``sparsiattn train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.model_command import (
    MODEL_OPTIONS,
    ModelRequest,
    is_first_process,
    model_command,
)
from sparsiattn.cli.options import AsJson, LabelledImages, pairs

if TYPE_CHECKING:
    from sparsiattn.training.progress import Progress


@model_command(*MODEL_OPTIONS)
def train_model(
    *,
    data: LabelledImages,
    recipe: Annotated[
        str, typer.Option(help="A recipe's name, or a .yaml or .json file.")
    ] = "sparsifiner_deit_small",
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints and the log.")] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Require or refuse a checkpoint in --out; without either, use it if it is there.",
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE or STAGE.FIELD=VALUE of the recipe; repeatable."),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Images to evaluate on after each epoch.")
    ] = None,
    evaluates: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Evaluate on the validation split of --data.")
    ] = False,
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Train a patched model as a recipe says; run it again to go on after a kill.

    Under torchrun or accelerate launch all processes train together. Example: sparsiattn train
    deit_small_patch16_224 --pretrained --data imagenet --eval --out run --set options.k=0.1
    """
    from sparsiattn import Recipe, load, train
    from sparsiattn.training.processes import leave
    from sparsiattn.training.progress import bar

    # names of fields may hold dots: STAGE.FIELD
    plan = Recipe.load(recipe).changed(pairs(change, "--set", "FIELD=VALUE", is_name=bool))
    model = request.create()
    if (folder := request.saved_patch()) is not None:
        load(model, folder)
    with bar("updates", shown=sys.stderr.isatty() and is_first_process()) as advance:
        result = train(
            model,
            data,
            recipe=plan,
            eval_data=eval_data or (data if evaluates else None),
            out=out,
            resume="auto" if resume is None else resume,
            on_log=lambda row: _show_progress(row, advance),
        )
    if is_first_process():
        document = {"name": request.model, "data": data, "recipe": plan.to_dict()}
        print_result(as_json, {**document, **result.to_dict()}, result)
    leave()


def _show_progress(row: dict[str, Any], advance: Progress) -> None:
    """Epochs on stderr; every update is in the log."""
    if "step" in row:
        advance(row["step"])
    if "epoch_loss" in row:
        top1 = f", top-1 {row['top1']:.2f} %" if "top1" in row else ""
        line = f"{row['stage']} epoch {row['epoch']}: loss {row['epoch_loss']:.4f}{top1}"
        typer.secho(line, err=True)
