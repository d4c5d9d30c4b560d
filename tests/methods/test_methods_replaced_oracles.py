"""What methods that replace keys, weights or output compute, against their formulas, and cost."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import sparsiattn
from sparsiattn.attention import AttentionInputs, CrossLayerState
from sparsiattn.methods.attention_reuse import AttentionReuse
from sparsiattn.methods.hypergraph import Hypergraph, hyperedges
from sparsiattn.methods.linformer import Linformer
from sparsiattn.methods.lowrank import LowRank
from sparsiattn.methods.skipat import SkipAt
from sparsiattn.strategies import Strategy
from sparsiattn.testing import random_inputs, tiny_images, tiny_vit


def scramble(planner: Any, seed: int = 0) -> Any:
    """Weights that are neither zero nor the identity."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in planner.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=draw))
    return planner


def at(inputs: AttentionInputs, index: int, depth: int = 4) -> AttentionInputs:
    """The same call at another site of one forward pass."""
    site = inputs.site.__class__(**{**inputs.site.to_dict(), "index": index, "depth": depth})
    return inputs.replace(site=site, cross_layer=inputs.cross_layer or CrossLayerState())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestOracles:
    """Against the formulas, written out."""

    @pytest.mark.parametrize("host", [False, True])
    def test_linformer(self, host: bool) -> None:
        inputs = random_inputs((4, 4), prefix=1)
        if host:
            bias = torch.randn(1, 3, 17, 17, generator=torch.Generator().manual_seed(1))
            inputs = random_inputs((4, 4), prefix=1, bias=bias, kind="bias")
        planner = scramble(Linformer(k=5).planner(inputs.site))
        assert planner.e.shape == (17, 4)
        out = inputs.attention(planner(inputs))
        q, k, v = inputs.q, inputs.k, inputs.v
        keys = torch.cat([k[:, :, :1], torch.einsum("nr,bhnd->bhrd", planner.e, k)], 2)
        values = torch.cat([v[:, :, :1], torch.einsum("nr,bhnd->bhrd", planner.f, v)], 2)
        logits = q[:, :, 1:] @ keys.mT * inputs.scale
        logits[..., 1:] += planner.mass
        if host:
            weight = planner.e.abs() / planner.e.abs().sum(0)
            logits += torch.cat([bias[..., 1:, :1], bias[..., 1:, :] @ weight], -1)
        close(out[:, :, 1:], logits.softmax(-1) @ values)
        close(out[:, :, :1], inputs.attention()[:, :, :1])

    def test_linformer_of_as_many_keys_as_patches_is_dense(self) -> None:
        inputs = random_inputs((4, 4), prefix=1)
        plan = Linformer(k=1.0).planner(inputs.site)(inputs)
        close(inputs.attention(plan), inputs.attention())

    def test_linformer_starts_as_pooling_over_cells(self) -> None:
        inputs = random_inputs((4, 4), prefix=0)
        planner = Linformer(k=4).planner(inputs.site)
        pooled = F.avg_pool2d(inputs.k.mT.reshape(6, 8, 4, 4), 2).flatten(2).mT.view(2, 3, 4, 8)
        close(planner.e.mT @ inputs.k, pooled)
        close(planner.mass, torch.full((4,), 4.0).log())

    def test_lowrank_of_full_rank_is_dense_and_its_guide_scales_channels(self) -> None:
        inputs = random_inputs((4, 4), prefix=1)
        planner = LowRank(rank=1.0).planner(inputs.site)
        close(inputs.attention(planner(inputs)), inputs.attention())
        few = scramble(LowRank(rank=3).planner(inputs.site))
        mean = inputs.q[:, :, 1:].mean(2).flatten(1)
        guide = 2 * (F.gelu(mean @ few.hidden) @ few.last).sigmoid().view(2, 3, 1, 3)
        rows, keys = inputs.q[:, :, 1:] @ few.map_q, inputs.k @ few.map_k
        weights = (rows * guide @ keys.mT * inputs.scale).softmax(-1)
        close(inputs.attention(few(inputs))[:, :, 1:], weights @ inputs.v)

    def test_hypergraph(self) -> None:
        inputs = random_inputs((4, 4), prefix=1)
        planner = scramble(Hypergraph(k=5, members=3).planner(inputs.site))
        out = inputs.attention(planner(inputs))
        share = planner.mixture.sigmoid()
        for b in range(2):
            q, k, v = inputs.q[b], inputs.k[b], inputs.v[b]
            seen = sum(q[h, 0] @ k[h, 1:].T for h in range(3))
            centres = sorted(range(16), key=lambda i: -seen[i])[:4]
            near = [
                sum(k[h, 1 + c] @ k[h, 1:].T for h in range(3)).topk(3).indices for c in centres
            ]
            found = hyperedges(inputs, 4, 3)[b]
            assert [set(row.tolist()) for row in found] == [set(row.tolist()) for row in near]
            for h in range(3):
                keys = torch.stack([k[h, 1:][e].mean(0) for e in near])
                asks = torch.stack([q[h, 1:][e].mean(0) for e in near])
                own = torch.stack([v[h, 1:][e].mean(0) for e in near]) @ planner.values
                nodes = (asks @ k[h, 1:].T * inputs.scale).softmax(-1) @ v[h, 1:]
                values = torch.cat([v[h, :1], share * own + (1 - share) * nodes])
                logits = q[h, 1:] @ torch.cat([k[h, :1], keys]).T * inputs.scale
                logits[:, 1:] += torch.tensor(16 / 4).log()
                for e, nodes_of in enumerate(near):
                    logits[nodes_of, 1 + e] += planner.incidence
                close(out[b, h, 1:], logits.softmax(-1) @ values)

    @pytest.mark.parametrize("rank", [None, 2, "full"])
    def test_attention_reuse(self, rank: Any) -> None:
        first, second = random_inputs((4, 4), seed=1), random_inputs((4, 4), seed=2)
        first = at(first, 0)
        second = at(second, 1).replace(cross_layer=first.cross_layer)
        strategy = AttentionReuse(layers=[1], rank=rank)
        given = first.attention(strategy.planner(first.site)(first))
        close(given, first.attention())
        planner = strategy.planner(second.site)
        scores = first.q @ first.k.mT * first.scale
        if rank is not None:
            close(second.attention(planner(second)), scores.softmax(-1) @ second.v)
            scramble(planner)
            theta, psi = (torch.eye(17) + change(planner, name) for name in ("theta", "psi"))
            scores = (psi @ (theta @ scores).mT).mT
        close(second.attention(planner(second)), scores.softmax(-1) @ second.v)

    def test_skipat(self) -> None:
        first, second = random_inputs((4, 4), seed=1), random_inputs((4, 4), seed=2)
        first = at(first, 0)
        second = at(second, 1).replace(cross_layer=first.cross_layer)
        strategy = SkipAt(layers=[1])
        strategy.planner(first.site).after(first, first.attention())
        planner = strategy.planner(second.site)
        close(second.attention(planner(second)), first.attention())
        scramble(planner)
        x = first.attention().transpose(1, 2).flatten(2)[:, 1:]
        hidden = F.gelu(x @ planner.widen.T + planner.widen_bias)
        padded = F.pad(hidden.reshape(2, 4, 4, 48), (0, 0, 2, 2, 2, 2))
        windows = padded.unfold(1, 5, 1).unfold(2, 5, 1)
        hidden = torch.einsum("byxcij,cij->byxc", windows, planner.kernel[:, 0])
        hidden = F.gelu(hidden + planner.kernel_bias).flatten(1, 2)
        out = hidden @ planner.narrow.T + planner.narrow_bias
        mean = F.pad(out.mean(1), (1, 1))
        gate = sum(planner.gate[0, 0, i] * mean[:, i : i + 24] for i in range(3)).sigmoid()
        exact = (x + out * gate[:, None]).view(2, 16, 3, 8).transpose(1, 2)
        result = second.attention(planner(second))
        close(result[:, :, 1:], exact)
        assert torch.equal(result[:, :, :1], first.attention()[:, :, :1])


