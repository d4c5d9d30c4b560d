"""Calling a model: its arguments, its train or eval mode, its logits."""

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
        caller: Name of the function that the user called, for the error.

    Raises:
        InvalidType: ``input`` is none of these.
    """
    if isinstance(input, Tensor):
        return (input,), {}
    if isinstance(input, Mapping):
        return (), dict(input)
    if isinstance(input, (tuple, list)):
        return tuple(input), {}
    raise InvalidType(
        f"{caller} needs an input of the model: an image tensor [B, C, H, W], a dict of keyword "
        f"arguments, or a tuple of positional ones; got {type(input).__name__}"
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: the model is in eval mode; on exit each module's own mode is restored."""
    with modes_restored(model):
        model.eval()
        yield


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Context manager that restores the current mode of each module on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # not `train()`, which also sets the submodules and may be overridden by the host
        for module, training in modes:
            module.training = training


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """The logits ``[B, classes]`` in the output of a classifier.

    Raises:
        DataError: The output has no logits, so the model is not a classifier.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            "this needs a classifier that returns logits [B, classes], but "
            f"{type(model).__name__} returned {got}"
        )
    return output
