"""What `Patch.monitor` measures, by oracles of plain torch and of loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsiattn
from sparsiattn import LowAttentionMass, Pattern, Strategy
from sparsiattn.runtime import attention_rows
from sparsiattn.testing.hosts import random_inputs, tiny_images, tiny_vit
from tests.integration import test_padded_batches as padded
from tests.support import zoo

SITES = ["blocks.0.attn", "blocks.1.attn"]
MANY = 1000  # rows: more than there are patches, so that every one is looked at


def run(model: nn.Module, calls: int = 1, batch: int = 2) -> Tensor:
    with torch.no_grad():
        for _ in range(calls):
            out = model(tiny_images(batch))
    return out  # type: ignore[no-any-return]


class Captured:
    """What the qkv layers of a timm ViT return, by site."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.qkv = model, dict[str, Tensor]()
        for name in SITES:
            layer = model.get_submodule(f"{name}.qkv")
            layer.register_forward_hook(
                lambda module, args, out, name=name: self.qkv.__setitem__(name, out)
            )

    def attention(self, name: str) -> Tensor:
        """Exact softmax ``[B, 3, 65, 65]``, by plain torch."""
        q, k, _ = self.qkv[name].unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        return torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 4, -1)


def mean_of_patch_rows(mass: Tensor) -> list[float]:
    """By image, of ``[B, H, 65]``, the class token left out."""
    return [float(image[:, 1:].mean()) for image in mass]


def test_the_mass_of_topk_is_that_of_the_largest_weights() -> None:
    model = tiny_vit()
    captured = Captured(model)
    patch = sparsiattn.patch(model, "topk", k=17)
    expected = {}
    with patch.monitor(rows=MANY) as monitor:
        run(model)
        for name in SITES:
            weights = captured.attention(name)
            # the class token is always kept, beside the 16 largest of the rest
            mass = weights[..., 0] + weights[..., 1:].sort(-1).values[..., -16:].sum(-1)
            expected[name] = mean_of_patch_rows(mass)
    found = monitor.report()
    assert found.lowest == pytest.approx(min(min(x) for x in expected.values()), rel=1e-5)
    assert min(expected[str(found.lowest_site)]) == pytest.approx(found.lowest)
    four = sorted(value for values in expected.values() for value in values)
    assert found.median == pytest.approx((four[1] + four[2]) / 2, rel=1e-5)
    assert (found.lowest_overlap, found.median_overlap) == (None, None)


