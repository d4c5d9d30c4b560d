"""``sparsiattn train``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsiattn.cli.console import readable
from sparsiattn.cli.models import fresh, is_first, load_weights, saved_in
from sparsiattn.cli.options import (
    AsJson,
    Checkpoint,
    ImageSize,
    ModelName,
    ModelOptions,
    Pretrained,
    pairs,
    value_of,
)
from sparsiattn.training.progress import Progress, bar


def train_model(
    model: ModelName,
    data: Annotated[
        str, typer.Option(help="Folder or .tar of images, or READER/NAME[@FOLDER] of timm.")
    ],
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
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    model_option: ModelOptions = None,
    image_size: ImageSize = None,
    as_json: AsJson = False,
) -> None:
    """Train a patched model as a recipe says; run it again to go on after a kill.

    Under torchrun or accelerate launch all processes train together. Example: sparsiattn train
    deit_small_patch16_224 --pretrained --data imagenet --eval --out run --set options.k=0.1
    """
    import sparsiattn
    from sparsiattn.training import Recipe, train
    from sparsiattn.training.processes import leave

    options = pairs(model_option, "--model-option")
    with readable():
        plan = Recipe.load(recipe).changed(changes(change))
        host = fresh(model, image_size, pretrained, checkpoint, **options)
        if checkpoint is not None:
            load_weights(host, checkpoint)
        if (folder := saved_in(model, None)) is not None:
            sparsiattn.load(host, folder)
        with bar("updates", shown=sys.stderr.isatty() and is_first()) as advance:
            found = train(
                host, data, recipe=plan, eval_data=eval_data or (data if evaluates else None),
                out=out, resume="auto" if resume is None else resume,
                on_log=lambda row: _say(row, advance),
            )  # fmt: skip
    if is_first():
        about = {"name": model, "data": data, "recipe": plan.to_dict()}
        print(json.dumps({**about, **found.to_dict()}, indent=2) if as_json else found)
    leave()


def changes(texts: Iterable[str] | None) -> dict[str, Any]:
    """``["predictor.lr=0.1"]`` as `Recipe.changed` takes it.

    >>> changes(["predictor.epochs=2", "options.tile=[8,8]", "seed=1"])
    {'predictor.epochs': 2, 'options.tile': [8, 8], 'seed': 1}
    """
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"FIELD=VALUE is needed, got {text!r}", param_hint="--set")
        found[name] = value_of(value)
    return found


def _say(row: dict[str, Any], advance: Progress) -> None:
    """Epochs on stderr; every update is in the log."""
    if "step" in row:
        advance(row["step"])
    if "epoch_loss" in row:
        top1 = f", top-1 {row['top1']:.2f} %" if "top1" in row else ""
        line = f"{row['stage']} epoch {row['epoch']}: loss {row['epoch_loss']:.4f}{top1}"
        typer.secho(line, err=True)
