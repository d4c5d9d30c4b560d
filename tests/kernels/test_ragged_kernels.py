"""Kernels for ragged batches and paged key blocks, as far as a machine without a GPU can tell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsiattn import Kernel, Pattern
from sparsiattn.attention import KeyBlocks, Lengths, sdpa
from sparsiattn.kernels import MaskedSDPA, Reference, Varlen, XFormers, optional, paged, varlen
from sparsiattn.kernels import xformers as fmha
from sparsiattn.kernels.varlen import Shim
from sparsiattn.kernels.xformers import Operators
from sparsiattn.testing import random_inputs
from tests.support.flex_calls import flex_call

LENGTHS = (4, 9, 4, 4)
CPU = "needs CUDA tensors, got cpu"


def packed_call() -> tuple[Any, Lengths]:
    inputs = random_inputs((4, 5), dtype=torch.float32, batch=1)
    return inputs.replace(scale=0.3), Lengths(21, 21, LENGTHS)


def by_image(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float | None) -> Tensor:
    """What `varlen_attn` computes on ``[N, H, D]``."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    bounds = ends.tolist()
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    outs = [
        F.scaled_dot_product_attention(q[:, at], k[:, at], v[:, at], scale=scale) for at in parts
    ]
    return torch.cat(outs, dim=1).transpose(0, 1)


@pytest.mark.parametrize("kernel", [Reference(), MaskedSDPA()], ids=lambda k: k.name)
def test_nan_stays_in_its_image(kernel: Kernel) -> None:
    inputs, pattern = packed_call()
    whole = kernel(inputs, pattern)
    broken = [x.clone() for x in (inputs.q, inputs.k, inputs.v)]
    for x in broken:
        x[..., 4:13, :] = torch.nan
    found = kernel(inputs.replace(q=broken[0], k=broken[1], v=broken[2]), pattern)
    assert found[..., 4:13, :].isnan().all()
    for rows in (slice(4), slice(13, 21)):
        torch.testing.assert_close(found[..., rows, :], whole[..., rows, :])


def test_no_plan_of_cudnn_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it plans each shape anew, and lengths seldom come again."""
    seen: list[tuple[str, bool]] = []

    def attention(q: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append((q.device.type, torch.backends.cuda.cudnn_sdp_enabled()))
        return torch.empty_like(q)

    monkeypatch.setattr(sdpa, "_original", attention)
    inputs, pattern = packed_call()
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        MaskedSDPA()(inputs, pattern)
        with FakeTensorMode():
            there = [torch.empty(1, 3, 21, 8, device="cuda") for _ in range(3)]
            call = inputs.replace(q=there[0], k=there[1], v=there[2])
            MaskedSDPA()(call, pattern)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # the user's choice
                MaskedSDPA()(call, pattern)
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    # images of 4 and of 9 tokens: two calls each
    assert seen == [("cpu", True)] * 2 + [("cuda", False)] * 2 + [("cuda", True)] * 2


def test_lengths_are_copied_to_a_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers of a model have the same ones, and a CUDA graph must not copy."""
    cpu, waits = torch.device("cpu"), []
    monkeypatch.setattr(varlen.geometry, "wait_for_values", waits.append)
    varlen.ends_of.cache_clear()
    with torch.inference_mode():
        ends = varlen.ends_of(LENGTHS, cpu)
    assert ends.tolist() == [0, 4, 13, 17, 21]
    assert not ends.is_inference()
    assert varlen.ends_of(LENGTHS, cpu) is ends
    masks = [fmha._images(Seqlens, LENGTHS, cpu) for _ in range(2)]
    assert masks[0] is masks[1]
    assert waits == [cpu] * 2
    varlen.ends_of.cache_clear()
    fmha._images.cache_clear()


