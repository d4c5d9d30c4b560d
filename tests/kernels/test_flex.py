"""The flex kernel: compiled once per shape, new lists for nothing, nothing compiled unasked."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import sparsiattn
from sparsiattn import AttentionInputs, Pattern, patch
from sparsiattn.attention import KeyBlocks
from sparsiattn.attention.background import Summary
from sparsiattn.kernels import Flex, Reference, choose, flex, flex_compile
from sparsiattn.kernels.flex import operands_of, program_key
from sparsiattn.kernels.flex_compile import FlexOperands
from sparsiattn.strategies import finish
from sparsiattn.testing import KernelSuite, random_inputs, tiny_images, tiny_vit
from sparsiattn.testing.kernel import Case, cases
from tests.support import fake_gpu
from tests.support.flex_calls import flex_call

FLEX = Flex()
NOT_YET = ["not compiled yet for this shape: call patch.warmup(images)"]
OPTIONS = {"k": 18, "tile": (4, 4), "block": (2, 2), "background": 2}
HERE = pytest.mark.skipif(
    bool(flex_compile.cpu_refusals()), reason="; ".join(flex_compile.cpu_refusals())
)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def ran(handle: sparsiattn.Patch) -> set[str]:
    """Kernels of the last forward pass, as the report has them."""
    return {row.kernel for row in handle.report().sites}


@HERE
class TestOneShape:
    """All of one shape, so that the default run compiles once."""

    def test_new_lists_and_gradient_modes_do_not_recompile(self) -> None:
        outs, seen = [], []
        for seed, mode in enumerate((torch.no_grad(), torch.inference_mode(), torch.no_grad())):
            call = flex_call(seed=seed)
            with mode:
                outs.append((FLEX(*call), Reference()(*call)))
            seen.append(graphs())
        assert seen[0] == seen[1] == seen[2]
        for out, exact in outs:
            torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)

    def test_auto_waits_for_warmup(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = tiny_vit(), tiny_images(2)
        monkeypatch.setattr(Flex, "speed", lambda *_: 9.0)  # so few tokens would not pay
        with patch(model, "topk", **OPTIONS) as handle, torch.no_grad():
            before = graphs()
            exact = model(x)
            assert ran(handle) <= {"sdpa", "gather"}, "whichever is thought faster"
            assert dict(handle.runtimes[0].last_choice.refusals)["flex"] == tuple(NOT_YET)
            assert graphs() == before
            assert handle.warmup(x) is handle
            ready = graphs()
            assert ready == before + 1  # both sites have one shape
            torch.testing.assert_close(model(x), exact, rtol=1e-4, atol=1e-5)
            assert ran(handle) == {"flex"}
            with torch.inference_mode():
                model(tiny_images(2) + 1)
            assert graphs() == ready
            model(tiny_images(1))  # another batch size is another shape
            assert ran(handle) <= {"sdpa", "gather"}, "whichever is thought faster"
            assert graphs() == ready

    def test_by_name_it_compiles_at_the_first_forward_and_not_before(self) -> None:
        model, x = tiny_vit(), tiny_images(2)
        with torch.no_grad():
            before = graphs()
            with patch(model, "topk", **OPTIONS, kernel="flex") as handle:
                assert graphs() == before
                assert {row.kernel for row in handle.report().sites} == {"flex"}
                assert graphs() == before
                out = model(x)
                assert graphs() == before + 1
            with patch(model, "topk", **OPTIONS, kernel="gather"):
                torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)

    def test_autocast_computes_in_its_type(self) -> None:
        inputs, pattern = flex_call(dtype=torch.bfloat16)
        wide = inputs.replace(q=inputs.q.float(), k=inputs.k.float())  # as after a norm of q and k
        with torch.autocast("cpu", dtype=torch.float32, enabled=False), torch.no_grad():
            assert FLEX.why_not(wide, pattern) == []
        static = {}
        for name, call in (("half", inputs), ("mixed", wide)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                static[name] = program_key(call, pattern)
        assert static["half"] == static["mixed"]


def refusals(inputs: AttentionInputs, pattern: Pattern) -> list[str]:
    return FLEX.why_not(inputs, pattern)


@HERE
def test_every_refusal_is_exact() -> None:
    inputs, pattern = flex_call()
    assert refusals(inputs, pattern) == []
    assert isinstance(pattern, KeyBlocks)
    lone = random_inputs((8, 8), dim=16, tile=(4, 4))
    scores = torch.randn(2, 3, 65, 65)
    assert refusals(lone, finish(Pattern.top(scores, 18), lone)) == [
        "needs key blocks, got a KeyIndex pattern"
    ]
    assert refusals(inputs, Pattern.dense(65, 65)) == ["needs key blocks, got a Dense pattern"]
    assert refusals(inputs, replace(pattern, tiles=None)) == [
        "needs query tiles, got a list for every single query (tile=1)"
    ]
    masked = inputs.replace(bias=torch.zeros(1, 1, 65, 65), dropout=0.5)
    assert refusals(masked, pattern) == [
        "does not support the model's mask",
        "does not support dropout",
    ]
    double = inputs.replace(q=inputs.q.double(), k=inputs.k.double(), v=inputs.v.double())
    assert refusals(double, pattern) == ["needs float32, bfloat16 or float16, got torch.float64"]
    training = inputs.replace(v=inputs.v.clone().requires_grad_())
    assert refusals(training, pattern) == ["has no backward pass on the CPU"]
    with torch.no_grad():
        assert refusals(training, pattern) == []


def test_by_name_it_refuses_a_forward_that_trains() -> None:
    model = tiny_vit()
    with (
        patch(model, "topk", **OPTIONS, kernel="flex"),
        pytest.raises(sparsiattn.KernelRefused, match=r"flex: .*has no backward pass on the CPU"),
    ):
        model(tiny_images(2))


def test_a_named_kernel_that_cannot_serve_is_refused_at_patch_time() -> None:
    with pytest.raises(sparsiattn.KernelRefused, match="needs key blocks, got a KeyIndex"):
        patch(tiny_vit(), "topk", k=18, tile=(4, 4), kernel="flex")


def test_a_compiled_model_does_not_take_it() -> None:
    model, x = tiny_vit(), tiny_images(2)
    with torch.no_grad(), patch(model, "topk", **OPTIONS) as handle:
        exact = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)
        assert handle.runtimes[0].last_choice is not None


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cu130", "2.15.0+cu132", "3.0.0a1"])
def test_tiles_of_older_versions_divide_the_blocks(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    here = program_key(*flex_call())
    assert flex_compile.kernel_options(here) is None
    for tile in (16, 32, 64, 128):
        for size in (16, 32, 64, 256):
            there = replace(here, device=torch.device("cuda"), tile=tile, size=size)
            options = flex_compile.kernel_options(there)
            assert options is not None
            assert options.pop("BACKEND") == "TRITON", "torch's decoding kernel has no tiles"
            if version.startswith(("2.15", "3")):
                assert options == {}
                continue
            rows = [options[name] for name in ("fwd_BLOCK_M", "bwd_BLOCK_M1", "bwd_BLOCK_M2")]
            keys = [options[name] for name in ("fwd_BLOCK_N", "bwd_BLOCK_N1", "bwd_BLOCK_N2")]
            assert all(step >= 16 and tile % step == 0 for step in rows)
            assert all(step >= 16 and size % step == 0 for step in keys)
            assert keys[1] % rows[1] == 0
            assert rows[2] % keys[2] == 0


@fake_gpu.NEEDED
@pytest.mark.parametrize(
    ("grid", "dtype"),
    [((8, 8), torch.float32), ((7, 7), torch.bfloat16), ((16, 16), torch.bfloat16)],
)
def test_torch_lowers_it_for_a_gpu(grid: tuple[int, int], dtype: torch.dtype) -> None:
    """Also with fewer than 128 queries, where torch would take its decoding kernel."""
    inputs, pattern = flex_call(grid, k=30, block=(4, 4), dtype=dtype)
    assert isinstance(pattern, KeyBlocks)
    there = replace(program_key(inputs, pattern), device=fake_gpu.CUDA)
    program = flex_compile.attention(there)
    operands = as_on_gpu(operands_of(inputs, pattern), pattern)
    assert len(fake_gpu.lowered_kernels(program, operands)) == 1


@pytest.mark.parametrize("block", [(4, 4), (8, 8)])
def test_keys_on_a_gpu_need_no_check_at_their_end(block: tuple[int, int]) -> None:
    """Torch's kernel leaves these checks out for multiples of 128 rows."""
    inputs, pattern = flex_call((16, 16), k=100, block=block)
    assert isinstance(pattern, KeyBlocks)
    on_cpu = operands_of(inputs, pattern).k.shape[-2]
    assert on_cpu == 256 + pattern.blocks.size
    with FakeTensorMode(allow_non_fake_inputs=True):
        packed = flex._packed(torch.empty(inputs.k.shape, device="cuda"), to_gpu(pattern))
    assert packed.shape[-2] == 384


