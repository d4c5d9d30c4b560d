"""Bad input: one clear error each, and the model as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import (
    AlreadyPatched,
    AttentionInputs,
    KernelRefused,
    ModelChanged,
    NothingToPatch,
    Pattern,
    ProbeFailed,
    SparsiattnError,
    Strategy,
    UnknownName,
)
from sparsiattn.strategies import TopK
from sparsiattn.testing import temporary_plugin
from tests.support import zoo

SITES = ("blocks.0.attn", "blocks.1.attn")
BUDGET = "float in (0, 1]"
Builtin = type[Exception] | tuple[type[Exception], ...]


@pytest.fixture
def model() -> nn.Module:
    """Attention written out by hand until a patch switches it: more that must be put back."""
    return zoo.build("vit_unfused")


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
def untouched(model: nn.Module, shape: tuple[int, ...] = (1, 3, 32, 32)) -> Iterator[None]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        output, state, marks = model(x), copy.deepcopy(model.state_dict()), traces(model)
        yield
        assert sparsiattn.patch_of(model) is None
        assert traces(model) == marks
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
        assert torch.equal(model(x), output)


def refused(
    model: nn.Module, builtin: Builtin, says: tuple[str, ...] = (), **arguments: Any
) -> SparsiattnError:
    """The error of a call of `patch` that must fail; the model must not show that it was made."""
    with untouched(model), pytest.raises(SparsiattnError) as caught:
        sparsiattn.patch(model, **arguments)
    _fits(caught.value, builtin, says)
    return caught.value


def all_refuse(
    model: nn.Module, builtin: Builtin, says: tuple[str, ...], names: Iterable[str], **options: Any
) -> None:
    """As `refused`, for several strategies in a row."""
    with untouched(model):
        for name in names:
            with pytest.raises(SparsiattnError) as caught:
                sparsiattn.patch(model, name, **options)
            _fits(caught.value, builtin, says)


def _fits(error: Exception, builtin: Builtin, says: tuple[str, ...]) -> None:
    assert isinstance(error, builtin)
    for part in says:
        assert part in str(error)


class Bad(NamedTuple):
    """Arguments of `patch`, the built-in exception they must raise and what the message says."""

    arguments: dict[str, Any]
    builtin: Builtin
    says: tuple[str, ...] = ()


def _cases(cases: dict[str, Bad]) -> Any:
    return pytest.mark.parametrize("bad", cases.values(), ids=cases.keys())


class TestNames:
    @_cases(
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
                {"strategy": "topk", "channels": 4},
                LookupError,
                ("'topk'", "'channels'", "background"),
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
    @_cases(
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
        _fits(caught.value, TypeError, (type(thing).__name__,))


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

    @_cases(
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
            (2, 2, 2),
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
        says = ("background must be None or an int", repr(g))
        all_refuse(model, ValueError, says, zoo.ATTENTION, background=g)

    @pytest.mark.parametrize("value", [0, 1, None, "yes"], ids=repr)
    def test_prefix_keys(self, model: nn.Module, value: Any) -> None:
        refused(model, TypeError, ("prefix_keys", repr(value)), strategy="topk", prefix_keys=value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("tokens_per_basis", 0), ("tokens_per_basis", 0.5),
         ("tokens_per_basis", float("nan")), ("tokens_per_basis", "6"),
         ("basis", 0), ("basis", 1.5), ("basis", True), ("channels", -1),
         ("basis_coef_topk", "8"), ("basis_threshold", -0.1), ("basis_threshold", float("nan")),
         ("basis_threshold", None), ("basis_threshold", "0")],
    )  # fmt: skip
    def test_connectivity(self, model: nn.Module, name: str, value: Any) -> None:
        builtin = (ValueError, TypeError)
        refused(model, builtin, (name, repr(value)), strategy="connectivity", **{name: value})

    @_cases(
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
    @_cases(
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
        refused(model, ValueError, ("'dense'", "no k"), strategy="dense", schedule=schedule)


class _CNN(nn.Module):
    pretrained_cfg = {"input_size": (3, 32, 32)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class _SizelessViT(nn.Module):
    """Has attention that can be reached, but nothing says what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.build("vit")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class TestModels:
    @pytest.mark.parametrize("given", [None, (1, 3, 32, 32)], ids=["own size", "given size"])
    def test_no_attention(self, given: Any) -> None:
        error = refused(_CNN().eval(), LookupError, ("_CNN", "no attention"), input=given)
        assert isinstance(error, NothingToPatch)

    def test_attention_that_is_left_alone_is_named_with_the_reason(self) -> None:
        model = zoo.build("vit_map_pool")
        model.blocks = nn.Sequential()
        refused(model, LookupError, ("attn_pool", "single query"))

    def test_no_input_size(self) -> None:
        model = _SizelessViT()
        refused(model, ValueError, ("_SizelessViT", "pass input=(1, channels, height, width)"))
        with sparsiattn.patch(model, input=(1, 3, 32, 32)) as live:
            assert len(live.sites) == 2

    @pytest.mark.parametrize(
        "given",
        [224, 1.5, object(), "224", (3, 32), (), (1, 3, 0, 32), (1, 3, -32, 32), (1, 3, 32.0, 32.0),
         (1, 3, None, None), torch.zeros(32, 32)],
        ids=["int", "float", "object", "str", "too short", "empty", "zero", "negative", "floats",
             "None inside", "2-D tensor"],
    )  # fmt: skip
    def test_input_that_is_no_shape(self, model: nn.Module, given: Any) -> None:
        says = ("input must be (1, channels, height, width) or an example tensor",)
        refused(model, (ValueError, TypeError), says, input=given)

    @pytest.mark.parametrize("given", [(1, 1, 32, 32), (1, 3, 33, 33), torch.zeros(1, 3, 31, 32)])
    def test_input_that_the_model_does_not_take(self, model: nn.Module, given: Any) -> None:
        error = refused(model, RuntimeError, ("dry run", "Pass input="), input=given)
        assert isinstance(error, ProbeFailed)
        assert error.__cause__ is not None

    def test_a_member_of_our_name_is_not_overwritten(self, model: nn.Module) -> None:
        model.blocks[1].attn.sparsiattn = nn.Identity()
        refused(model, ValueError, (SITES[1], "'sparsiattn'"))


