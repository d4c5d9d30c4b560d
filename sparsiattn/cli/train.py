"""``sparsiattn train``."""

from __future__ import annotations

import os
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
from sparsiattn.cli.options import (
    AsJson,
    LabelledImages,
    device_of,
    in_data,
    in_output,
    in_run,
    pairs,
)

if TYPE_CHECKING:
    from sparsiattn.training.progress import Progress

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""A recipe's ``mixed_precision`` by the name of the dtype."""


RecipeName = Annotated[
    str,
    in_run(metavar="RECIPE", help="How to train: a recipe's name, or a .yaml or .json file."),
]
RunFolder = Annotated[
    Path | None,
    in_output(
        metavar="FOLDER",
        show_default="none, and nothing is written",
        help="Folder for checkpoints, the best weights and the log.",
    ),
]
Resume = Annotated[
    bool | None,
    in_output(
        "--resume/--no-resume",
        show_default="resume if there is a checkpoint",
        help="Require, or refuse, a checkpoint in --out.",
    ),
]
Changes = Annotated[
    list[str] | None,
    in_run(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of the recipe; STAGE.FIELD=VALUE changes that of a stage. Repeatable.",
    ),
]
EvalSource = Annotated[
    str | None,
    in_data(metavar="SOURCE", help="Evaluate on these images after each epoch."),
]
Evaluates = Annotated[
    bool,
    in_data("--eval/--no-eval", help="Evaluate on the validation split of --data."),
]
TrainWorkers = Annotated[
    int | None,
    in_run(
        min=0,
        metavar="N",
        show_default="as the recipe says",
        help="Processes that read images.",
    ),
]
TrainDevice = Annotated[
    str | None,
    in_run(
        metavar="DEVICE",
        show_default="the GPU if there is one, else the CPU",
        help="Where the model is trained: cpu, cuda, cuda:1 ... Under a launcher every process "
        "has its own.",
    ),
]
TrainDType = Annotated[
    str | None,
    in_run(
        metavar="DTYPE",
        show_default="as the recipe says",
        help="Precision of mixed-precision training: float32 (none), bfloat16 or float16.",
    ),
]


@model_command("patch", *MODEL_OPTIONS)
def train_model(
    *,
    data: LabelledImages,
    recipe: RecipeName = "sparsifiner_deit_small",
    out: RunFolder = None,
    resume: Resume = None,
    change: Changes = None,
    eval_data: EvalSource = None,
    evaluates: Evaluates = False,
    workers: TrainWorkers = None,
    device: TrainDevice = None,
    dtype: TrainDType = None,
    request: ModelRequest,
    as_json: AsJson = False,
) -> None:
    """Train a patched model with a recipe.

    The same command resumes a run that was interrupted. Under torchrun or accelerate launch all
    processes train together.

    Example: sparsiattn train deit_small_patch16_224 --pretrained --data imagenet --eval --out run
    --set options.k=0.1
    """
    # names of fields may hold dots: STAGE.FIELD
    changes = pairs(change, "--set", "FIELD=VALUE", is_name=bool)
    changes |= {} if workers is None else {"workers": workers}
    changes |= {} if dtype is None else {"mixed_precision": _precision(dtype)}
    if device is not None:
        _train_on(device)
    from sparsiattn import Recipe, load, train
    from sparsiattn.training.processes import leave
    from sparsiattn.training.progress import bar

    plan = Recipe.load(recipe).changed(changes)
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


def _precision(dtype: str) -> str:
    if dtype not in PRECISIONS:
        raise typer.BadParameter(
            f"one of {', '.join(PRECISIONS)} is needed, got {dtype!r}", param_hint="--dtype"
        )
    return PRECISIONS[dtype]


def _train_on(name: str) -> None:
    """Have accelerate, which places the model, take that device."""
    device = device_of(name)
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a GPU
    elif device.type == "cuda":
        import torch

        torch.cuda.set_device(device)


def _show_progress(row: dict[str, Any], advance: Progress) -> None:
    """Epochs on stderr; every update is in the log."""
    if "step" in row:
        advance(row["step"])
    if "epoch_loss" in row:
        top1 = f", top-1 {row['top1']:.2f} %" if "top1" in row else ""
        line = f"{row['stage']} epoch {row['epoch']}: loss {row['epoch_loss']:.4f}{top1}"
        typer.secho(line, err=True)
