"""The options of a command that patches a model, and the one place that turns them into one."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sparsiattn.cli.hub import may_ask_hub, offline_if_unreachable
from sparsiattn.cli.options import (
    ImageSize,
    ModelName,
    ModelOptions,
    budget,
    in_model,
    in_patch,
    pairs,
    value_of,
)
from sparsiattn.cli.weights import load_weights, planners_in
from sparsiattn.errors import InvalidOption

MODEL_OPTIONS = ("pretrained", "checkpoint", "model_option", "image_size")
PATCH_OPTIONS = ("strategy", "k", "keep", "kernel", "option", "patch", *MODEL_OPTIONS)


@dataclass(frozen=True)
class ModelRequest:
    """The model that a command line names, and how to patch it.

    Fields are options of the command line in the order of ``--help``; see `model_command`.
    """

    model: ModelName
    strategy: Annotated[
        str | None,
        in_patch(
            metavar="NAME",
            help="Strategy, such as connectivity, token_merge or hybrid; sparsiattn list has all.",
        ),
    ] = None
    k: Annotated[
        str | None,
        in_patch(
            metavar="BUDGET", help="Keys that each query keeps: a share (0.1) or a count (20)."
        ),
    ] = None
    keep: Annotated[
        str | None,
        in_patch(
            metavar="SHARE",
            help="Share of tokens that a token strategy keeps (0.7), or a list: [0.9,0.8,0.7].",
        ),
    ] = None
    kernel: Annotated[
        str | None,
        in_patch(
            metavar="NAME", show_default="auto", help="Kernel that computes sparse attention."
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        in_patch(
            "-o", "--option", metavar="NAME=VALUE", help="Option of the strategy. Repeatable."
        ),
    ] = None
    only_if_faster: Annotated[
        bool | None,
        in_patch(
            show_default="only for hybrid",
            help="Leave attention dense where a sparse kernel is not expected to be faster.",
        ),
    ] = None
    patch: Annotated[
        Path | None,
        in_patch(
            "--patch",
            "--planners",
            metavar="FOLDER",
            help="A saved patch (a folder that patch.save wrote) instead of --strategy.",
        ),
    ] = None
    pretrained: Annotated[
        bool,
        in_model("--pretrained", help="Download trained weights. Without it they are random."),
    ] = False
    checkpoint: Annotated[
        Path | None,
        in_model(
            metavar="FILE", help="Load weights from a file: .safetensors, or .pth as timm reads it."
        ),
    ] = None
    model_option: ModelOptions = None
    image_size: ImageSize = None

    def model_words(self) -> str:
        """The model and its options as another command takes them.

        >>> ModelRequest("m", model_option=["depth=2"], image_size=64).model_words()
        'm --model-option depth=2 --image-size 64'
        """
        words = [self.model, *(["--pretrained"] if self.pretrained else [])]
        words += [] if self.checkpoint is None else ["--checkpoint", str(self.checkpoint)]
        for pair in self.model_option or []:
            words += ["--model-option", pair]
        words += [] if self.image_size is None else ["--image-size", str(self.image_size)]
        return shlex.join(words)

    def saved_patch(self) -> Path | None:
        """The folder of the saved patch to apply: ``--patch``, or MODEL where that is one."""
        from sparsiattn.serialization.creating import is_saved

        if not is_saved(self.model):
            return self.patch
        if self.patch is not None:
            raise typer.BadParameter("MODEL is a saved patch already", param_hint="--patch")
        if self.strategy is not None:
            raise typer.BadParameter(
                "MODEL is a saved patch with its own strategy", param_hint="--strategy"
            )
        return Path(self.model)

    def names_a_patch(self) -> bool:
        """Whether the command line says anything of how to patch."""
        given = (self.strategy, self.k, self.keep, self.kernel, self.option, self.only_if_faster)
        return any(value not in (None, []) for value in given) or self.saved_patch() is not None

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
                    f"{', '.join(options)} needs a strategy: give --strategy NAME",
                    param_hint="--strategy",
                )
            if self.only_if_faster is not None:
                raise typer.BadParameter(
                    "needs --strategy NAME" if saved is None else "a saved patch has its own",
                    param_hint="--only-if-faster",
                )
            return None
        if saved is not None:
            raise typer.BadParameter(
                "a saved patch has its own strategy", param_hint="--strategy with --patch"
            )
        if self.only_if_faster is not None:
            options["only_if_faster"] = self.only_if_faster
        return {"strategy": strategy, **options}

    def make(self) -> Any:
        """The unpatched model as its library makes it."""
        from sparsiattn.serialization.creating import create_model

        arguments = pairs(self.model_option, "--model-option")
        with offline_if_unreachable(self.pretrained or may_ask_hub(self.model)):
            return create_model(
                self.model, image_size=self.image_size, pretrained=self.pretrained, **arguments
            )

    def create(self, weights_matter: bool = True) -> Any:
        """The unpatched model with its weights.

        Weights that stay random are the same in every process and every call.

        Args:
            weights_matter: Whether a line on stderr says that weights are random, if they are.
        """
        import torch

        from sparsiattn.serialization.creating import is_saved
        from sparsiattn.serialization.host import has_weights

        torch.manual_seed(0)
        model = self.make()
        has_own = is_saved(self.model) and has_weights(self.model)
        if self.checkpoint is not None:
            load_weights(model, self.checkpoint)
        elif weights_matter and not (self.pretrained or has_own) and is_first_process():
            typer.secho("random weights: give --pretrained or --checkpoint", fg="yellow", err=True)
        return model

    def build(
        self, default_strategy: str | None = None, weights_matter: bool = True
    ) -> tuple[Any, Any]:
        """The model, patched as the options say, and its `Patch`, None for a dense model.

        Args:
            default_strategy: The strategy where neither ``--strategy`` nor a saved patch is given.
            weights_matter: As `create` takes it.

        Raises:
            InvalidOption: The checkpoint is of a patched model, and nothing says of which patch.
        """
        import sparsiattn
        from sparsiattn.patching import patch_quietly
        from sparsiattn.patching.model_speed import note_speed

        arguments, saved = self.patch_arguments(default_strategy), self.saved_patch()
        model = self.create(weights_matter)
        if saved is not None:
            return model, sparsiattn.load(model, saved)
        planners = [] if self.checkpoint is None else planners_in(self.checkpoint)
        if arguments is None:
            if planners:
                raise InvalidOption(
                    f"{self.checkpoint} is of a patched model (it has {planners[0]!r}): name its "
                    "--strategy and options, or give its --patch"
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