@contextmanager
def still_patched(model: nn.Module, live: sparsiattn.Patch) -> Iterator[None]:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before, marks = model(x), traces(model)
        yield
        assert sparsiattn.patch_of(model) is live
        assert traces(model) == marks
        assert torch.equal(model(x), before)


class TestTwice:
    @pytest.mark.parametrize("strategy", ["connectivity", "topk"])
    def test_patch(self, model: nn.Module, strategy: str) -> None:
        with untouched(model), sparsiattn.patch(model, k=0.3) as live:
            with still_patched(model, live), pytest.raises(AlreadyPatched) as caught:
                sparsiattn.patch(model, strategy, k=0.5)
            _fits(caught.value, RuntimeError, ("unpatch()", "connectivity"))

    @pytest.mark.parametrize("strategy", ["connectivity", "topk"])
    def test_a_wrapper_of_a_patched_model(self, model: nn.Module, strategy: str) -> None:
        outer = nn.Sequential(model)
        with untouched(model), sparsiattn.patch(model, strategy, k=0.3) as live:
            with still_patched(model, live), pytest.raises(SparsiattnError) as caught:
                sparsiattn.patch(outer, "topk", k=0.1, input=(1, 3, 32, 32))
            _fits(caught.value, RuntimeError, ("unpatch()",))

    def test_undone_patch_reports_and_saves_nothing(self, model: nn.Module, tmp_path: Path) -> None:
        live = sparsiattn.patch(model)
        live.unpatch()
        with untouched(model):
            with pytest.raises(ModelChanged, match=r"report\(\) needs a live patch"):
                live.report()
            with pytest.raises(ModelChanged, match=r"save\(\) needs a live patch"):
                live.save(tmp_path / "saved")
            live.unpatch()
        assert not (tmp_path / "saved").exists()


def _replace_site(model: Any) -> None:
    model.blocks[0].attn = copy.deepcopy(zoo.build("vit_unfused").blocks[0].attn)


def _delete_site(model: Any) -> None:
    del model.blocks[0].attn


def _replace_block(model: Any) -> None:
    model.blocks[0] = zoo.build("vit_unfused").blocks[0]


def _drop_first_block(model: Any) -> None:
    model.blocks = model.blocks[1:]


def _replace_all_blocks(model: Any) -> None:
    model.blocks = zoo.build("vit_unfused").blocks


