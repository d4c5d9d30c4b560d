"""Models that change under their patch: right is what a patch on the changed model gives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import sparsiattn

STRATEGIES: dict[str, dict[str, Any]] = {
    "token_drop": {"keep": 0.5},
    "token_merge": {"r": 5},
    "learned": {"strategy": "token_drop", "keep": 0.5, "score": "learned"},
    "topk": {"k": 0.25},
    "local": {},
}


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    fixed = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    model = VisionTransformer(**{**fixed, "num_classes": 5, **options}).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, 0, 0.15)
    return model


def images(side: int = 48) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def patched(model: nn.Module, name: str, **options: Any) -> sparsiattn.Patch:
    return sparsiattn.patch(model, **{"strategy": name, **STRATEGIES[name], **options})


def new_head(model: Any) -> None:
    model.head = nn.Identity()


def mean_of_all(model: Any) -> None:
    model.global_pool, model.pool_include_prefix = "avg", True


CHANGES: dict[str, Callable[[Any], Any]] = {
    "no head, no pooling": lambda m: m.reset_classifier(0, ""),
    "no head, average": lambda m: m.reset_classifier(0, "avg"),
    "average": lambda m: m.reset_classifier(7, "avg"),
    "maximum": lambda m: m.reset_classifier(7, "max"),
    "class token again": lambda m: m.reset_classifier(7, "token"),
    "pooling alone": lambda m: setattr(m, "global_pool", "avg"),
    "head replaced": new_head,
    "average with the class token": mean_of_all,
    "larger images": lambda m: m.set_input_size((64, 64)),
    "no square": lambda m: m.set_input_size((32, 64)),
    "checkpointing": lambda m: m.set_grad_checkpointing(True),
}


FEW = ("no head, no pooling", "average", "larger images")


@pytest.mark.parametrize(
    ("name", "change"),
    [(n, c) for n in ("token_drop", "token_merge") for c in CHANGES]
    + [(n, c) for n in ("learned", "topk", "local") for c in FEW],
)
def test_patched_then_changed_is_changed_then_patched(name: str, change: str) -> None:
    model, other = vit(), vit()
    patch = patched(model, name)
    with torch.no_grad():
        model(images())
    torch.manual_seed(3)  # of a new head
    CHANGES[change](model)
    CHANGES[change](other)
    known = {n: t for n, t in model.state_dict().items() if ".sparsiattn." not in n}
    other.load_state_dict(known)
    model.eval()
    expected = patched(other.eval(), name)
    shape = expected.report().input_shape
    x = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, right = model(x), other(x)
    assert y.shape == right.shape
    torch.testing.assert_close(y, right)
    assert str(patch.report()) == str(expected.report())


@pytest.mark.parametrize(
    "change",
    ["pooling alone", pytest.param("no head, no pooling", marks=pytest.mark.slow)],
)
def test_a_compiled_model_notices_as_well(change: str) -> None:
    model, other = vit(), vit()
    patched(model, "token_merge")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(images())
        CHANGES[change](model)
        CHANGES[change](other)
        other.load_state_dict(model.state_dict())
        patched(other, "token_merge")
        torch.testing.assert_close(compiled(images()), other(images()))
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["token_drop", "token_merge"])
def test_an_input_that_was_given_goes_with_the_model(name: str) -> None:
    model, other = vit(), vit()
    patched(model, name, input=(1, 3, 48, 48))
    for host in (model, other):
        host.set_input_size((64, 64))
    other.load_state_dict(model.state_dict())
    patched(other, name)
    with torch.no_grad():
        torch.testing.assert_close(model(images(64)), other(images(64)))


def test_restore_none_is_refused_by_name_where_it_no_longer_fits() -> None:
    model = vit()
    patched(model, "token_merge", restore=None)
    model.reset_classifier(0, "")
    with pytest.raises(sparsiattn.ModelChanged, match="unpatch"):
        model(images())
    sparsiattn.unpatch(model)
    assert model(images()).shape == (3, 37, 24)


def test_a_model_that_stays_is_not_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    patched(model, "token_merge")
    calls: list[Any] = []
    monkeypatch.setattr(
        "sparsiattn.patching.replan.plan_again", lambda *args, **kwargs: calls.append(args)
    )
    for mode in (True, False, True):
        model.train(mode)(images())
        model.counter = len(calls)
    copy.deepcopy(model)(images())
    pickle.loads(pickle.dumps(model))(images())
    assert not calls


class FunctionalDepth(nn.Module):
    """Stochastic depth as a function, whose rate is set later."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            block.norm1, block.attn, block.norm2, block.mlp,
        )  # fmt: skip
        self.rate = 0.0

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + nn.functional.dropout(self.mlp(self.norm2(x)), self.rate, self.training)


def test_attention_that_is_not_fused_is_still_as_patched() -> None:
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    patch = patched(model, "token_merge")
    with torch.no_grad():
        before = model(images())
        with patch.disabled():
            model(images())
        assert torch.equal(model(images()), before)


def test_a_rate_that_is_set_later_is_noticed_in_training() -> None:
    model = vit()
    model.blocks = nn.Sequential(*map(FunctionalDepth, model.blocks))
    patched(model, "token_drop", layers=[3])
    model.train()(images())
    model.blocks[3].rate = 1.0
    with pytest.raises(sparsiattn.ModelChanged, match="unpatch"):
        model(images())
    sparsiattn.unpatch(model)
    dense = model(images())
    patched(model, "token_drop", layers=[3])
    torch.testing.assert_close(model(images()), dense)


MOMENTS = ("with gradients", "inside a pass", "between blocks")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "deepcopy") for n in ("connectivity", "token_drop", "token_merge", "learned", "hybrid")]
    + [("learned", "average")],
)
def test_copies_at_any_moment_of_training(name: str, moment: str, kind: str) -> None:
    model = vit().train()
    options = STRATEGIES.get(name, {"only_if_faster": False} if name == "hybrid" else {})
    sparsiattn.patch(model, **{"strategy": name, **options})
    copies: list[nn.Module] = []

    def copied(*_: Any) -> None:
        if not copies:
            copies.append(copy.deepcopy(model) if kind == "deepcopy" else AveragedModel(model))

    places = {"inside a pass": model.blocks[2].mlp, "between blocks": model.blocks[2]}
    if moment in places:
        places[moment].register_forward_hook(copied)
    out = model(images())
    if moment == "with gradients":
        out.square().sum().backward()
    copied()
    (other,) = copies
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images()), model.eval()(images()))
    if kind == "average":
        other.update_parameters(model)
    other.train()(images()).square().sum().backward()
    trained = [w for w in other.parameters() if w.requires_grad]
    assert any(w.grad is not None for w in trained)
