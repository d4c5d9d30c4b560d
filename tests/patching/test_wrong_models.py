"""Models that cannot be patched, are patched already or changed since: one clear error each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import AlreadyPatched, ModelChanged, NothingToPatch, ProbeFailed, SparsiattnError
from tests.support import zoo
from tests.support.refusals import SITES, fits, refused, traces, untouched


@pytest.fixture
def model() -> nn.Module:
    """Attention written out by hand until a patch switches it: more that must be put back."""
    return zoo.build("vit_unfused")


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
        error = refused(model, RuntimeError, ("dry run", "this input="), input=given)
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
            fits(caught.value, RuntimeError, ("unpatch()", "connectivity"))

    @pytest.mark.parametrize("strategy", ["connectivity", "topk"])
    def test_a_wrapper_of_a_patched_model(self, model: nn.Module, strategy: str) -> None:
        outer = nn.Sequential(model)
        with untouched(model), sparsiattn.patch(model, strategy, k=0.3) as live:
            with still_patched(model, live), pytest.raises(SparsiattnError) as caught:
                sparsiattn.patch(outer, "topk", k=0.1, input=(1, 3, 32, 32))
            fits(caught.value, RuntimeError, ("unpatch()",))

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
            fits(caught.value, RuntimeError, ("blocks.0.attn", "unpatch()"))
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