def change(planner: Any, name: str) -> Tensor:
    table: Tensor = getattr(planner, name)
    return table @ getattr(planner, f"{name}_in").T if hasattr(planner, f"{name}_in") else table


N, C, H, D = 65, 48, 3, 16
DENSE = 2 * N * N * C
KEEPS = 64 * (2 * 16 * C) + 2 * N * C  # 16 keys of width 2 D for 64 patches, the prefix row dense

MACS: dict[str, tuple[Strategy, int, int]] = {
    # what is left of QK^T and AV in four blocks, and what planning adds
    "linformer": (Linformer(k=17), 4 * (64 * 17 * 2 * C + 2 * N * C), 4 * 2 * N * 16 * C),
    "lowrank": (
        LowRank(rank=4, guide=None),
        4 * (64 * N * (12 + C) + 2 * N * C),
        4 * (64 + N) * C * 4,
    ),
    "hypergraph": (
        Hypergraph(k=17),
        4 * (64 * 17 * 2 * C + 2 * N * C),
        # who is central, who is near, edges to nodes, the map of their values
        4 * (64 * C + 16 * 64 * C + 2 * 16 * 64 * C + 16 * C * D),
    ),
    "reuse": (AttentionReuse(layers=[1, 2]), 3 * N * N * C + DENSE, N * N * C),
    "reuse rank 2": (
        AttentionReuse(layers=[1], rank=2),
        2 * N * N * C + 2 * DENSE,
        N * N * C + 2 * 2 * 2 * N * N * H,
    ),
    "reuse full": (
        AttentionReuse(layers=[1], rank="full"),
        2 * N * N * C + 2 * DENSE,
        N * N * C + 2 * H * N**3,
    ),
    "skipat": (SkipAt(layers=[1, 2], parametric=False), 2 * DENSE, 0),
    "skipat parametric": (
        SkipAt(layers=[3]),
        3 * DENSE,
        64 * 4 * C * C + 64 * 50 * C + 3 * C,
    ),
}