@pytest.mark.parametrize("strategy", ["connectivity", "topk"])
@pytest.mark.parametrize(
    "change",
    [_replace_site, _delete_site, _replace_block, _drop_first_block, _replace_all_blocks],
    ids=lambda change: change.__name__.strip("_"),
)
class TestChangedModel:
    def test_forward_report_and_save_refuse(
        self, model: nn.Module, tmp_path: Path, change: Callable[[Any], None], strategy: str
    ) -> None:
        live = sparsiattn.patch(model, strategy)
        change(model)
        calls = [
            lambda: model(torch.randn(1, 3, 32, 32)),
            live.report,
            lambda: live.save(tmp_path / "saved"),
        ]
        for call in calls:
            with pytest.raises(ModelChanged) as caught:
                call()
            _fits(caught.value, RuntimeError, ("blocks.0.attn", "unpatch()"))
        assert not (tmp_path / "saved").exists()

    def test_unpatch_restores_the_rest(
        self, model: nn.Module, change: Callable[[Any], None], strategy: str
    ) -> None:
        twin = copy.deepcopy(model)
        taken = model.blocks[0].attn
        live = sparsiattn.patch(model, strategy)
        change(model)
        change(twin)
        live.unpatch()
        assert sparsiattn.patch_of(model) is None
        assert list(model.state_dict()) == list(twin.state_dict())
        hooked = [m for m in (*model.modules(), *taken.modules()) if _hooks(m)]
        assert hooked == []
        assert "sparsiattn" not in taken._modules
        assert taken.fused_attn is False
        if change is not _delete_site:
            _same_output(model, twin)


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def _same_output(one: nn.Module, other: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


@dataclass(frozen=True)
class Positive(Strategy):
    """Pairs with a positive logit: a mask, so nothing that gathers keys can compute it."""

    name = "positive"

    def plan(self, inputs: AttentionInputs) -> Pattern:
        return Pattern.mask(inputs.logits() > 0)


@dataclass(frozen=True)
class Faulty(Strategy):
    """Wrong in the way that ``fault`` says."""

    name = "faulty"
    fault: str = "planner"

    def planner(self, site: sparsiattn.Site) -> Any:
        if self.fault == "planner" and site.index == 1:
            raise ZeroDivisionError("in planner")
        return super().planner(site)

    def plan(self, inputs: AttentionInputs) -> Any:
        if self.fault == "tensor":
            return inputs.logits() > 0
        return Pattern.top(inputs.logits()[..., :-1], 0.5)


class TestKernels:
    def test_named_kernel_refuses_and_never_falls_back(self, model: nn.Module) -> None:
        """Known at patch time, so said there, with the model untouched."""
        with untouched(model), temporary_plugin(strategies=[Positive]):
            with pytest.raises(KernelRefused) as caught:
                sparsiattn.patch(model, "positive", kernel="gather")
            says = (
                "gather: needs key lists, got a Mask",
                SITES[0],
                "kernel='auto'",
                "torch.float32",
            )
            _fits(caught.value, RuntimeError, says)
            assert "sdpa" not in str(caught.value)

    def test_refusal_at_patch_time(self, model: nn.Module) -> None:
        with temporary_plugin(strategies=[Positive]):
            says = ("gather: needs key lists", SITES[0])
            options = {"strategy": "positive", "kernel": "gather", "only_if_faster": True}
            refused(model, RuntimeError, says, **options)

    def test_auto_takes_another(self, model: nn.Module) -> None:
        with temporary_plugin(strategies=[Positive]), sparsiattn.patch(model, "positive") as live:
            model(torch.randn(1, 3, 32, 32))
            choice = live.runtimes[0].last_choice
        assert choice is not None
        assert choice.kernel.name != "gather"
        assert dict(choice.refusals)["gather"] == ("needs key lists, got a Mask pattern",)

    @pytest.mark.parametrize("kernel", ["gather", "sdpa"])
    def test_host_mask_that_a_kernel_cannot_serve(self, kernel: str) -> None:
        """Swin's shifted windows give every query its own summary keys."""
        model = zoo.build("swin")
        refused = pytest.raises(KernelRefused, match=f"{kernel}: background keys differ")
        with untouched(model, (2, 3, 64, 64)), refused:
            sparsiattn.patch(model, "topk", k=0.25, background=2, kernel=kernel)


class TestFaultyStrategies:
    def test_a_planner_that_raises_leaves_the_model_alone(self, model: nn.Module) -> None:
        with untouched(model), pytest.raises(ZeroDivisionError, match="in planner"):
            sparsiattn.patch(model, Faulty())

    def _error(self, model: nn.Module, strategy: Strategy, kind: type[Exception]) -> Exception:
        """What a forward pass of the patched model raises."""
        x = torch.randn(1, 3, 32, 32)
        with untouched(model), sparsiattn.patch(model, strategy), pytest.raises(kind) as caught:
            model(x)
        return caught.value

    def test_a_pattern_of_the_wrong_size(self, model: nn.Module) -> None:
        error = self._error(model, Faulty(fault="size"), SparsiattnError)
        _fits(error, ValueError, (SITES[0], "65 keys", "over 64"))

    def test_a_plan_that_is_no_pattern(self, model: nn.Module) -> None:
        error = self._error(model, Faulty(fault="tensor"), SparsiattnError)
        _fits(error, TypeError, ("Pattern", "Tensor"))

    def test_a_strategy_that_plans_nothing(self, model: nn.Module) -> None:
        error = self._error(model, Strategy(), NotImplementedError)
        assert "must override plan(inputs)" in str(error)


@pytest.mark.parametrize("leaf", SparsiattnError.__subclasses__(), ids=lambda leaf: leaf.__name__)
def test_every_leaf_is_exported_and_is_a_builtin_error_too(leaf: type[SparsiattnError]) -> None:
    assert getattr(sparsiattn, leaf.__name__) is leaf
    builtin = (LookupError, ValueError, TypeError, RuntimeError, OSError, ArithmeticError)
    assert issubclass(leaf, builtin)
