"""`flash_attn_4` and `natten` with stand-ins for their libraries.

Neither library runs without a GPU. The stand-ins have the signatures of flash-attn-4 4.0.0b36 and
natten 0.21.7 and compute, pair by pair, what their documentation says.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import sparsiattn
from sparsiattn import AttentionInputs, InvalidOption, Pattern
from sparsiattn.attention import KeyBlocks, KeyIndex
from sparsiattn.attention.neighbourhood import neighbourhood
from sparsiattn.kernels import (
    FlashAttention4,
    Natten,
    Reference,
    Triton,
    flash,
    natten,
    optional,
    paged,
)
from sparsiattn.strategies import Local, finish
from sparsiattn.testing import random_inputs, tiny_images, tiny_vit
from tests.support.flex_calls import flex_call

CPU = "needs CUDA tensors, got cpu"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


class OlderLists(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    return_lse: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention ``[B, N, H, D]`` to the keys of every full block of a row of blocks."""
    lists = block_sparse_tensors
    assert lists is not None
    assert lists.block_size is not None
    assert not others
    rows, columns = lists.block_size
    b, n, h, _ = q.shape
    assert n % rows == 0
    assert k.shape[1] % columns == 0
    full, count = lists.full_block_idx, lists.full_block_cnt
    assert full is not None
    assert count is not None
    for x in (lists.mask_block_cnt, lists.mask_block_idx, full, count):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
        assert x.shape[0] in (1, b)
        assert x.shape[1] in (1, h)
        assert x.shape[2] == n // rows
    assert not lists.mask_block_cnt.any()
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    keep = torch.zeros(b, h, n, k.shape[1], dtype=torch.bool)
    for i, j, tile in torch.cartesian_prod(*map(torch.arange, (b, h, n // rows))).tolist():
        at = i % full.shape[0], j % full.shape[1], tile
        for block in full[at][: count[at]].tolist():
            keep[i, j, tile * rows :, block * columns : (block + 1) * columns][:rows] = True
    logits = logits.masked_fill(~keep, float("-inf"))
    out = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)
    return out, logits.logsumexp(-1) if return_lse else None


@pytest.fixture
def flash_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = flash.Library(flash_attn_func, BlockSparseTensorsTorch, "")
    monkeypatch.setattr(flash, "probe", lambda: library)


BLOCKS: dict[str, dict[str, Any]] = {
    "whole blocks": {"prefix": 0, "background": None, "k": 64},
    "part of a block": {"prefix": 0, "background": None, "k": 75},
    "prefix": {"prefix": 3, "background": None, "k": 67},
    "background": {"prefix": 0, "k": 64},
    "all": {"k": 75},
    "shared": {"k": 75, "shared": True},
    "repeated queries": {"grid": (16, 12), "tile": (8, 8), "k": 75},
    "larger blocks": {"block": (8, 4), "k": 75},
}


def block_call(**options: Any) -> tuple[AttentionInputs, Pattern]:
    return flex_call(**{"grid": (16, 16), "tile": (8, 8), "block": (4, 4), **options})


@pytest.mark.usefixtures("flash_library")
class TestFlashAttention4:
    @pytest.mark.parametrize("name", BLOCKS)
    def test_it_equals_the_reference(self, name: str) -> None:
        call = block_call(**BLOCKS[name])
        torch.testing.assert_close(FlashAttention4()(*call), Reference()(*call), **CLOSE)

    def test_a_tile_that_dropped_nothing_has_no_summary(self) -> None:
        inputs, pattern = block_call(prefix=0, k=64)
        assert isinstance(pattern, KeyBlocks)
        assert pattern.summary is not None
        never = replace(pattern.summary, bias=torch.full_like(pattern.summary.bias, -torch.inf))
        call = inputs, replace(pattern, summary=never)
        torch.testing.assert_close(FlashAttention4()(*call), Reference()(*call), **CLOSE)

    def test_no_image_at_all(self) -> None:
        inputs, pattern = block_call(shared=True, background=None)
        none = inputs.replace(q=inputs.q[:0], k=inputs.k[:0], v=inputs.v[:0])
        assert FlashAttention4()(none, pattern).shape == (0, 3, 257, 16)

    def test_refusals_are_exact(self) -> None:
        start, kernel = FlashAttention4().why_unavailable(), FlashAttention4()
        single = "needs half precision, got torch.float32"
        half, pattern = block_call(dtype=torch.bfloat16, k=75)
        assert isinstance(pattern, KeyBlocks)
        assert kernel.why_not(half, pattern) == [*start, CPU]
        inputs, _ = block_call(k=75)
        masked = inputs.replace(
            bias=torch.zeros(1, 1, 257, 257), dropout=0.5, scale=-1.0,
            q=inputs.q.clone().requires_grad_(),
        )  # fmt: skip
        assert kernel.why_not(masked, pattern) == [
            *start, CPU, "does not support the model's mask",
            "does not support dropout for key blocks", "has no backward pass for key blocks",
            single, "needs a positive scale, got -1.0",
        ]  # fmt: skip
        assert kernel.why_not(*block_call(tile=(4, 4), block=(2, 2), dim=12)) == [
            *start, "needs tiles of a multiple of 64 queries, got 16",
            "needs blocks of equal size, a multiple of 16 keys up to 128, got 4", CPU, single,
            "needs head dims of a multiple of 8 up to 256, got (12, 12)",
        ]  # fmt: skip
        wide = block_call(dim=136, block=(8, 16), k=140, dtype=torch.float16)
        assert kernel.why_not(*wide) == [
            *start, "needs blocks of equal size, a multiple of 16 keys up to 64, got 128", CPU,
        ]  # fmt: skip
        assert kernel.why_not(half, replace(pattern, keys=12, prefix=1)) == [
            *start, "needs a budget of at least one block of 16 keys beside the prefix keys, "
            "got 11", CPU,
        ]  # fmt: skip
        assert kernel.why_not(half, replace(pattern, tiles=None)) == [
            *start, "needs query tiles, got a list for every single query (tile=1)", CPU,
        ]  # fmt: skip
        assert kernel.why_not(half, Pattern.dense(257, 257)) == [
            *start, "needs key blocks, got a Dense pattern", CPU,
        ]  # fmt: skip

    @pytest.mark.parametrize("found", [(8, 0), (9, 0), (10, 0)])
    def test_only_hopper_has_its_tiles(
        self, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(flash, "_capability", lambda device: found)
        inputs, _ = block_call(dtype=torch.bfloat16)
        gpu = SimpleNamespace(type="cuda")
        q = SimpleNamespace(
            device=gpu, dtype=torch.bfloat16, shape=inputs.q.shape, requires_grad=False
        )
        call: Any = SimpleNamespace(q=q, k=q, v=q, bias=None, dropout=0.0, scale=1.0)
        name = f"its tiles and blocks need a GPU of compute capability 9.0 (Hopper), got {found[0]}"
        expected = [] if found == (9, 0) else [f"{name}.0"]
        assert flash._operand_refusals(call) == expected

    def test_auto_prefers_triton(self) -> None:
        call = block_call(dtype=torch.bfloat16)
        assert 0 < FlashAttention4().speed(*call) < Triton().speed(*call)


def shift(place: int, side: int, window: int, stride: int) -> range:
    """NATTEN's window along one side, as its documentation defines it.

    The window is centred on the middle of the group of ``stride`` queries, and shifted to stay
    inside. A window of even size has one more token before the centre than after.
    """
    leader = min(place // stride * stride + stride // 2, side - 1)
    before, after = window // 2, window // 2 + window % 2 - 1
    centre = min(max(leader, before), side - 1 - after)
    return range(centre - before, centre + after + 1)


def window_mask(grid: tuple[int, int], window: Any, stride: Any) -> Tensor:
    """Pairs ``[n, n]`` of queries and keys."""
    n = grid[0] * grid[1]
    keep = torch.zeros(n, n, dtype=torch.bool)
    for query in range(n):
        place = query // grid[1], query % grid[1]
        rows, columns = map(shift, place, grid, window, stride)
        for row in rows:
            keep[query, row * grid[1] + columns.start : row * grid[1] + columns.stop] = True
    return keep


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> Tensor:
    grid = query.shape[1], query.shape[2]
    assert all(stride[i] <= kernel_size[i] <= grid[i] for i in range(2))
    keep = window_mask(grid, kernel_size, stride)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    if additional_keys is not None and additional_values is not None:
        k, v = (
            torch.cat([x, more.transpose(1, 2)], -2)
            for x, more in ((k, additional_keys), (v, additional_values))
        )
        keep = torch.nn.functional.pad(keep, (0, additional_keys.shape[1]), value=True)
    logits = (q @ k.mT * (scale or q.shape[-1] ** -0.5)).masked_fill(~keep, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, grid)


def na1d(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Any, stride: Any = 1, **options: Any
) -> Tensor:
    sizes = {"kernel_size": (1, *kernel_size), "stride": (1, *stride)}
    q, k, v = (x.unsqueeze(1) for x in (query, key, value))
    return na2d(q, k, v, **sizes, **options).squeeze(1)


LIBRARY = SimpleNamespace(na1d=na1d, na2d=na2d, HAS_LIBNATTEN=True)

WINDOWS: dict[str, dict[str, Any]] = {
    "odd": {"grid": (6, 7), "window": 3},
    "even": {"grid": (6, 7), "window": (4, 2)},
    "a side": {"grid": (6, 7), "window": (9, 3)},
    "no prefix": {"grid": (5, 6), "prefix": 0, "window": 3},
    "many prefix tokens": {"grid": (5, 6), "prefix": 4, "window": 3},
    "prefix keys left out": {"grid": (5, 6), "window": 3, "prefix_keys": False},
    "one row": {"grid": (1, 11), "window": (3, 4)},
    "tiles": {"grid": (8, 9), "window": (5, 4), "tile": (4, 3)},
    "tiles of a row": {"grid": (1, 12), "window": (2, 5), "tile": (2, 2)},
}


def window_call(
    grid: tuple[int, int] = (6, 7),
    *,
    window: Any = 3,
    prefix: int = 1,
    tile: Any = 1,
    prefix_keys: bool = True,
    background: int | None = None,
    dtype: torch.dtype = torch.float32,
    dim: int = 8,
) -> tuple[AttentionInputs, Pattern]:
    inputs = random_inputs(grid, prefix=prefix, tile=tile, dtype=dtype, dim=dim)
    pattern = Local(window=window, prefix_keys=prefix_keys).plan(inputs)
    return inputs, finish(pattern, inputs, background=background, prefix_keys=prefix_keys)


@pytest.fixture(params=["stand-in", "natten"])
def natten_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in, and the library where it is installed: without CUDA it calls FlexAttention."""
    library: Any = LIBRARY if request.param == "stand-in" else pytest.importorskip("natten")
    monkeypatch.setattr(natten, "probe", lambda: natten.Library(library, ""))


class TestNatten:
    @pytest.mark.filterwarnings("ignore:flex_attention called:UserWarning")  # natten's own
    @pytest.mark.usefixtures("natten_library")
    @pytest.mark.parametrize("name", WINDOWS)
    def test_it_equals_the_reference(self, name: str) -> None:
        call = window_call(**WINDOWS[name])
        torch.testing.assert_close(Natten()(*call), Reference()(*call), **CLOSE)

    def test_gradients_equal_those_of_the_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(natten, "probe", lambda: natten.Library(LIBRARY, ""))
        inputs, pattern = window_call((5, 6), prefix=2)
        leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        call = inputs.replace(q=leaves[0], k=leaves[1], v=leaves[2])
        ours, theirs = (
            torch.autograd.grad(kernel(call, pattern).square().sum(), leaves)
            for kernel in (Natten(), Reference())
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

    def test_refusals_are_exact(self) -> None:
        start, kernel = Natten().why_unavailable(), Natten()
        inputs, pattern = window_call()
        assert kernel.why_not(inputs, pattern) == [*start, CPU]
        masked = inputs.replace(bias=torch.zeros(1, 1, 43, 43), dropout=0.5, scale=0.0)
        assert kernel.why_not(masked, pattern) == [
            *start, CPU, "does not support the model's mask", "does not support dropout",
            "needs a positive scale, got 0.0",
        ]  # fmt: skip
        odd = window_call(dim=12, dtype=torch.float64, background=2, window=(1, 3))
        assert kernel.why_not(*odd) == [
            *start, "needs windows of at least 2 patches along each side, got (1, 3)",
            "does not support background keys (background=None)", CPU,
            "needs one of float32, bfloat16 and float16, got torch.float64",
            "needs head dims of a multiple of 8, got (12, 12)",
        ]  # fmt: skip
        assert kernel.why_not(*window_call((6, 7), tile=(3, 3))) == [
            *start, "needs tiles that divide the grid, got (3, 3) in (6, 7)", CPU,
        ]  # fmt: skip
        assert kernel.why_not(*window_call((6, 8), tile=(3, 4))) == [
            *start, "needs tiles no larger than the window (3, 3), got (3, 4)", CPU,
        ]  # fmt: skip

    def test_the_nearest_keys_are_no_window(self) -> None:
        """They are discs, and at the border not even 9 of them are a square."""
        inputs, _ = window_call()
        nearest = finish(Local(k=10).plan(inputs), inputs)
        assert Natten().why_not(inputs, nearest) == [
            *Natten().why_unavailable(), "needs the windows of local(window=...), got a KeyIndex "
            "pattern that is not known to be one", CPU,
        ]  # fmt: skip
        square = window_mask((6, 7), (3, 3), (1, 1))
        assert not torch.equal(nearest.to_mask()[0, 0, 1:, 1:], square)

    def test_no_deterministic_gradients(self) -> None:
        inputs, pattern = window_call()
        training = inputs.replace(q=inputs.q.clone().requires_grad_())
        torch.use_deterministic_algorithms(True)
        try:
            assert "deterministic" in Natten().why_not(training, pattern)[-1]
            assert Natten().why_not(inputs, pattern)[-1] == CPU
        finally:
            torch.use_deterministic_algorithms(False)


class TestWindows:
    @pytest.mark.parametrize("name", WINDOWS)
    def test_lists_are_those_of_the_definition(self, name: str) -> None:
        inputs, pattern = window_call(**WINDOWS[name])
        assert isinstance(pattern, KeyIndex)
        assert pattern.window is not None
        grid, prefix = inputs.query_grid, inputs.prefix
        stride = (1, 1)
        if pattern.tiles is not None:
            parts = pattern.tiles.parts
            stride = grid[0] // parts[0], grid[1] // parts[1]
        patches = pattern.to_mask()[0, 0, prefix:]
        assert torch.equal(patches[:, prefix:], window_mask(grid, pattern.window, stride))
        assert patches[:, :prefix].all() == WINDOWS[name].get("prefix_keys", True)

    def test_tiles_that_do_not_divide_the_grid(self) -> None:
        lists = neighbourhood((1, 7), (1, 3), (1, 2), 0, device=torch.device("cpu"))
        assert lists.tolist() == [[[[1, 2, 3], [4, 5, 6]]]]  # tiles of 4 and 3 queries

    def test_a_window_as_large_as_the_grid_is_dense(self) -> None:
        assert type(window_call((4, 4), window=4)[1]).__name__ == "Dense"

    @pytest.mark.parametrize("kernel", ["reference", "gather"])
    def test_in_a_model(self, kernel: str) -> None:
        self.check_in_a_model(kernel)

    @pytest.mark.usefixtures("compiled_native")
    def test_in_a_model_by_compiled_code(self) -> None:
        self.check_in_a_model("native")

    def check_in_a_model(self, kernel: str) -> None:
        model, images = tiny_vit(), tiny_images(2)
        options: dict[str, Any] = {"window": 3, "tile": 1, "background": None}
        with torch.no_grad():
            with sparsiattn.patch(model, "local", kernel="sdpa", **options):
                expected = model(images)
            with sparsiattn.patch(model, "local", kernel=kernel, **options):
                torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("window", [0, -3, 2.0, (3,), (3, 0), (3, 3, 3), "3", True])
    def test_no_other_values(self, window: Any) -> None:
        with pytest.raises(InvalidOption, match="window must be"):
            Local(window=window)

    def test_it_is_saved(self) -> None:
        assert Local.from_dict(Local(window=5).to_dict()) == Local(window=(5, 5))

    def test_where_there_is_no_such_grid(self) -> None:
        inputs = random_inputs((6, 4), prefix=0)
        with pytest.raises(InvalidOption, match="2 images in a sequence: use k="):
            Local(window=3).plan(inputs.replace(views=2))
        with pytest.raises(InvalidOption, match=r"keys of \(3, 8\)"):
            Local(window=3).plan(inputs.replace(key_grid=(3, 8)))


def _without(function: Any, name: str) -> Any:
    """A function that has every argument but one."""

    def older(*args: Any, **options: Any) -> None: ...

    known = inspect.signature(function)
    kept = [p for p in known.parameters.values() if p.name != name]
    older.__signature__ = known.replace(parameters=kept)  # type: ignore[attr-defined]
    return older


@pytest.fixture
def fresh() -> Iterator[None]:
    """Probes that ask again."""
    for probe in (flash.probe, natten.probe):
        probe.cache_clear()
    yield
    for probe in (flash.probe, natten.probe):
        probe.cache_clear()


@pytest.mark.usefixtures("fresh")
class TestProbes:
    def test_nothing_is_imported_before_its_first_use(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(home: str) -> None:
            raise AssertionError(home)

        monkeypatch.setattr(optional, "load", load)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        kernels = sparsiattn.list_kernels()
        assert {kernels[name].reasons for name in ("flash_attn_4", "natten")} == {
            ("needs a CUDA device",)
        }

    @pytest.mark.parametrize("missing", [None, *flash.NEEDED, "block_size"])
    def test_flash_attn_4(self, missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        lists: Any = BlockSparseTensorsTorch
        if missing == "block_size":
            lists = OlderLists
        function = _without(flash_attn_func, missing or "")
        package = SimpleNamespace(flash_attn_func=function)
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=package))
        monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
        sparsity = SimpleNamespace(BlockSparseTensorsTorch=lists)
        monkeypatch.setitem(sys.modules, "flash_attn.cute.block_sparsity", sparsity)
        found = flash.probe()
        name = "BlockSparseTensorsTorch with block_size" if missing == "block_size" else missing
        assert found.reason == (f"this flash-attn-4 lacks {name}" if missing else "")
        assert (found.attention is function) == (missing is None)

    def test_another_package_of_that_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """FlashAttention-2 is `flash_attn`, too."""
        package = type(sys)("flash_attn")
        package.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        assert flash.probe().reason == "flash_attn needs flash_attn.cute, which is not installed"

    @pytest.mark.parametrize("missing", [None, *natten.NEEDED, "HAS_LIBNATTEN"])
    def test_natten(self, missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        package = SimpleNamespace(
            HAS_LIBNATTEN=missing != "HAS_LIBNATTEN",
            na1d=_without(na2d, missing or ""),
            na2d=na2d,
        )
        monkeypatch.setitem(sys.modules, "natten", package)
        found = natten.probe()
        if missing == "HAS_LIBNATTEN":
            assert "without its compiled code (libnatten)" in found.reason
        else:
            assert found.reason == (f"this natten's na1d lacks {missing}" if missing else "")
        assert (found.module is package) == (missing is None)

    def test_neither_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("flash_attn", "natten"):
            monkeypatch.setitem(sys.modules, name, None)
        assert "flash_attn" in flash.probe().reason
        assert "natten" in natten.probe().reason


@pytest.mark.parametrize("tile", [16, 32, 64, 100])
@pytest.mark.parametrize("page", [16, 48, 64, 128])
@pytest.mark.parametrize("dim", [16, 64, 128, 512])
def test_the_paged_operator_of_xformers_takes_its_settings(tile: int, page: int, dim: int) -> None:
    """Its memory: the pages loaded ahead, of keys and values, in an A100's 164 KiB."""
    settings = paged.launch_settings(tile, dim, page)
    assert page % settings["block_n"] == 0
    assert settings["block_m"] >= min(tile, 64)
    if dim <= 128:
        assert 2 * 2 * settings["num_stages"] * settings["block_n"] * dim <= 96 * 1024
    with optional.silence("xformers"):
        splitk = pytest.importorskip("xformers.ops.fmha").triton_splitk
    operator = splitk.FwOp.get_operator(1, **settings)
    found = operator.BLOCK_M, operator.BLOCK_N, operator.NUM_WARPS, operator.NUM_STAGES
    assert found == tuple(settings[x] for x in ("block_m", "block_n", "num_warps", "num_stages"))