def test_what_a_cuda_graph_reads_is_not_evicted(
    biases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[Any, object]] = []
    monkeypatch.setattr(varlen, "shim", lambda: Shim(TestVarlen.second))
    monkeypatch.setattr(fmha, "probe", lambda: Operators(computing(biases), ""))
    monkeypatch.setattr(varlen.geometry, "_hold", lambda key, built: held.append((key, built)))
    calls = [(Varlen(), *packed_call()), (XFormers(), *packed_call())]
    calls.append((XFormers(), *flex_call(block=(4, 4))))
    for kernel, inputs, pattern in calls:
        kernel(inputs, pattern)
    assert held == []
    monkeypatch.setattr(varlen.geometry, "_is_capturing", lambda device: True)
    for kernel, inputs, pattern in calls:
        held.clear()
        kernel(inputs, pattern)
        names = {key[0][0] for key, _ in held if isinstance(key[0], tuple)}
        assert names == {"pages" if isinstance(pattern, KeyBlocks) else kernel.name}


class Seqlens:
    """In the place of xformers' mask."""

    @classmethod
    def from_seqlens(cls, lengths: list[int], *, device: torch.device) -> Seqlens:
        assert lengths == [*LENGTHS]
        return cls()


class TestVarlen:
    """torch's function in the forms it has had."""

    @staticmethod
    def first(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
        max_q: int, max_k: int, is_causal: bool = False, return_aux: Any = None,
    ) -> Tensor:  # fmt: skip
        assert (is_causal, return_aux, max_q, max_k) == (False, None, 9, 9)
        assert torch.equal(cu_seq_q, cu_seq_k)
        return by_image(query, key, value, cu_seq_q, None)

    @staticmethod
    def second(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
        max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert (window_size, return_aux) == ((-1, -1), None)
        assert scale == 0.3
        return by_image(query, key, value, cu_seq_q, scale)

    @staticmethod
    def third(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None,
        max_q: int, max_k: int, *, scale: float | None = None, block_table: Any = None,
        **others: Any,
    ) -> Tensor:  # fmt: skip
        assert (block_table, others) == (None, {})
        return by_image(query, key, value, cu_seq_q, scale)

    @pytest.mark.parametrize("form", ["first", "second", "third"])
    def test_every_form_equals_the_reference(
        self, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        function: Callable[..., Tensor] = getattr(self, form)
        monkeypatch.setattr(varlen, "shim", lambda: Shim(function))
        inputs, pattern = packed_call()
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        call = inputs.replace(q=leaves[0], k=leaves[1], v=leaves[2])
        out, exact = Varlen()(call, pattern), Reference()(call, pattern)
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        ours, theirs = (torch.autograd.grad((x * weight).sum(), leaves) for x in (out, exact))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    def test_the_installed_form_is_understood(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        found = varlen.shim()
        assert found is not None
        assert found.function is varlen_attn
        inputs, pattern = packed_call()
        half = inputs.replace(q=inputs.q.half(), k=inputs.k.half(), v=inputs.v.half())
        # bound to torch's signature, and refused no sooner than where a GPU is needed
        with pytest.raises((NotImplementedError, RuntimeError), match="flash_attention_forward"):
            Varlen()(half, pattern)

    def test_refusals_are_exact(self) -> None:
        inputs, pattern = packed_call()
        start = Varlen().why_unavailable()
        assert Varlen().why_not(inputs.replace(dropout=0.1, scale=0.0), pattern) == [
            *start, CPU, "needs half precision, got torch.float32", "does not support dropout",
            "needs a positive scale, got 0.0",
        ]  # fmt: skip
        odd = random_inputs((4, 5), dim=6, dtype=torch.float16)
        masked = odd.replace(bias=torch.zeros(1, 1, 21, 21))
        assert Varlen().why_not(masked, Pattern.dense(21, 21)) == [
            *start, "needs images packed by length, got a Dense pattern", CPU,
            "does not support the model's mask",
            "needs head dims that are equal and a multiple of 8",
        ]  # fmt: skip


class TestProbe:
    """Missing and mismatched wheels are one line each, and nothing on stderr."""

    def test_it_is_quiet_and_says_one_line(self) -> None:
        code = (
            "from sparsiattn.kernels.xformers import probe; import sys\n"
            "assert 'xformers' not in sys.modules and 'triton' not in sys.modules\n"
            "found = probe(); print(found.ops is None, found.reason)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        assert len(done.stdout.splitlines()) == 1
        if done.stdout.startswith("True"):
            assert "xformers" in done.stdout
            assert "mslk" in done.stdout

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            (None, "fake_fmha is not installed"),
            ("import fake_fmha_needs_this",
             "fake_fmha needs fake_fmha_needs_this, which is not installed"),
            ("raise OSError('libcudart.so.12: cannot open\\nmore')",
             "fake_fmha cannot be imported (libcudart.so.12: cannot open)"),
            ("raise AttributeError", "fake_fmha cannot be imported (AttributeError)"),
            ("import warnings, logging\nwarnings.warn('old')\n"
             "logging.getLogger('fake_fmha').warning('built for another torch')", ""),
        ],
    )  # fmt: skip
    def test_every_way_to_fail(
        self, source: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        if source is not None:
            (tmp_path / "fake_fmha.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        found = fmha._load("fake_fmha")
        sys.modules.pop("fake_fmha", None)
        assert found.reason == reason
        assert (found.ops is None) == bool(reason)
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("available", "reason"),
        [
            ((True, True), ""),
            ((False, True), ""),
            ((False, False),
             "xformers has no attention operator for this torch (built for CUDA 1208)"),
        ],
    )  # fmt: skip
    def test_its_operators_decide_and_not_its_extension(
        self, available: tuple[bool, bool], reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A wheel for another CUDA version still calls the operators of torch."""
        broken = SimpleNamespace(_cpp_library_load_exception=RuntimeError("built for CUDA 1208\n"))
        monkeypatch.setitem(sys.modules, "xformers._cpp_lib", broken)
        operators = (
            SimpleNamespace(FwOp=SimpleNamespace(is_available=lambda answer=answer: answer))
            for answer in available
        )
        ops = SimpleNamespace(**dict(zip(("flash", "cutlass"), operators, strict=True)))
        monkeypatch.setattr(optional.importlib, "import_module", lambda home: ops)
        found = fmha._load("xformers.ops.fmha")
        assert found == Operators(None if reason else ops, reason)
        monkeypatch.setattr(fmha, "probe", lambda: found)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert XFormers().why_unavailable() == [reason] * bool(reason)
        assert XFormers().why_not(*packed_call()) == [reason] * bool(reason) + [CPU]

    def test_the_installed_xformers_calls_operators_of_torch(self, biases: Any) -> None:
        """Whatever CUDA version its extension was compiled for."""
        found = fmha._load("xformers.ops.fmha")
        assert found.reason == ""
        assert found.ops.attn_bias is biases

    def test_the_second_home_is_asked_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ops = SimpleNamespace()
        answers = {fmha.HOMES[0]: Operators(None, "xformers is not installed"),
                   fmha.HOMES[1]: Operators(ops, "")}  # fmt: skip
        monkeypatch.setattr(fmha, "_load", answers.__getitem__)
        assert fmha.probe.__wrapped__() == Operators(ops, "")
        answers[fmha.HOMES[1]] = Operators(None, "mslk is not installed")
        both = "xformers is not installed; mslk is not installed"
        assert fmha.probe.__wrapped__() == Operators(None, both)


@pytest.fixture(scope="module")
def biases() -> Any:
    """xformers' classes of masks: they need no GPU to be looked at."""
    pytest.importorskip("xformers")
    with optional.silence("xformers"):
        return pytest.importorskip("xformers.ops.fmha").attn_bias


def computing(biases: Any) -> SimpleNamespace:
    """xformers' interface over plain torch, by the masks that it would be given."""

    def logits(q: Tensor, k: Tensor, attn_bias: Any, scale: float) -> Tensor:
        pages = getattr(attn_bias, "block_tables", None)
        width = k.shape[1] if pages is None else pages.numel() * attn_bias.page_size
        mask = attn_bias.materialize((1, 1, q.shape[1], width))
        # it shows no page after the last that is in use
        mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]), value=float("-inf"))
        return q.transpose(1, 2) @ k.transpose(1, 2).mT * scale + mask

    def whole(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, p: float, scale: float) -> Tensor:
        weights = logits(q, k, attn_bias, scale).softmax(-1)
        return (weights @ v.transpose(1, 2)).transpose(1, 2)

    def partial(
        q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: float, op: Any
    ) -> tuple[Tensor, Tensor]:
        assert attn_bias.page_size % op["block_n"] == 0
        out = whole(q, k, v, attn_bias, 0.0, scale)
        return out, logits(q, k, attn_bias, scale).logsumexp(-1)

    operator = SimpleNamespace(get_operator=lambda split, **settings: settings)
    return SimpleNamespace(
        attn_bias=biases, triton_splitk=SimpleNamespace(FwOp=operator),
        memory_efficient_attention=whole, memory_efficient_attention_partial=partial,
    )  # fmt: skip


PAGED = {
    "plain": {"prefix": 0, "background": None, "k": 25},
    "whole blocks": {"prefix": 0, "background": None, "k": 32},
    "prefix": {"prefix": 3, "background": None},
    "background": {"prefix": 0},
    "both": {},
    "shared": {"shared": True},
    "uneven tiles": {"grid": (8, 12), "tile": (5, 5), "k": 40},
    "larger blocks": {"grid": (16, 16), "block": (8, 4), "tile": (8, 8), "k": 100},
}


class TestXFormers:
    def test_packed_images_equal_the_reference(
        self, biases: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fmha, "probe", lambda: Operators(computing(biases), ""))
        inputs, pattern = packed_call()
        out = XFormers()(inputs, pattern)
        torch.testing.assert_close(out, Reference()(inputs, pattern), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", PAGED)
    def test_pages_equal_the_reference(
        self, name: str, biases: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fmha, "probe", lambda: Operators(computing(biases), ""))
        call = flex_call(**{"block": (4, 4), **PAGED[name]})
        out = XFormers()(*call)
        torch.testing.assert_close(out, Reference()(*call), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", PAGED)
    def test_the_page_mask_is_the_patterns(self, name: str, biases: Any) -> None:
        inputs, pattern = flex_call(**{"block": (4, 4), **PAGED[name]})
        assert isinstance(pattern, KeyBlocks)
        tiles, blocks = pattern.tiles, pattern.blocks
        q = tiles.gather(inputs.q[..., pattern.dense_rows :, :])
        mask = paged.page_mask(SimpleNamespace(attn_bias=biases), q.shape, pattern)
        rows, page = q.numel() // q.shape[-1], blocks.size
        width = mask.block_tables.numel() * page
        shown = mask.materialize((1, 1, rows, width))[0, 0] == 0
        keep = pattern.to_mask()[..., pattern.dense_rows :, pattern.prefix :]
        keep = keep.expand(2, 3, -1, -1)[..., blocks.order.flatten()]
        keep = tiles.gather(keep).flatten(2, 3).flatten(0, 1)
        expected = torch.block_diag(*keep.long()).bool()
        assert torch.equal(F.pad(shown, (0, expected.shape[1] - shown.shape[1])), expected)

    def test_a_tile_that_dropped_nothing_has_no_summary(
        self, biases: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fmha, "probe", lambda: Operators(computing(biases), ""))
        inputs, pattern = flex_call(block=(4, 4), prefix=0)
        assert isinstance(pattern, KeyBlocks)
        assert pattern.summary is not None
        never = replace(pattern.summary, bias=torch.full_like(pattern.summary.bias, -torch.inf))
        call = inputs, replace(pattern, summary=never)
        out = XFormers()(*call)
        torch.testing.assert_close(out, Reference()(*call), rtol=1e-4, atol=1e-5)

    def test_no_image_at_all(self, biases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fmha, "probe", lambda: Operators(computing(biases), ""))
        inputs, pattern = flex_call(block=(4, 4), shared=True, background=None)
        none = inputs.replace(q=inputs.q[:0], k=inputs.k[:0], v=inputs.v[:0])
        assert XFormers()(none, pattern).shape == (0, 3, 65, 16)

    def test_double_precision_is_refused(self) -> None:
        q = torch.zeros(1, 3, 65, 16, dtype=torch.float64)
        inputs = flex_call(block=(4, 4))[0].replace(q=q, k=q, v=q)
        assert XFormers().why_not(inputs, Lengths(65, 65, (40, 25))) == [
            *XFormers().why_unavailable(),
            CPU, "needs float32, bfloat16 or float16, got torch.float64",
        ]  # fmt: skip

    def test_refusals_of_key_blocks_are_exact(self) -> None:
        start = XFormers().why_unavailable()
        single = "needs half precision, got torch.float32"
        inputs, pattern = flex_call(block=(4, 4))
        assert isinstance(pattern, KeyBlocks)
        half = flex_call(block=(4, 4), dtype=torch.float16)[0]
        assert XFormers().why_not(half, pattern) == [*start, CPU]
        masked = half.replace(bias=torch.zeros(1, 1, 65, 65), dropout=0.5)
        assert XFormers().why_not(masked, pattern) == [
            *start, CPU, "does not support the model's mask",
            "does not support dropout for key blocks",
        ]  # fmt: skip
        training = inputs.replace(q=inputs.q.clone().requires_grad_())
        assert XFormers().why_not(training, pattern) == [
            *start, CPU, "has no backward pass for key blocks", single,
        ]  # fmt: skip
        small = flex_call(dim=24, dtype=torch.bfloat16)
        assert XFormers().why_not(*small) == [
            *start, CPU, "needs equal head dims of 16, 32, 64, ... 512, got (24, 24)",
            "needs blocks of equal size, a multiple of 16 keys, got 4",
        ]  # fmt: skip
        uneven = flex_call((7, 8), block=(4, 4), dtype=torch.float16)
        assert XFormers().why_not(*uneven) == [
            *start, CPU, "needs blocks of equal size, a multiple of 16 keys, got 12 to 16",
        ]  # fmt: skip
        assert XFormers().why_not(half, replace(pattern, tiles=None)) == [
            *start, CPU, "needs query tiles, got a list for every single query (tile=1)",
        ]  # fmt: skip
        many = half.replace(q=half.q.expand(2, 3, 65, 16).repeat(4096, 1, 1, 1))
        assert XFormers().why_not(many, pattern)[-1] == (
            "needs at most 65,535 tiles over images and heads, got 98,304"
        )
        assert XFormers().why_not(half, Pattern.dense(65, 65)) == [
            *start, "needs images packed by length or key blocks, got a Dense pattern", CPU,
        ]  # fmt: skip

    @pytest.mark.parametrize("removed", [False, True])
    def test_operators_that_triton_cannot_run_are_refused(
        self, removed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def make_block_ptr(*_: Any, _semantic: Any) -> Any:
            if removed:
                raise NotImplementedError("Block pointers have been removed")
            return _semantic.make_block_ptr()

        language = SimpleNamespace(make_block_ptr=make_block_ptr)
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(language=language))
        monkeypatch.setitem(sys.modules, "triton.language", language)
        paged._without_block_pointers.cache_clear()
        q = flex_call(block=(4, 4))[0].q
        here = SimpleNamespace(triton_splitk=SimpleNamespace(_fwd_kernel_splitK=object()))
        gone = "its paged operator needs block pointers, which this triton has removed"
        assert paged._operator_refusals(here, q) == ([gone] if removed else [])
        none = SimpleNamespace(triton_splitk=SimpleNamespace(_fwd_kernel_splitK=None))
        assert paged._operator_refusals(none, q) == ["its paged operator needs triton"]
        paged._without_block_pointers.cache_clear()