def to_gpu(pattern: KeyBlocks) -> KeyBlocks:
    """The same pattern with tables that only claim to be on a GPU."""

    def move(record: Any) -> Any:
        if isinstance(record, torch.Tensor):
            return torch.empty(record.shape, dtype=record.dtype, device="cuda")
        if not dataclasses.is_dataclass(record):
            return record
        values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return replace(record, **{name: move(value) for name, value in values.items()})

    summary = pattern.summary
    assert summary is not None
    plain = Summary(summary.cells, summary.parts, summary.bias)
    moved: KeyBlocks = move(replace(pattern, summary=plain))
    return moved


def on_gpu(inputs: AttentionInputs) -> AttentionInputs:
    """The same call with operands that only claim to be on a GPU."""
    with FakeTensorMode():
        q, k, v = (
            torch.empty(x.shape, dtype=x.dtype, device="cuda")
            for x in (inputs.q, inputs.k, inputs.v)
        )
    return inputs.replace(q=q, k=k, v=v)


@pytest.mark.parametrize(
    ("version", "dtype", "side", "autocast", "refused"),
    [
        ("2.11.0", torch.bfloat16, 4, False, True),
        ("2.11.0", torch.float16, 8, False, True),
        ("2.11.0", torch.float32, 4, True, True),
        ("2.11.0", torch.float32, 4, False, False),
        ("2.11.0", torch.bfloat16, 16, False, False),
        ("2.15.0", torch.bfloat16, 4, False, False),
    ],
)
def test_gradients_in_half_precision_need_a_torch_that_adapts(
    version: str, dtype: torch.dtype, side: int, autocast: bool, refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "__version__", version)
    sides = {"tile": (side, side), "block": (side, side)}
    inputs, pattern = flex_call((32, 32), k=400, dim=16, dtype=dtype, **sides)
    inputs = on_gpu(inputs)
    torch.set_autocast_enabled("cuda", autocast)  # torch.autocast would look for a GPU
    try:
        assert FLEX.why_not(inputs, pattern) == []
        inputs.k.requires_grad_()
        reasons = FLEX.why_not(inputs, pattern)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert any("need torch 2.15" in reason for reason in reasons) == refused, reasons
    assert len(reasons) == refused


