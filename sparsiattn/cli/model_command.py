"""The options of a command that patches a model, and the one place that turns them into one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sparsiattn.cli.options import ImageSize, ModelName, budget, pairs, value_of
from sparsiattn.errors import DataError, InvalidOption

MODEL_OPTIONS = ("checkpoint", "pretrained", "model_option", "image_size")
PATCH_OPTIONS = ("strategy", "k", "keep", "kernel", "option", "planners", *MODEL_OPTIONS)


@dataclass(frozen=True)
class ModelRequest:
    """The model that a command line names, and how to patch it.

    Fields are options of the command line in the order of ``--help``; see `model_command`.
    """

    model: ModelName
    strategy: Annotated[
        str | None, typer.Option(help="As sparsiattn.patch takes it; none leaves the model dense.")
    ] = None
    k: Annotated[str | None, typer.Option(help="0.1 is a share of the keys, 20 a count.")] = None
    keep: Annotated[
        str | None,
        typer.Option(help="Share of tokens token strategies keep; a list: [0.9,0.8,0.7]."),
    ] = None
    kernel: Annotated[str | None, typer.Option(help="auto, or a kernel's name.")] = None
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", help="NAME=VALUE for the strategy; may be repeated."),
    ] = None
    only_if_faster: Annotated[
        bool | None, typer.Option(help="Leave sites dense where sparse attention should lose.")
    ] = None
    planners: Annotated[
        Path | None,
        typer.Option(help="A folder that patch.save wrote: that patch instead of --strategy."),
    ] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights of the model: .safetensors, or .pth as timm takes it."),
    ] = None
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download weights.")] = False
    model_option: Annotated[
        list[str] | None,
        typer.Option(
            "--model-option",
            "--model-kwargs",
            help="NAME=VALUE for what makes the model, e.g. img_size=32 of timm; may be repeated.",
        ),
    ] = None
    image_size: ImageSize = None

    def saved_patch(self) -> Path | None:
        """The folder of the saved patch to apply: ``--planners``, or MODEL where that is one."""
        from sparsiattn.serialization.creating import is_saved

        if not is_saved(self.model):
            return self.planners
        if self.planners is not None:
            raise typer.BadParameter("MODEL is a saved patch already", param_hint="--planners")
        if self.strategy is not None:
            raise typer.BadParameter(
                "MODEL is a saved patch with its own strategy", param_hint="--strategy"
            )
        return Path(self.model)

    def patch_arguments(self, default_strategy: str | None = None) -> dict[str, Any] | None:
        """Keyword arguments of `sparsiattn.patch`; None for a saved patch and a dense model.

        >>> ModelRequest("m", "hybrid", "0.25", "[0.9,0.7]", option=["block=2"]).patch_arguments()
        {'strategy': 'hybrid', 'k': 0.25, 'keep': [0.9, 0.7], 'block': 2}
        """
        saved = self.saved_patch()
        strategy = self.strategy or (default_strategy if saved is None else None)
        keep = None if self.keep is None else value_of(self.keep)
        options = {"k": budget(self.k), "keep": keep, "kernel": self.kernel}
        options = {name: value for name, value in options.items() if value is not None}
        options |= pairs(self.option, "--option")
        if strategy is None:
            if options:
                raise typer.BadParameter(
                    f"{', '.join(options)} needs a strategy to go to", param_hint="--strategy"
                )
            if self.only_if_faster is not None:
                raise typer.BadParameter(
                    "needs --strategy" if saved is None else "a saved patch has decided",
                    param_hint="--only-if-faster",
                )
            return None
        if saved is not None:
            raise typer.BadParameter(
                "a saved patch has its own strategy", param_hint="--strategy with --planners"
            )
        if self.only_if_faster is not None:
            options["only_if_faster"] = self.only_if_faster
        return {"strategy": strategy, **options}

    def create(self) -> Any:
        """The unpatched model with its weights.

        Weights that stay random are the same in every process and every call, and a line on stderr
        says that they are random.
        """
        import torch

        from sparsiattn.serialization.creating import create_model, is_saved
        from sparsiattn.serialization.host import has_weights

        arguments = pairs(self.model_option, "--model-option")
        torch.manual_seed(0)
        model = create_model(
            self.model, image_size=self.image_size, pretrained=self.pretrained, **arguments
        )
        has_own = is_saved(self.model) and has_weights(self.model)
        if self.checkpoint is not None:
            load_weights(model, self.checkpoint)
        elif not (self.pretrained or has_own) and is_first_process():
            typer.secho("random weights: give --pretrained or --checkpoint", fg="yellow", err=True)
        return model

    def build(self, default_strategy: str | None = None) -> tuple[Any, Any]:
        """The model, patched as the options say, and its `Patch`, None for a dense model.

        Args:
            default_strategy: The strategy where neither ``--strategy`` nor a saved patch is given.

        Raises:
            InvalidOption: The checkpoint is of a patched model, and nothing says of which patch.
        """
        import sparsiattn
        from sparsiattn.patching import patch_quietly
        from sparsiattn.patching.model_speed import note_speed

        arguments, saved = self.patch_arguments(default_strategy), self.saved_patch()
        model = self.create()
        if saved is not None:
            return model, sparsiattn.load(model, saved)
        planners = [] if self.checkpoint is None else planners_in(self.checkpoint)
        if arguments is None:
            if planners:
                raise InvalidOption(
                    f"{self.checkpoint} is of a patched model (it has {planners[0]!r}): say with "
                    "which --strategy and options, or give --planners"
                )
            return model, None
        patch = patch_quietly(model, **arguments)
        note_speed(patch)
        if patch.speed_note and is_first_process():
            typer.secho(f"{patch.title}: {patch.speed_note}", fg="yellow", err=True)
        # Once more: planners that look at the model's weights had to find them when it was patched,
        # and the checkpoint's own planners have a place only now.
        if planners and self.checkpoint is not None:
            load_weights(model, self.checkpoint)
        return model, patch


def model_command(*options: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that takes MODEL and ``options``, fields of `ModelRequest`.

    Typer reads a command's options from its signature: there, MODEL comes first, and ``options``
    stand in place of the parameter ``request``, in which the command gets their values.
    """
    hints = get_type_hints(ModelRequest, include_extras=True)
    model, *shared = (
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(ModelRequest)
        if field.name in ("model", *options)
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [model]
        for parameter in signature(command, eval_str=True).parameters.values():
            parameters += shared if parameter.name == "request" else [parameter]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            requested = {name: values.pop(name) for name in ("model", *options)}
            command(request=ModelRequest(**requested), **values)

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def is_first_process() -> bool:
    """Whether this is the first of the processes that were launched."""
    return os.environ.get("RANK", "0") == "0"


def load_weights(model: Any, path: Path) -> None:
    """A dense checkpoint into a model, or one of a patched model into a patched one; strictly.

    Of a checkpoint with the planners of a patch an unpatched model takes the rest.
    """
    from sparsiattn import patch_of
    from sparsiattn.runtime.site_runtime import is_planner_key

    weights = _read_weights(path)
    if patch_of(model) is None:
        weights = {name: tensor for name, tensor in weights.items() if not is_planner_key(name)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise DataError(
            f"{path} does not fit this {type(model).__name__}: {' '.join(lines[1:3]).strip()[:400]}"
        ) from error


def planners_in(path: Path) -> list[str]:
    """Names of the planners' tensors in a checkpoint of a patched model."""
    from sparsiattn.runtime.site_runtime import is_planner_key

    return [name for name in _read_weights(path) if is_planner_key(name)]


def _read_weights(path: Path) -> dict[str, Any]:
    from timm.models import load_state_dict

    try:
        return dict(load_state_dict(str(path), weights_only=True))
    except Exception as error:  # torch, pickle and safetensors each have their own
        raise DataError(f"{path} cannot be read as weights: {error}") from error


def unlabelled(
    data: str, model: Any, limit: int, batch_size: int, image_size: int | None
) -> list[Any]:
    """Batches of images, read as the model takes them.

    Args:
        data: Folder or .tar; labels do not matter.
        model: Says how images are read.
        limit: Number of images, spread over the data.
        batch_size: Images in a batch.
        image_size: Pixels; what the model was built for if None.
    """
    from sparsiattn.training.data import loader

    batches = loader(
        data, model, batch_size=batch_size, limit=limit, labels=False, image_size=image_size
    )
    return [images for images, _ in batches]


def noise(model: Any, size: int | None, batch: int) -> Any:
    """A batch of noise of the size the model takes, of its own precision and device."""
    import torch

    like = next(model.parameters())
    images = torch.randn(
        batch, *image_shape(model, size)[1:], generator=torch.Generator().manual_seed(0)
    )
    return images.to(like.device, like.dtype)


def image_shape(model: Any, size: int | None) -> tuple[int, ...]:
    """Shape of one image: of the pixels asked for, else of those the model is built for."""
    from sparsiattn.patching.discovery.backbone import backbone_of

    shape = backbone_of(model).input_shape(model)
    if shape is None and size is None:
        raise InvalidOption(
            f"{type(model).__name__} does not say its image size: give --image-size"
        )
    shape = shape or (1, 3, 0, 0)
    return shape if size is None else (*shape[:-2], size, size)
