"""What attention should cost: the work of each kernel, its price, and choices that are kept."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

import sparsiattn
from sparsiattn import AttentionInputs, Kernel, Pattern, Site
from sparsiattn.attention import KeyIndex, Lengths
from sparsiattn.kernels import (
    CallShape,
    ChoiceCache,
    Gather,
    MaskedSDPA,
    Prices,
    Reference,
    Work,
    choose,
    cost,
)
from sparsiattn.kernels.choice_cache import describe
from sparsiattn.kernels.cost import Planning
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies import finish
from sparsiattn.testing import random_inputs
from tests.support import zoo

META = torch.device("meta")


def call_of(tokens: int, **fields: Any) -> tuple[AttentionInputs, Pattern]:
    """A call of 6 heads of 64 over tokens without data, and its pattern."""
    k, tile, batch = (fields.pop(name, usual) for name, usual in (("k", 0.1), ("tile", (8, 8)),
                                                                  ("batch", 1)))  # fmt: skip
    q = torch.empty(batch, 6, tokens, 64, device=META)
    inputs = AttentionInputs(q, q, q, 0.125, None, Site.of(q, q, q), tile=tile, **fields)
    rows = tokens if inputs.tiles is None else inputs.tiles.count
    return inputs, finish(Pattern.top(q.new_empty(batch, 6, rows, tokens), k), inputs)


def test_work_of_dense_attention_by_hand() -> None:
    inputs, _ = call_of(1024)
    assert CallShape.of(inputs).dense == Work(1.0, 6 * 1024**2 * 128, 6 * 1024**2, 0.0, 6 * 1024)


def test_gather_pays_for_kept_pairs_and_sdpa_for_all() -> None:
    inputs, pattern = call_of(4096, k=0.25)
    gather, masked = Gather().work(inputs, pattern), MaskedSDPA().work(inputs, pattern)
    assert masked.macs == CallShape.of(inputs).dense.macs
    assert gather.macs == masked.macs / 4
    assert gather.bytes == 6 * (64 * 1024 + 4096) * 128 * 4
    assert MaskedSDPA().work(inputs, Pattern.dense(4096, 4096)) == CallShape.of(inputs).dense


def test_prefix_queries_and_summary_keys_are_paid() -> None:
    q = torch.empty(1, 6, 1025, 64, device=META)
    inputs = AttentionInputs(q, q, q, 1.0, None, Site.of(q, q, q, prefix_tokens=1), tile=(8, 8))
    scores = Pattern.top(q.new_empty(1, 6, 16, 1025), 100)
    plain = Gather().work(inputs, finish(scores, inputs))
    pooled = Gather().work(inputs, finish(scores, inputs, background=2))
    assert plain.logits == 6 * (1024 * 100 + 1025)
    assert pooled.logits - plain.logits == 6 * 1024 * 4


def test_ragged_batches_pay_for_each_image() -> None:
    q = torch.empty(1, 6, 300, 64, device=META)
    inputs = AttentionInputs(q, q, q, 1.0, None, Site.of(q, q, q))
    pattern = Lengths(300, 300, (100, 200))
    assert MaskedSDPA().work(inputs, pattern).logits == 6 * (100**2 + 200**2)
    assert MaskedSDPA().speed(inputs, pattern) > Reference().speed(inputs, pattern)


@pytest.mark.parametrize("kernel", [Gather(), MaskedSDPA(), Reference()], ids=lambda k: k.name)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_speed_is_a_positive_number_on_every_device(kernel: Kernel, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs, pattern = call_of(1024)
        shape = replace(CallShape.of(inputs), dtype=dtype, device=torch.device(device, 0))
        work = kernel.work(inputs, pattern)
        assert work is not None
        usual = cost.shipped(shape.device, dtype)
        found = usual["dense"].of(shape.dense) / usual[kernel.name].of(work)
        assert 0 < found < math.inf
        assert 0 < kernel.speed(inputs, pattern) < math.inf


def test_shipped_prices_know_what_was_measured() -> None:
    """Rows of the README: where tiles win, where they lose, and that single queries never pay."""
    gather = Gather()
    wins, loses = call_of(4096), call_of(1024, k=0.75)
    assert gather.speed(*wins) > 2
    assert gather.speed(*loses) < 1
    assert gather.speed(*call_of(196, k=0.25, tile=1)) < 0.5
    speeds = [gather.speed(*call_of(n)) for n in (256, 1024, 4096)]
    assert speeds == sorted(speeds)


def test_a_new_kernel_needs_no_prices_of_its_own() -> None:
    class New(Gather):
        name = "new"

    inputs, pattern = call_of(4096)
    assert New().speed(inputs, pattern) == Gather().speed(inputs, pattern)


def test_a_kernel_without_work_or_speed_says_so() -> None:
    class Neither(Kernel):
        name = "neither"

    with pytest.raises(NotImplementedError, match="Neither must override work"):
        Neither().speed(*call_of(256))


class Says(Kernel):
    """A kernel of a given speed that counts how often it is asked."""

    def __init__(self, name: str, speed: float, refuses: bool = False) -> None:
        self.name, self.fast, self.refuses, self.asked = name, speed, refuses, 0  # type: ignore[misc]

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        self.asked += 1
        return ["not today"] if self.refuses else []

    def speed(self, inputs: AttentionInputs, pattern: Pattern) -> float:
        return self.fast

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> torch.Tensor:
        return Reference()(inputs, pattern)


def test_capability_first_then_speed() -> None:
    call = call_of(256)
    fast, slow, refused = Says("fast", 3.0), Says("slow", 2.0), Says("refused", 9.0, True)
    choice = choose((slow, refused, fast), *call, explicit=False)
    assert choice.kernel is fast
    assert choice.refusals == (("refused", ("not today",)),)


def test_the_specification_runs_only_where_nothing_else_does() -> None:
    call = call_of(256)
    sure, slow = Says("sure", 9.0), Says("slow", 0.01)
    sure.last_resort = True  # type: ignore[misc]
    assert Reference.last_resort
    for order in ((sure, slow), (slow, sure)):
        assert choose(order, *call, explicit=False).kernel is slow
    refused = Says("refused", 1.0, True)
    assert choose((sure, refused), *call, explicit=False).kernel is sure


def test_planning_is_part_of_what_is_expected() -> None:
    choice = choose((Says("mine", 4.0),), *call_of(1024), explicit=False)
    assert choice.expected == 4.0
    assert choice.call is not None
    dense = cost.dense_seconds(choice.call)
    price = cost.prices("planning", choice.call)
    half = Planning(Work(calls=0.5 * dense / price.call), 1)
    paid = choice.after(half)
    assert paid.planning == pytest.approx(0.5)
    assert paid.expected == pytest.approx(1 / (1 / 4 + 1 / 2))
    assert choose((Says("stuck", 0.0),), *call_of(1024), explicit=False).expected == 0.0


def test_planning_grows_with_the_batch_unless_it_reads_a_table() -> None:
    predicts, reads = Work(10.0, 100.0, 20.0, 30.0, 5.0), Work(10.0, 0.0, 20.0)
    assert Planning(predicts, 2).at(8) == Work(10.0, 400.0, 80.0, 120.0, 20.0)
    assert Planning(reads, 2).at(8) == reads


def test_prices_add_up() -> None:
    work = Work(5.0, 6.0, 7.0, 8.0, 9.0)
    assert Prices(1.0, 2.0, 3.0, 4.0, 10.0).of(work) == 5 + 12 + 21 + 32 + 90


# -- choices that are kept --------------------------------------------------------------------


def key_of(inputs: AttentionInputs, pattern: Pattern) -> object:
    return describe(inputs, pattern)


@pytest.fixture
def call() -> tuple[AttentionInputs, Pattern]:
    inputs = random_inputs((4, 4), tile=(2, 2))
    scores = torch.randn(2, 3, 17, 17)
    return inputs, finish(Pattern.top(scores, 6), inputs, background=2)


def differing(inputs: AttentionInputs, pattern: Pattern) -> dict[str, Any]:
    """Calls that differ from the given one in one thing a kernel may ask about."""
    bias = torch.zeros(1, 1, 17, 17)
    wide = random_inputs((4, 4), tile=(2, 2), value_dim=4)
    more = random_inputs((4, 4), tile=(2, 2), batch=3)
    scores = torch.randn(2, 3, 17, 17)
    strided = inputs.q.mT.contiguous().mT
    return {
        "batch": (more, pattern),
        "value dim": (inputs.replace(v=wide.v), pattern),
        "dtype": (inputs.replace(q=inputs.q.bfloat16()), pattern),
        "strides": (inputs.replace(q=strided), pattern),
        "requires grad": (inputs.replace(k=inputs.k.clone().requires_grad_()), pattern),
        "bias": (inputs.replace(bias=bias), pattern),
        "boolean bias": (inputs.replace(bias=bias == 0), pattern),
        "learned bias": (inputs.replace(bias=bias.clone().requires_grad_()), pattern),
        "bias per head": (inputs.replace(bias=bias.expand(1, 3, 17, 17)), pattern),
        "dropout": (inputs.replace(dropout=0.1), pattern),
        "scale": (inputs.replace(scale=1.5), pattern),
        "tile": (inputs.replace(tile=1), pattern),
        "list width": (inputs, finish(Pattern.top(scores, 7), inputs, background=2)),
        "no summary": (inputs, finish(Pattern.top(scores, 6), inputs)),
        "larger summary": (inputs, finish(Pattern.top(scores, 6), inputs, background=3)),
        "tile size": (inputs, finish(Pattern.top(scores, 6), inputs.replace(tile=(2, 4)),
                                     background=2)),
        "mask": (inputs, Pattern.mask(scores > 0)),
        "one list for all heads": (inputs, finish(Pattern.top(scores[:, :1], 6), inputs,
                                                  background=2)),
        "meta": (inputs.replace(q=inputs.q.to("meta")), pattern),
    }  # fmt: skip


def test_keys_tell_apart_whatever_a_kernel_may_ask(call: Any) -> None:
    keys = [key_of(*call), *(key_of(*other) for other in differing(*call).values())]
    assert len(set(keys)) == len(keys)


def test_a_summary_that_differs_between_queries_is_another_call(call: Any) -> None:
    inputs, pattern = call
    summary = replace(pattern.summary, allowed=torch.ones(1, 1, 17, 17, dtype=torch.bool))
    assert key_of(inputs, replace(pattern, summary=summary)) != key_of(inputs, pattern)


def test_modes_of_torch_are_part_of_the_key(call: Any) -> None:
    keys = [key_of(*call)]
    with torch.no_grad():
        keys.append(key_of(*call))
    with torch.inference_mode():
        keys.append(key_of(*call))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(key_of(*call))
    assert len(set(keys)) == 5


def test_values_are_not_part_of_the_key(call: Any) -> None:
    inputs, pattern = call
    again = inputs.replace(q=torch.randn_like(inputs.q))
    assert key_of(again, pattern) == key_of(inputs, pattern)


def test_what_cannot_be_described_is_not_kept(call: Any) -> None:
    class Mine(KeyIndex):
        """Holds something this library knows nothing of."""

    class Strange(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    inputs, pattern = call
    choices = ChoiceCache()
    mine = Mine(17, 17, pattern.index)
    assert choices.key(inputs, mine) is None
    assert choices.key(inputs.replace(q=inputs.q.as_subclass(Strange)), pattern) is None
    assert choices.get(None) is None
    choices.keep(None, choose((Reference(),), inputs, pattern, explicit=False))
    assert len(choices) == 0


def test_another_site_or_other_prices_start_anew(call: Any) -> None:
    inputs, pattern = call
    choices = ChoiceCache()
    choice = choose((Reference(),), inputs, pattern, explicit=False)
    choices.keep(choices.key(inputs, pattern), choice)
    assert choices.get(choices.key(inputs, pattern)) is choice
    cost.reload()
    assert choices.get(choices.key(inputs, pattern)) is None
    choices.keep(choices.key(inputs, pattern), choice)
    moved = inputs.replace(site=replace(inputs.site, name="elsewhere"))
    assert choices.get(choices.key(moved, pattern)) is None


def test_shapes_that_never_repeat_do_not_pile_up(call: Any) -> None:
    inputs, pattern = call
    choices = ChoiceCache()
    choice = choose((Reference(),), inputs, pattern, explicit=False)
    for scale in range(200):
        choices.keep(choices.key(inputs.replace(scale=float(scale)), pattern), choice)
    assert 0 < len(choices) <= 64


class TestInAModel:
    """A patched forward asks kernels once for calls alike."""

    kernel: ClassVar[Says]

    @pytest.fixture
    def live(self) -> sparsiattn.Patch:
        type(self).kernel = Says("counts", 5.0)
        live = sparsiattn.patch(zoo.build("vit"), "topk", k=0.25, sites="blocks.0.*")
        live.runtimes[0].kernels = (self.kernel,)
        return live

    def test_kernels_are_asked_once(self, live: sparsiattn.Patch) -> None:
        x = zoo.images(live.model)
        with torch.no_grad():
            for _ in range(3):
                live.model(x)
            assert self.kernel.asked == 1
            live.model(x[:1])
            assert self.kernel.asked == 2
        live.model(x)
        assert self.kernel.asked == 3
        assert live.runtimes[0].last_choice is not None

    def test_copies_ask_for_themselves(self, live: sparsiattn.Patch) -> None:
        with torch.no_grad():
            live.model(zoo.images(live.model))
        choice = live.runtimes[0].last_choice
        assert choice is not None
        live.runtimes[0].note_measured(1.5, choice)
        twin = copy.deepcopy(live.model)
        copied = sparsiattn.patch_of(twin)
        assert copied is not None
        assert len(copied.runtimes[0].choices) == 0
        assert copied.runtimes[0].measured is None
        assert len(live.runtimes[0].choices) == 1

    def test_a_pickle_carries_no_choices(self) -> None:
        live = sparsiattn.patch(zoo.build("vit"), "topk", k=0.25)
        with torch.no_grad():
            live.model(zoo.images(live.model))
        buffer = io.BytesIO()
        torch.save(live.model, buffer)
        again = sparsiattn.patch_of(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
        assert again is not None
        assert [len(runtime.choices) for runtime in again.runtimes] == [0, 0]

    def test_a_compiler_keeps_nothing(self) -> None:
        live = sparsiattn.patch(zoo.build("vit"), "topk", k=0.25)
        x = zoo.images(live.model)
        with torch.no_grad():
            compiled = torch.compile(live.model, fullgraph=True, backend="eager")(x)
            assert [len(runtime.choices) for runtime in live.runtimes] == [0, 0]
            torch.testing.assert_close(live.model(x), compiled)
        torch.compiler.reset()

    @pytest.mark.parametrize("tile", [1, (4, 4)])
    def test_an_exported_program_takes_any_batch(self, tile: Any) -> None:
        """Prices that depended on the batch would tie the program to some of them."""
        live = sparsiattn.patch(zoo.build("vit"), "connectivity", k=0.25, tile=tile)
        x = zoo.images(live.model)
        batch = torch.export.Dim("batch", min=2, max=64)
        with torch.no_grad():
            program = torch.export.export(live.model, (x,), dynamic_shapes=({0: batch},)).module()
            for more in (x, x.repeat(4, 1, 1, 1)):
                torch.testing.assert_close(program(more), live.model(more), rtol=1e-4, atol=1e-5)

    def test_every_kernel_of_the_registry_has_a_speed(self) -> None:
        inputs, pattern = call_of(256)
        for kernel in REGISTRY.all("kernels").values():
            if not kernel.why_not(inputs, pattern):
                assert kernel.speed(inputs, pattern) > 0
