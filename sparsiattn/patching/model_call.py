"""Calling a host model: its arguments, its mode, its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparsiattn.errors import DataError, InvalidType


def arguments(input: Any, caller: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model call.

    Args:
        input: An image batch, a mapping of keyword arguments or a sequence of positional ones.
        caller: The function that the user called, for the error.

    Raises:
        InvalidType: For anything else.
    """
    if isinstance(input, Tensor):
        return (input,), {}
    if isinstance(input, Mapping):
        return (), dict(input)
    if isinstance(input, (tuple, list)):
        return tuple(input), {}
    raise InvalidType(
        f"{caller} needs what the model takes: an image tensor [B, C, H, W], a dict of keyword "
        f"arguments, or a tuple of positional ones; got {type(input).__name__}"
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each module has its own mode again."""
    with modes_restored(model):
        model.eval()
        yield


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """After the block each module that the model has now is in its present mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # not `train()`, which sets the submodules as well and may be the host's own method
        for module, training in modes:
            module.training = training


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """Logits ``[B, classes]`` in whatever a classifier returns.

    Raises:
        DataError: The output has none, so the model is no classifier.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            f"this needs a classifier: logits [B, classes], but {type(model).__name__} gave {got}"
        )
    return output