class TestMacs:
    @pytest.mark.parametrize("name", MACS)
    def test_report_and_profile_agree_with_the_closed_form(self, name: str) -> None:
        strategy, mhsa, predictor = MACS[name]
        model = tiny_vit(depth=4)
        with sparsiattn.patch(model, strategy) as live:
            report, profile = live.report(), sparsiattn.profile(model, tiny_images(1))
        assert (report.mhsa_macs, report.predictor_macs) == (mhsa, predictor)
        assert (profile.mhsa_macs, profile.predictor_macs) == (mhsa, predictor)
        assert report.macs == profile.macs == profile.macs_dense - 4 * DENSE + mhsa + predictor
        assert profile.computed.mhsa == mhsa
        assert profile.paper.mhsa == mhsa

    def test_full_tables_are_a_loss_at_the_size_of_deit_small(self) -> None:
        """Section 4's figures: N=197, C=384, H=6 adds 2 H N^3 = 91.7 M and saves N^2 C."""
        model = timm.create_model("deit_small_patch16_224", depth=2)
        with sparsiattn.patch(model, AttentionReuse(rank="full")) as live:
            report = live.report()
        made = 197 * 197 * 384
        assert report.predictor_macs == made + 2 * 6 * 197**3
        assert round(2 * 6 * 197**3 / 1e6, 1) == 91.7
        assert report.macs is not None
        assert report.macs > report.macs_dense
        with sparsiattn.patch(model, AttentionReuse()) as live:
            assert live.report().macs == report.macs_dense - made

    def test_a_site_left_dense_keeps_nothing_for_the_next(self) -> None:
        model, x = tiny_vit(depth=4), tiny_images(1)
        with sparsiattn.patch(model, AttentionReuse(layers=[1, 2])) as live, torch.no_grad():
            live.runtimes[0].dense = True
            rows = [row.predictor_macs for row in live.report().sites]
            assert rows == [0, N * N * C, 0, 0]  # the second one is the first that makes scores
            assert sparsiattn.profile(model, x).predictor_macs == N * N * C
