"""Methods that replace keys, weights or output instead of choosing keys."""

from __future__ import annotations

import pytest

from sparsiattn.methods.attention_reuse import AttentionReuse
from sparsiattn.methods.hypergraph import Hypergraph
from sparsiattn.methods.linformer import Linformer
from sparsiattn.methods.lowrank import LowRank
from sparsiattn.methods.skipat import SkipAt
from sparsiattn.testing import StrategySuite


class TestLinformer(StrategySuite):
    strategy = Linformer(k=0.25)


@pytest.mark.slow
class TestLinformerShared(StrategySuite):
    strategy = Linformer(k=12, shared=True, mass=False)


class TestLowRank(StrategySuite):
    strategy = LowRank(rank=0.5)


@pytest.mark.slow
class TestLowRankUnguided(StrategySuite):
    strategy = LowRank(rank=5, guide=None)


class TestHypergraph(StrategySuite):
    strategy = Hypergraph(k=0.25)


class TestAttentionReuse(StrategySuite):
    strategy = AttentionReuse()


@pytest.mark.slow
class TestAttentionReuseLowRank(StrategySuite):
    strategy = AttentionReuse(rank=4)


@pytest.mark.slow
class TestAttentionReuseFull(StrategySuite):
    strategy = AttentionReuse(rank="full")


class TestSkipAt(StrategySuite):
    strategy = SkipAt()

    def unread(self, name: str) -> bool:
        return name.startswith(("blocks.1.attn.qkv", "blocks.1.norm1"))


@pytest.mark.slow
class TestSkipAtIdentity(TestSkipAt):
    strategy = SkipAt(parametric=False)
