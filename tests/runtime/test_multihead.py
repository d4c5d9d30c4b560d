"""`nn.MultiheadAttention` in all its forms, and what is refused by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.runtime import SparseMultihead
from tests.support import hosts

FAR = float("-inf")


class Pixels(nn.Module):
    """One `nn.MultiheadAttention` over the pixels of an 8 x 8 image; ``call`` says how."""

    def __init__(self, call: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
        nn.init.normal_(self.attention.in_proj_bias)
        self.call = call

    def forward(self, images: Tensor, *args: Any) -> Tensor:
        return self.call(self.attention, self.embed(images).flatten(2).mT * 3, *args)


def patch(model: nn.Module, **options: Any) -> sparsiattn.Patch:
    return sparsiattn.patch(model.eval(), "topk", input=(1, 3, 8, 8), **options)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def banded(n: int = 64) -> Tensor:
    rows = torch.arange(n)
    return (rows[:, None] - rows).abs() > 20  # True forbids


def _padding(x: Tensor) -> Tensor:
    forbidden = torch.zeros(x.shape[0], x.shape[1], dtype=torch.bool, device=x.device)
    forbidden[:, 50:] = True
    return forbidden


def _float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, FAR)


CALLS: dict[str, Callable[..., Tensor]] = {
    "weights_unasked": lambda a, x: a(x, x, x, need_weights=False)[0],
    "weights_ignored": lambda a, x: a(x, x, x)[0],
    "positional": lambda a, x: a(x, x, x, None, True)[0],
    "keywords": lambda a, x: a(query=x, key=x, value=x)[0],
    "cross": lambda a, x: a(x, x[:, :40] + 1, x[:, :40] + 1)[0],
    "three_operands": lambda a, x: a(x, x + 1, x - 1)[0],
    "positions_on_keys": lambda a, x: a(x + 1, x + 1, x)[0],
    "padding": lambda a, x: a(x, x, x, key_padding_mask=_padding(x))[0],
    "float_padding": lambda a, x: a(x, x, x, key_padding_mask=_float(_padding(x)))[0],
    "mask": lambda a, x: a(x, x, x, attn_mask=banded().to(x.device))[0],
    "float_mask": lambda a, x: a(x, x, x, attn_mask=_float(banded().to(x.device)))[0],
    "mask_per_head": lambda a, x: a(
        x, x, x, attn_mask=banded().to(x.device).expand(2 * len(x), -1, -1)
    )[0],
    "both_masks": lambda a, x: a(
        x, x, x, key_padding_mask=_padding(x), attn_mask=banded().to(x.device)
    )[0],
    "causal": lambda a, x: a(
        x, x, x, need_weights=False, is_causal=True,
        attn_mask=torch.ones(64, 64, dtype=torch.bool, device=x.device).triu(1),
    )[0],
    "tokens_first": lambda a, x: a(*(x.transpose(0, 1),) * 3)[0].transpose(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("train", [False, True])
def test_every_form_of_call(name: str, train: bool) -> None:
    model = Pixels(CALLS[name], batch_first=name != "tokens_first").eval()
    x = images()
    with torch.set_grad_enabled(train):
        live = patch(model, k=0.2)
        model.train(train)
        sparse = model(x).detach()
        with live.disabled():
            dense = model(x).detach()
        live.unpatch()
        assert torch.equal(model(x), dense)
        assert not torch.allclose(sparse, dense, atol=1e-4)
        with patch(model, k=1.0) as live:
            model.train(train)
            assert [site.grid[0] * site.grid[1] for site in live.sites] == [64]
            torch.testing.assert_close(model(x).detach(), dense, rtol=1e-5, atol=1e-5)


def test_unbatched_and_other_widths() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 1)
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, bias=False)

        def forward(self, images: Tensor) -> Tensor:
            x = self.embed(images).flatten(2).mT
            return torch.stack([self.attention(y, y[:, :6], y[:, 3:])[0] for y in x])

    model, x = Other().eval(), images()
    with torch.no_grad():
        dense = model(x)
        with patch(model, k=1.0):
            torch.testing.assert_close(model(x), dense, rtol=1e-5, atol=1e-5)
        with patch(model, k=0.2):
            assert not torch.allclose(model(x), dense, atol=1e-4)


def test_padded_keys_are_never_attended_to() -> None:
    def call(attention: nn.Module, x: Tensor, padded: float = 0.0) -> Tensor:
        forbidden = _padding(x)
        x = x.masked_fill(forbidden[..., None], padded)
        return attention(x, x, x, key_padding_mask=forbidden)[0][:, :50]

    model, x = Pixels(call), images()
    with torch.no_grad(), patch(model, k=0.2, background=2):
        torch.testing.assert_close(model(x, 100.0), model(x))


class TestWeights:
    @pytest.mark.parametrize("how", ["returned", "stored", "computed_with", "asked_for_shape"])
    def test_a_host_that_reads_them_is_refused(self, how: str) -> None:
        kept: list[Tensor] = []

        def call(attention: nn.Module, x: Tensor) -> Any:
            out, weights = attention(x, x, x, average_attn_weights=how != "stored")
            if how == "returned":
                return out, weights
            if how == "stored":
                kept.append(weights)
            if how == "asked_for_shape":
                return out * weights.shape[-1]
            return out * weights.sum() if how == "computed_with" else out

        model = Pixels(call)
        with pytest.raises(sparsiattn.NothingToPatch, match="reads its attention weights"):
            patch(model)
        assert type(model.attention) is nn.MultiheadAttention

    def test_a_host_that_asks_later_is_told(self) -> None:
        def call(attention: nn.Module, x: Tensor, want: bool = False) -> Any:
            out = attention(x, x, x, need_weights=want)
            return out if want else out[0]

        model, x = Pixels(call), images()
        with patch(model) as live, torch.no_grad():
            sparse = model(x)
            with pytest.raises(sparsiattn.ModelChanged, match="need_weights"):
                model(x, True)
            with live.disabled():
                assert model(x, True)[1].shape == (2, 64, 64)
            assert torch.equal(model(x), sparse)


class _Subclass(nn.MultiheadAttention):
    pass


def test_what_cannot_be_reached_is_refused_by_name() -> None:
    extra = Pixels(CALLS["weights_unasked"], add_bias_kv=True)
    with pytest.raises(sparsiattn.NothingToPatch, match="not a token"):
        patch(extra)
    zero = Pixels(CALLS["weights_unasked"], add_zero_attn=True)
    with pytest.raises(sparsiattn.NothingToPatch, match="not a token"):
        patch(zero)
    derived = Pixels(CALLS["weights_unasked"])
    derived.attention = _Subclass(8, 2, batch_first=True)
    with pytest.raises(sparsiattn.NothingToPatch, match="a subclass of nn"):
        patch(derived)


def test_only_sites_change_class_and_only_while_patched() -> None:
    model = hosts.build("torchvision")
    before = model.state_dict().keys()
    kinds = [type(module) for module in model.modules()]
    with sparsiattn.patch(model, "topk", sites="*layer_1*") as live:
        assert [type(runtime.module) for runtime in live.runtimes] == [SparseMultihead]
        assert sum(isinstance(m, SparseMultihead) for m in model.modules()) == 1
        assert model.state_dict().keys() == before
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_with_padding(norm_first: bool) -> None:
    """Its layers have a fused path of their own, and nested tensors for padded batches. torch
    leaves the former where a hook hangs, so ``disabled()`` with a mask is equal up to rounding."""
    options: dict[str, Any] = {"norm_first": True} if norm_first else {}
    model, x = hosts.Encoder(**options).eval(), hosts.images()
    padding = torch.zeros(2, 64, dtype=torch.bool)
    padding[1, 48:] = True
    with torch.no_grad():
        dense, padded = model(x), model(x, src_key_padding_mask=padding)
        live = sparsiattn.patch(model, "topk", k=1.0, input=(1, 3, 32, 32))
        torch.testing.assert_close(model(x), dense, rtol=1e-5, atol=1e-5)
        mine = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(mine[~padding], padded[~padding], rtol=1e-5, atol=1e-5)
        with live.disabled():
            assert torch.equal(model(x), dense)
            host = model(x, src_key_padding_mask=padding)
            torch.testing.assert_close(host[~padding], padded[~padding], rtol=1e-6, atol=1e-6)
        live.unpatch()
        assert torch.equal(model(x, src_key_padding_mask=padding), padded)


def test_half_precision_and_autocast() -> None:
    model, x = Pixels(CALLS["both_masks"]), images()
    with torch.no_grad(), patch(model, k=0.5):
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(x).float() - exact).abs().max() < 0.1 * exact.abs().max()
        model.to(torch.bfloat16)
        assert model(x.bfloat16()).dtype == torch.bfloat16


def test_threads_do_not_see_each_other() -> None:
    model, x, wrong = hosts.build("torchvision"), hosts.images(), []
    with torch.no_grad():
        dense = model(x)
        live = sparsiattn.patch(model, "topk", k=0.1)
        sparse = model(x)

    def serve(disabled: bool) -> None:
        for _ in range(30):
            with torch.no_grad():
                if disabled:
                    with live.disabled():
                        right = torch.equal(model(x), dense)
                else:
                    right = torch.equal(model(x), sparse)
            if not right:
                wrong.append(disabled)

    workers = [threading.Thread(target=serve, args=(i % 2 == 0,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    live.unpatch()
    assert wrong == []
