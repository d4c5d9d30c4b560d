"""Calls of `patch` that must fail: the error, and the model as it was before."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparsiattn
from sparsiattn import SparsiattnError

SITES = ("blocks.0.attn", "blocks.1.attn")
BUDGET = "float in (0, 1]"
Builtin = type[Exception] | tuple[type[Exception], ...]


def traces(model: nn.Module) -> list[Any]:
    """Everything of a model that a patch could leave behind, but its tensors."""
    return [
        (
            name,
            id(module),
            sorted(vars(module)),
            sorted(module._modules),
            getattr(module, "fused_attn", None),
            module.training,
            [len(hooks) for at, hooks in sorted(vars(module).items()) if at.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    ]


@contextmanager
def untouched(model: nn.Module, images: Tensor | None = None) -> Iterator[None]:
    """The model is afterwards what it was: not patched, its parts, tensors and outputs the same."""
    if images is None:
        images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        output, state, marks = model(images), copy.deepcopy(model.state_dict()), traces(model)
        yield
        assert sparsiattn.patch_of(model) is None
        assert traces(model) == marks
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
        outputs = zip(tree_leaves(model(images)), tree_leaves(output), strict=True)
        assert all(torch.equal(now, before) for now, before in outputs)


def refused(
    model: nn.Module, builtin: Builtin, says: tuple[str, ...] = (), **arguments: Any
) -> SparsiattnError:
    """The error of a call of `patch` that must fail; the model must not show that it was made."""
    with untouched(model), pytest.raises(SparsiattnError) as caught:
        sparsiattn.patch(model, **arguments)
    fits(caught.value, builtin, says)
    return caught.value


def all_refuse(
    model: nn.Module, builtin: Builtin, says: tuple[str, ...], names: Iterable[str], **options: Any
) -> None:
    """As `refused`, for several strategies in a row."""
    with untouched(model):
        for name in names:
            with pytest.raises(SparsiattnError) as caught:
                sparsiattn.patch(model, name, **options)
            fits(caught.value, builtin, says)


def fits(error: Exception, builtin: Builtin, says: tuple[str, ...]) -> None:
    assert isinstance(error, builtin)
    for part in says:
        assert part in str(error)


class Bad(NamedTuple):
    """Arguments of `patch`, the built-in exception they must raise and what the message says."""

    arguments: dict[str, Any]
    builtin: Builtin
    says: tuple[str, ...] = ()


def bad_cases(cases: dict[str, Bad]) -> Any:
    return pytest.mark.parametrize("bad", cases.values(), ids=cases.keys())
