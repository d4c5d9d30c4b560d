"""Options that several commands take, and how their text is read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import partial
from typing import Annotated, Any

import typer

from sparsiattn.errors import InvalidOption

# Each makes an option in one section of `--help`; `help_page.SECTIONS` has their order.
in_model = partial(typer.Option, rich_help_panel="Model")
in_patch = partial(typer.Option, rich_help_panel="Patch")
in_data = partial(typer.Option, rich_help_panel="Data")
in_goal = partial(typer.Option, rich_help_panel="Goal")
in_run = partial(typer.Option, rich_help_panel="Run")
in_output = partial(typer.Option, rich_help_panel="Output")

AsJson = Annotated[
    bool, in_output("--json", help="Print one JSON document to stdout and nothing else.")
]
BatchSize = Annotated[int, in_run(min=1, metavar="N", help="Images in one forward pass.")]
Device = Annotated[
    str, in_run(metavar="DEVICE", help="Where the model runs: cpu, cuda, cuda:1 ...")
]
DeviceOrGPU = Annotated[
    str | None,
    in_run(
        metavar="DEVICE",
        show_default="the GPU if there is one, else the CPU",
        help="Where the model runs: cpu, cuda, cuda:1 ...",
    ),
]
DType = Annotated[
    str,
    in_run(
        metavar="DTYPE", help="Precision of the model and its input: float32, bfloat16 or float16."
    ),
]
ImageCount = Annotated[
    int, in_data(min=1, metavar="N", help="Number of images to use, spread over the data.")
]
ImageSize = Annotated[
    int | None,
    in_model(
        min=1,
        metavar="PIXELS",
        show_default="the model's own size",
        help="Height and width of the input images.",
    ),
]
LabelledImages = Annotated[
    str,
    in_data(
        metavar="SOURCE",
        help="Folder or .tar of images, one folder per class; or READER/NAME[@FOLDER] of timm, "
        "for example hfds/cifar10.",
    ),
]


class Compared(Enum):
    """Values of ``--metric``."""

    CLASSES = "classes"
    FEATURES = "features"


Metric = Annotated[
    Compared | None,
    in_run(
        metavar="METRIC",
        show_default="classes for a model with a head",
        help="How outputs are compared with the dense model's: classes (share of images with the "
        "same first answer) or features (mean cosine).",
    ),
]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        rich_help_panel="Model",
        help="A timm name (deit_small_patch16_224), hf:ORG/NAME or hf:FOLDER of transformers, "
        "tv:NAME of torchvision, or a folder that patch.save wrote.",
    ),
]
ModelOptions = Annotated[
    list[str] | None,
    in_model(
        "--model-option",
        "--model-kwargs",
        metavar="NAME=VALUE",
        help="Option for the model's constructor, for example img_size=32. Repeatable.",
    ),
]
Seed = Annotated[int, in_run(min=0, metavar="N", help="Seed for random numbers.")]
UnlabelledImages = Annotated[
    str, in_data(metavar="SOURCE", help="Folder or .tar of images. Labels are not needed.")
]
Workers = Annotated[
    int,
    in_run(min=0, metavar="N", help="Processes that read images; 0 reads them in this process."),
]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def pairs(
    texts: Iterable[str] | None,
    flag: str,
    form: str = "NAME=VALUE",
    is_name: Callable[[str], bool] = str.isidentifier,
) -> dict[str, Any]:
    """Names and values given on the command line.

    Args:
        texts: As ``["a=1", "b=x"]``.
        flag: The option that takes them.
        form: What each must be, in words.
        is_name: Whether a text is a name.

    >>> pairs(["predictor.epochs=2", "options.tile=[8,8]"], "--set", is_name=bool)
    {'predictor.epochs': 2, 'options.tile': [8, 8]}
    """
    values = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not is_name(name):
            raise typer.BadParameter(f"{form} is needed, got {text!r}", param_hint=flag)
        values[name] = value_of(value)
    return values


def flags_of(settings: Mapping[str, Any]) -> str:
    """What commands that patch take for keyword arguments of `sparsiattn.patch`.

    >>> flags_of({"strategy": "connectivity", "k": 0.1, "tile": 4, "only_if_faster": True})
    '--strategy connectivity --k 0.1 -o tile=4 --only-if-faster'
    """
    words: list[str] = []
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        if value is None and name == "only_if_faster":
            continue
        if name == "only_if_faster":
            words.append("--only-if-faster" if value else "--no-only-if-faster")
        elif name in ("strategy", "k", "keep", "kernel"):
            words += [f"--{name}", text]
        else:
            words += ["-o", f"{name}={text}"]
    return shlex.join(words)


def value_of(text: str) -> Any:
    """JSON where it is that, None, True and False as Python writes them, else the text itself."""
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def budget(k: str | None, flag: str = "--k") -> int | float | None:
    """``"20"`` is a count, ``"0.1"`` a share."""
    if k is None:
        return None
    try:
        return int(k) if k.lstrip("+-").isdigit() else float(k)
    except ValueError:
        raise typer.BadParameter(
            f"a share (0.1) or a count (20) is needed, got {k!r}", param_hint=flag
        ) from None


def place_of(device: str | None, dtype: str = "float32") -> dict[str, Any]:
    """What ``model.to`` takes for ``--device`` and ``--dtype``; call it before a model is built."""
    return {"dtype": dtype_of(dtype), "device": device_of(device)}


def dtype_of(name: str) -> Any:
    """The torch dtype of that name, a floating one."""
    if name not in DTYPES:  # before torch is imported, which takes seconds
        raise typer.BadParameter(
            f"one of {', '.join(DTYPES)} is needed, got {name!r}", param_hint="--dtype"
        )
    import torch

    return getattr(torch, name)


def device_of(name: str | None) -> Any:
    """The torch device of that name; for None the GPU if there is one, else the CPU.

    Raises:
        InvalidOption: It is no device, or this machine does not have it.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's texts are paragraphs
        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InvalidOption(
            f"--device must be one that torch can use here ({', '.join(found)}), got {name!r}; "
            "sparsiattn doctor lists devices and what is missing"
        ) from error
    if device.type == "meta":
        raise InvalidOption("--device meta computes nothing: give cpu, cuda, cuda:1 ...")
    return device