@HERE
def test_no_image_at_all() -> None:
    inputs, pattern = flex_call(shared=True, background=None)
    none = inputs.replace(q=inputs.q[:0], k=inputs.k[:0], v=inputs.v[:0])
    before = graphs()
    assert FLEX.why_not(none, pattern) == []
    assert FLEX(none, pattern).shape == (0, 3, 65, 16)
    assert graphs() == before


def test_auto_takes_it_only_where_it_is_ready() -> None:
    call = flex_call(k=30)  # a shape that nothing compiles
    assert FLEX.why_not(*call) == []
    assert FLEX.not_ready(*call) == NOT_YET
    assert choose([FLEX], *call, explicit=True).kernel is FLEX
    with pytest.raises(sparsiattn.KernelRefused, match=r"flex: not compiled yet for this shape"):
        choose([FLEX], *call, explicit=False)


def as_on_gpu(operands: FlexOperands, pattern: KeyBlocks) -> FlexOperands:
    """Operands with unused rows of keys up to a multiple of 128; they hold what must not count."""
    missing = -operands.k.shape[-2] % math.lcm(128, pattern.blocks.size)
    k, v = (F.pad(x, (0, 0, 0, missing), value=9.0) for x in (operands.k, operands.v))
    return operands._replace(k=k, v=v)


def test_the_mask_alone_says_the_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where compiling is switched off; and every shape, in no time."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    seen = 0
    for name, inputs, pattern in sweep(torch.float32):
        if isinstance(pattern, KeyBlocks):
            exact = Reference()(inputs, pattern)[..., pattern.dense_rows :, :]
            operands, message = operands_of(inputs, pattern), f"{name}: {{}}".format
            for call in (operands, as_on_gpu(operands, pattern)):
                tiles = flex_compile.attention(program_key(inputs, pattern))(*call)
                assert pattern.tiles is not None
                out = pattern.tiles.scatter(tiles.unflatten(-2, (-1, pattern.tiles.size)))
                torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5, msg=message)
            seen += 1
    assert seen > 15


@HERE
def test_without_the_compiler_the_result_is_the_same() -> None:
    call = flex_call(k=12)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this is slow
        out = FLEX(*call)
    torch.testing.assert_close(out, Reference()(*call), rtol=1e-4, atol=1e-5)


def sweep(dtype: torch.dtype) -> Iterator[Case]:
    """The suite's own cases and lists that images and heads share."""
    yield from cases(dtype)
    for shared in (False, True):
        for prefix, background in ((0, None), (0, 3), (5, 2)):
            name = f"shared={shared} prefix={prefix} background={background}"
            call = flex_call(
                (9, 8), k=30, prefix=prefix, background=background, shared=shared, dtype=dtype
            )
            yield name, *call


@HERE
@pytest.mark.slow
class TestEveryShape(KernelSuite):
    """Each compiled."""

    kernel = FLEX
    dtypes = (torch.float32, torch.bfloat16)

    def cases(self, dtype: torch.dtype) -> Iterator[Case]:
        yield from sweep(dtype)
