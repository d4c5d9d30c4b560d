"""Wrong names, types, budgets, options, schedules: one clear error each, the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsiattn
from sparsiattn import SparsiattnError, UnknownName
from sparsiattn.strategies import TopK
from tests.support import zoo
from tests.support.refusals import (
    BUDGET,
    SITES,
    Bad,
    all_refuse,
    bad_cases,
    fits,
    refused,
    untouched,
)


@pytest.fixture
def model() -> nn.Module:
    """Attention written out by hand until a patch switches it: more that must be put back."""
    return zoo.build("vit_unfused")


class TestNames:
    @bad_cases(
        {
            "strategy": Bad(
                {"strategy": "conectivity"},
                LookupError,
                (
                    "unknown strategy 'conectivity'",
                    "Did you mean 'connectivity'",
                    "topk",
                    "local",
                ),
            ),
            "strategy, nothing close": Bad({"strategy": "zzz"}, LookupError, ("'zzz'", "topk")),
            "kernel": Bad(
                {"kernel": "gahter"},
                LookupError,
                ("unknown kernel 'gahter'", "Did you mean 'gather'", "reference", "sdpa"),
            ),
            "option": Bad(
                {"strategy": "topk", "backgruond": 2},
                LookupError,
                ("'topk'", "Did you mean 'background'", "prefix_keys", "tile"),
            ),
            "option of another strategy": Bad(
                {"strategy": "topk", "reduce": 4}, LookupError, ("'topk'", "'reduce'", "background")
            ),
            "budget where there is none": Bad(
                {"strategy": "dense", "k": 0.5}, LookupError, ("'dense'", "'k'", "tile")
            ),
            "site": Bad(
                {"sites": "blocks.0.attention"},
                LookupError,
                ("unknown site", "Did you mean 'blocks.0.attn'", *SITES),
            ),
            "site in a list": Bad({"sites": ["blocks.0.attn", "blocks.7.*"]}, LookupError, SITES),
            "regular expression": Bad({"sites": re.compile("layers")}, LookupError, SITES),
            "predicate": Bad({"sites": lambda site: False}, LookupError, SITES),
        }
    )
    def test_unknown(self, model: nn.Module, bad: Bad) -> None:
        assert isinstance(refused(model, bad.builtin, bad.says, **bad.arguments), UnknownName)

    def test_a_glob_does_not_match_part_of_a_name(self, model: nn.Module) -> None:
        refused(model, LookupError, ("'blocks.0'",), sites="blocks.0")


class TestTypes:
    @bad_cases(
        {
            "strategy None": Bad({"strategy": None}, TypeError, ("strategies()",)),
            "strategy class": Bad({"strategy": TopK}, TypeError, ("Strategy object",)),
            "kernel None": Bad({"kernel": None}, (TypeError, LookupError), ("kernel", "gather")),
            "kernel list": Bad({"kernel": ["gather"]}, (TypeError, LookupError), ("kernel",)),
            "sites int": Bad({"sites": 3}, TypeError, ("glob", "3")),
            "sites None": Bad({"sites": None}, TypeError, ("glob", "None")),
            "sites empty": Bad({"sites": []}, TypeError, ("glob", "[]")),
            "sites of ints": Bad({"sites": [0, 1]}, TypeError, ("glob", "[0, 1]")),
            "sites bytes": Bad({"sites": b"*"}, TypeError, ("glob",)),
            "only_if_faster": Bad(
                {"only_if_faster": "yes"}, TypeError, ("only_if_faster", "'yes'")
            ),
            "prefix_keys": Bad({"prefix_keys": 1}, TypeError, ("prefix_keys", "True or False")),
        }
    )
    def test_wrong_type(self, model: nn.Module, bad: Bad) -> None:
        refused(model, bad.builtin, bad.says, **bad.arguments)

    @pytest.mark.parametrize("thing", ["vit", None, nn.Linear, torch.zeros(1)], ids=str)
    @pytest.mark.parametrize("call", [sparsiattn.patch, sparsiattn.patch_of, sparsiattn.unpatch])
    def test_not_a_module(self, call: Callable[[Any], Any], thing: Any) -> None:
        with pytest.raises(SparsiattnError, match=r"torch\.nn\.Module") as caught:
            call(thing)
        fits(caught.value, TypeError, (type(thing).__name__,))


class TestBudgets:
    @pytest.mark.parametrize(
        "k", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), float("-inf")]
    )
    def test_out_of_range(self, model: nn.Module, k: float) -> None:
        names = [name for name in zoo.ATTENTION if name != "dense"]
        all_refuse(model, ValueError, (BUDGET, repr(k)), names, k=k)

    @pytest.mark.parametrize(
        "k",
        [True, False, "0.5", "11", object(), 1j, torch.tensor(0.5), {SITES[0]: 0.5, SITES[1]: 0.5}],
        ids=["True", "False", "str", "str as long as sites", "object", "complex", "tensor", "dict"],
    )
    def test_wrong_type(self, model: nn.Module, k: Any) -> None:
        refused(model, TypeError, (BUDGET,), strategy="topk", k=k)

    @bad_cases(
        {
            "too long": Bad({"k": [0.1, 0.2, 0.3]}, ValueError, ("one budget per", "2, got 3")),
            "too short": Bad({"k": [0.1]}, ValueError, ("one budget per", "2, got 1")),
            "empty": Bad({"k": []}, ValueError, ("one budget per", "2, got 0")),
            "fewer sites": Bad({"k": [0.1, 0.2], "sites": SITES[0]}, ValueError, ("1, got 2",)),
            "bool inside": Bad({"k": [0.1, True]}, TypeError, (BUDGET, "True")),
            "None inside": Bad({"k": [0.1, None]}, TypeError, (BUDGET, "None")),
            "nan inside": Bad({"k": (float("nan"), 0.1)}, ValueError, (BUDGET, "nan")),
        }
    )
    def test_list(self, model: nn.Module, bad: Bad) -> None:
        refused(model, bad.builtin, bad.says, **bad.arguments)

    @pytest.mark.parametrize(
        ("value", "builtin"),
        [(None, TypeError), ("a", TypeError), (True, TypeError), ([0.5], TypeError),
         (2.0, ValueError), (0, ValueError), (float("nan"), ValueError)],
        ids=repr,
    )  # fmt: skip
    def test_callable_that_returns_nonsense(
        self, model: nn.Module, value: Any, builtin: type[Exception]
    ) -> None:
        refused(model, builtin, (BUDGET, repr(value)), k=lambda site: value)

    @pytest.mark.parametrize("argument", ["k", "sites"])
    def test_callable_that_raises_is_not_hidden(self, model: nn.Module, argument: str) -> None:
        def fail(site: sparsiattn.Site) -> float:
            raise ZeroDivisionError("mine")

        with untouched(model), pytest.raises(ZeroDivisionError, match="mine"):
            sparsiattn.patch(model, **{argument: fail})  # type: ignore[arg-type]

    def test_nonsense_for_the_second_site_only(self, model: nn.Module) -> None:
        refused(model, ValueError, (BUDGET,), k=lambda site: 0.5 if site.index == 0 else 0.0)


class TestOptions:
    @pytest.mark.parametrize(
        "tile",
        [
            0,
            -1,
            2,
            1.5,
            True,
            None,
            "big",
            (0, 2),
            (2,),
            (2, 2, 2, 2),
            (2, 2, 0),
            (2.0, 2),
            (True, 1),
            ("2", "2"),
        ],
        ids=repr,
    )
    def test_tile(self, model: nn.Module, tile: Any) -> None:
        says = ("tile must be 1", "(rows, columns)", "'auto'", repr(tile))
        all_refuse(model, ValueError, says, zoo.ATTENTION, tile=tile)

    @pytest.mark.parametrize("g", [0, -2, 1.5, True, "2", (2, 2), float("nan")], ids=repr)
    def test_background(self, model: nn.Module, g: Any) -> None:
        says = ("background must be None, 'auto' or an int", repr(g))
        all_refuse(model, ValueError, says, zoo.ATTENTION, background=g)

    @pytest.mark.parametrize("value", [0, 1, None, "yes"], ids=repr)
    def test_prefix_keys(self, model: nn.Module, value: Any) -> None:
        refused(model, TypeError, ("prefix_keys", repr(value)), strategy="topk", prefix_keys=value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("tokens_per_basis", 0), ("tokens_per_basis", 0.5), ("tokens_per_basis", float("nan")),
         ("tokens_per_basis", "6"),
         ("basis", 0), ("basis", 1.5), ("basis", True), ("channels", -1),
         ("basis_coef_topk", "8"), ("basis_threshold", -0.1), ("basis_threshold", float("nan")),
         ("basis_threshold", None), ("basis_threshold", "0")],
    )  # fmt: skip
    def test_connectivity(self, model: nn.Module, name: str, value: Any) -> None:
        builtin = (ValueError, TypeError)
        refused(model, builtin, (name, repr(value)), strategy="connectivity", **{name: value})

    @bad_cases(
        {
            "k": Bad({"k": 0.5}, ValueError, ("'k'", "TopK(...)")),
            "k of the same value": Bad({"k": 0.25}, ValueError, ("'k'",)),
            "an option": Bad({"tile": 1}, ValueError, ("'tile'", "TopK(...)")),
            "an unknown one": Bad({"tiles": 1}, ValueError, ("'tiles'",)),
        }
    )
    def test_beside_a_strategy_object(self, model: nn.Module, bad: Bad) -> None:
        refused(model, bad.builtin, bad.says, strategy=TopK(k=0.25), **bad.arguments)


class TestSchedule:
    @bad_cases(
        {
            "unknown site": Bad(
                {"k": {"blocks.0.atn": 0.5}}, LookupError, ("Did you mean 'blocks.0.attn'", *SITES)
            ),
            "site by number": Bad({"k": {0: 0.5}}, LookupError, SITES),
            "no k": Bad({}, ValueError, ('{"k": {site: budget}}',)),
            "k is a list": Bad({"k": [0.5, 0.5]}, ValueError, ('{"k": {site: budget}}', "0.5")),
            "misspelt beside k": Bad({"k": {}, "kk": {}}, (ValueError, LookupError), ("kk",)),
            "out of range": Bad({"k": {SITES[0]: 1.5}}, ValueError, (BUDGET, "1.5")),
            "bool": Bad({"k": {SITES[0]: True}}, TypeError, (BUDGET, "True")),
        }
    )  # fmt: skip
    def test_mapping(self, model: nn.Module, bad: Bad) -> None:
        refused(model, bad.builtin, bad.says, schedule=bad.arguments)

    @pytest.mark.parametrize("schedule", [3, ["k"], object()], ids=["int", "list", "object"])
    def test_neither_mapping_nor_path(self, model: nn.Module, schedule: Any) -> None:
        refused(model, (ValueError, TypeError), ("schedule",), schedule=schedule)

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"k: 0.5", b"null", b"[]", b"\xff\xfe", b'{"k": 0.5}'],
        ids=["empty", "open brace", "yaml", "null", "list", "not text", "k is a number"],
    )
    def test_file(self, model: nn.Module, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "schedule.json"
        path.write_bytes(content)
        refused(model, ValueError, ("schedule",), schedule=path)
        refused(model, ValueError, ("schedule",), schedule=str(path))

    def test_missing_file(self, model: nn.Module, tmp_path: Path) -> None:
        refused(model, ValueError, ("none.json",), schedule=tmp_path / "none.json")
        refused(model, ValueError, (tmp_path.name,), schedule=tmp_path)

    def test_site_that_was_not_selected(self, model: nn.Module) -> None:
        schedule = {"k": {SITES[1]: 0.5}}
        refused(model, LookupError, (repr(SITES[1]),), sites=SITES[0], schedule=schedule)

    def test_strategy_without_a_budget(self, model: nn.Module) -> None:
        schedule = {"k": {SITES[0]: 0.5}}
        refused(model, ValueError, ("'dense'", "the option k"), strategy="dense", schedule=schedule)
