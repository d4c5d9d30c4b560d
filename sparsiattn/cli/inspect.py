"""``sparsiattn inspect``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from sparsiattn.cli.console import print_result
from sparsiattn.cli.hub import may_ask_hub, offline_if_unreachable
from sparsiattn.cli.images import image_shape
from sparsiattn.cli.model_command import ModelRequest, model_command
from sparsiattn.cli.options import AsJson, in_patch


@model_command("model_option", "image_size")
def inspect_model(
    *,
    request: ModelRequest,
    strategy: Annotated[
        list[str] | None,
        in_patch(
            metavar="NAME",
            show_default="all but published methods",
            help="Strategy to judge. Repeatable.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's attention, what can be patched, and what each strategy is expected to gain.

    Runs without weights and without data.

    Example: sparsiattn inspect swin_tiny_patch4_window7_224 --strategy local
    """
    from rich.console import Console

    from sparsiattn import inspect
    from sparsiattn.serialization.origin import without_memory

    status = Console(stderr=as_json).status(f"inspecting {request.model}")
    with status, offline_if_unreachable(may_ask_hub(request.model)):
        host = without_memory(partial(_host, request))
        size = request.image_size
        shape = None if size is None else image_shape(host, size)
        inspection = inspect(host, shape, strategies=strategy or None)
    print_result(as_json, {**inspection.to_dict(), "name": request.model}, *inspection.parts())


def _host(request: ModelRequest) -> Any:
    """The model with whatever weights it is made with."""
    from sparsiattn.serialization.creating import is_saved
    from sparsiattn.serialization.host import host_without_weights

    if is_saved(request.model) and not request.model_option:
        return host_without_weights(request.model)
    return request.make()