@dataclass(frozen=True)
class Halves(Strategy):
    """Even patch queries see the keys of the first half, odd ones those of the second."""

    name = "halves"

    def plan(self, inputs: Any) -> Pattern:
        n = inputs.n_keys
        row, key = torch.arange(n)[:, None], torch.arange(n)
        return Pattern.mask(((row % 2 == 0) == (key < n // 2))[None, None])


@pytest.mark.parametrize("background", [None, 2])
def test_masks_and_summary_keys_are_those_of_an_oracle(background: int | None) -> None:
    model = tiny_vit()
    captured = Captured(model)
    patch = sparsiattn.patch(model, Halves(background=background), sites=SITES[0])
    with patch.monitor(rows=MANY) as monitor:
        run(model, batch=1)
    weights = captured.attention(SITES[0])[0]
    masses, overlaps = [], []
    for head in range(3):
        q = captured.qkv[SITES[0]][0, :, 16 * head : 16 * head + 16]
        k = captured.qkv[SITES[0]][0, :, 48 + 16 * head : 64 + 16 * head]
        for row in range(1, 65):
            kept = {j for j in range(65) if (row % 2 == 0) == (j < 32)} | {0}
            exact = weights[head, row].tolist()
            masses.append(sum(exact[j] for j in kept))
            overlaps.append(overlap_by_hand(q[row], k, kept, exact))
    found = monitor.report()
    assert found.lowest == pytest.approx(sum(masses) / len(masses), rel=1e-5)
    if background is None:
        assert found.lowest_overlap is None
    else:
        assert found.lowest_overlap == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-5)
        assert found.lowest_overlap > found.lowest


def overlap_by_hand(q: Tensor, k: Tensor, kept: set[int], exact: list[float]) -> float:
    """Of one query: 2 x 2 summary keys over the 8 x 8 patches, spread over what each stands for."""
    numbers = {j: float((q @ k[j] / 4).exp()) for j in kept}
    spread = dict(numbers)
    for top in (0, 4):
        for left in (0, 4):
            cell = [1 + 8 * r + c for r in range(top, top + 4) for c in range(left, left + 4)]
            dropped = [j for j in cell if j not in kept]
            if dropped:
                mean = k[cell].mean(0)
                # the log of how many were dropped is added to the logit
                weight = float((q @ mean / 4).exp()) * len(dropped)
                spread |= {j: weight / len(dropped) for j in dropped}
    total = sum(spread.values())
    return sum(min(exact[j], value / total) for j, value in spread.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("topk", {"k": 0.25}),
        ("topk", {"k": 0.25, "tile": (2, 2)}),
        ("local", {"k": 9}),
        ("connectivity", {"k": 0.25, "background": 2}),
        ("topk", {"k": 0.25, "background": 2}),
        ("random", {"k": 0.25}),
    ],
)
def test_rows_are_those_of_the_whole_mask(name: str, options: dict[str, Any]) -> None:
    """Rows of any pattern, from what `Pattern.to_mask` and `Pattern.summary_rows` say."""
    model = tiny_vit()
    patch = sparsiattn.patch(model, name, **options)
    calls = []
    with patch.observing(lambda site, planner, inputs: calls.append((site, planner, inputs))):
        run(model)
    _, planner, inputs = calls[0]
    runtime = patch.runtimes[0]
    rows = torch.tensor([0, 3, 40, 64])
    pattern = runtime.finish(planner(inputs), inputs)
    found = attention_rows.compute(inputs, pattern, rows)
    whole = runtime.finish(planner(inputs), inputs)
    mask = whole.to_mask().expand(2, 3, 65, 65)[..., rows, :]
    assert torch.equal(found.kept.expand_as(mask), mask)
    exact = ((inputs.q @ inputs.k.mT) * inputs.scale).softmax(-1)[..., rows, :]
    assert torch.allclose(found.mass(), (exact * mask).sum(-1), atol=1e-5)
    bias = whole.summary_rows()
    assert (found.cells is None) == (bias is None)
    assert bool((found.overlap() >= found.mass() - 1e-5).all())
    assert bool((found.overlap() <= 1 + 1e-5).all())
    if bias is None:
        assert torch.equal(found.overlap(), found.mass())
    else:
        assert torch.allclose(found.overlap()[..., 0], torch.ones(2, 3))  # sees every key
        logits = (inputs.q @ inputs.k.mT) * inputs.scale
        pooled = torch.stack([logits[..., whole.summary.cells == g].mean(-1) for g in range(4)], -1)
        every = torch.cat([logits.masked_fill(~whole.to_mask(), -torch.inf), pooled + bias], -1)
        share = every.softmax(-1)[..., rows, 65:].sum(-1)
        assert torch.allclose(found.background, share, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(0, 2), st.integers(1, 12), st.booleans())
def test_overlap_is_symmetric_in_what_it_compares(
    batch: int, prefix: int, kept: int, biased: bool
) -> None:
    """It is one minus half the distance of the two softmaxes; without summary keys, the mass."""
    inputs = random_inputs((4, 4), batch=batch, prefix=prefix)
    n = inputs.n_keys
    if biased:
        bias = torch.randn(1, 3, n, n, generator=torch.Generator().manual_seed(kept))
        inputs = random_inputs((4, 4), batch=batch, prefix=prefix, bias=bias, kind="bias")
    mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
    mask[..., :kept] = True
    rows = torch.arange(n)
    found = attention_rows.compute(inputs, Pattern.mask(mask), rows)
    logits = inputs.q @ inputs.k.mT * inputs.scale + (0 if inputs.bias is None else inputs.bias)
    exact = logits.softmax(-1)
    patched = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    distance = (exact - patched).abs().sum(-1) / 2
    assert torch.allclose(found.mass(), 1 - distance, atol=1e-5)
    assert torch.allclose(found.overlap(), found.mass())


FAMILIES = ["vit_registers", "vit_differential", "vit_unfused", "samvit", "swin", "beit", "hiera",
            "pvt_v2", "mvitv2", "eva_rope"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_hosts_of_all_kinds(family: str) -> None:
    model = zoo.build(family)
    images = zoo.images(model, 2)
    patch = sparsiattn.patch(model, "topk", k=0.5, input=images)
    with torch.no_grad():
        plain = model(images)
        with patch.monitor(every=1) as monitor:
            assert torch.equal(model(images), plain)
    found = monitor.report()
    assert found.watched == 1
    assert found.lowest is not None
    # better than chance, and no more than all
    assert 0.45 < found.lowest <= 1 + 1e-5


def test_fewer_tokens_do_not_disturb_it() -> None:
    model = tiny_vit()
    sparsiattn.patch(model, "hybrid", k=0.5, keep=0.7, only_if_faster=False)
    patch = sparsiattn.patch_of(model)
    assert patch is not None
    plain = run(model)
    with patch.monitor() as monitor:
        assert torch.equal(run(model), plain)
    assert monitor.report().watched == 1


def test_padding_has_no_say_in_it() -> None:
    model = padded.naflex()
    parts = padded.images()
    patch = sparsiattn.patch(model, "topk", k=0.25, input=(1, 3, 64, 64))

    def lowest(batch: Any) -> float:
        with patch.monitor(rows=MANY) as monitor, torch.no_grad():
            model(batch)
        return monitor.report().lowest or 0.0

    alone = [lowest(padded.batch([part])) for part in parts]
    assert lowest(padded.batch(parts)) == pytest.approx(min(alone), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = tiny_vit().to(dtype)
    patch = sparsiattn.patch(model, "topk", k=0.25)
    with patch.monitor(rows=MANY) as monitor, torch.inference_mode():
        model(tiny_images().to(dtype))
    reference = tiny_vit()
    with sparsiattn.patch(reference, "topk", k=0.25).monitor(rows=MANY) as other:
        run(reference, batch=3)
    assert monitor.report().median == pytest.approx(other.report().median, rel=0.02)


def test_what_is_not_a_number_holds_nothing() -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)
    images = tiny_images(2)
    images[1] = float("nan")
    low = pytest.warns(LowAttentionMass, match=r"hold 0\.000 of exact")
    with patch.monitor(bound=0.1) as monitor, torch.no_grad(), low:
        model(images)
    assert monitor.report().lowest == 0.0
