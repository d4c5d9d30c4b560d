"""Quick copies of models are what `copy.deepcopy` makes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsiattn.patching.discovery.module_copy import copy_modules
from tests.support import zoo


def copied(model: nn.Module) -> Any:
    return copy_modules(model, list(model.modules()), {})


def assert_alike(a: Any, b: Any, of: Any) -> None:
    """Equal, and as much their own as a deep copy's parts are."""
    states = a.state_dict(), b.state_dict(), of.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert tensor.data_ptr() != states[2][name].data_ptr() or not tensor.numel()
    modules = [dict(x.named_modules(remove_duplicate=False)) for x in (a, b, of)]
    assert list(modules[0]) == list(modules[1])
    for name, module in modules[0].items():
        assert type(module) is type(modules[1][name])
        assert module is not modules[2][name]
        assert sorted(vars(module)) == sorted(vars(modules[1][name]))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_whole_models(name: str) -> None:
    model = zoo.build(name)
    quick, deep, x = copied(model), copy.deepcopy(model), zoo.images(model)
    assert_alike(quick, deep, model)
    with torch.no_grad():
        assert torch.equal(quick(x), deep(x))


class Tied(nn.Module):
    """Two names for one part, one tensor in two places, and containers that share an item."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(3, 3)
        self.third = nn.Linear(3, 3)
        self.third.weight = self.first.weight
        self.scale = torch.ones(2)
        self.notes: dict[str, Any] = {"scale": self.scale, "part": self.first, "empty": set()}
        self.listed = [self.scale, self.notes]


class SelfCopied(nn.Module):
    """Copies itself, with a look at what is inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> SelfCopied:
        new = SelfCopied()
        memo[id(self)] = new
        new.inner = copy.deepcopy(self.inner, memo)
        new.copies = self.copies + int(new.inner.weight.numel())
        return new


class WithState(nn.Module):
    """Leaves something out of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.lost = 1, 2

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lost": None}


def _named_after(name: str) -> nn.Module:
    part = nn.Linear(2, 2)
    vars(part)["__deepcopy__"] = lambda memo: nn.Identity()
    return nn.Sequential(part)


def _compiled() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].compile()
    return model


def test_what_is_shared_stays_shared() -> None:
    new = copied(Tied())
    assert new.first is new.second
    assert new.third.weight is new.first.weight
    assert new.notes["part"] is new.first
    assert new.notes["scale"] is new.scale
    assert new.listed[1] is new.notes


@pytest.mark.parametrize(
    "make",
    [Tied, SelfCopied, WithState, lambda: nn.Sequential(SelfCopied(), nn.Linear(2, 2)), _compiled],
)
def test_special_parts_are_copied_their_own_way(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert_alike(copied(model), copy.deepcopy(model), model)


def test_a_parts_own_way_is_asked_where_it_was_set_on_the_object() -> None:
    assert isinstance(copied(_named_after("x"))[0], nn.Identity)


def test_copies_that_exist_are_taken() -> None:
    model, known = Tied(), nn.Identity()
    new = copy_modules(model, list(model.modules()), {id(model.first): known})
    assert new.first is known
    assert new.notes["part"] is known
