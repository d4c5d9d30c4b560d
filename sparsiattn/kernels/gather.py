"""Gathers the keys of every query tile, then runs small dense attentions: real savings."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.interception import dense_attention
from sparsiattn.kernel import Kernel
from sparsiattn.patterns import KeyIndex, Pattern
from sparsiattn.site import AttentionInputs

# Gathered keys and values of one chunk of tiles, in elements: larger temporaries leave the cache.
CHUNK_ELEMENTS = 1 << 20


class Gather(Kernel):
    """Key lists by gathering K and V per query tile; differentiable, never an N x N tensor.

    Without a host mask its memory is linear in the number of kept pairs. Cost follows the budget,
    so it wins where tiles are large and budgets small.
    """

    name = "gather"
    summary = "gathers each tile's keys, then dense attention on them (saves time with tiles)"

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        if not isinstance(pattern, KeyIndex):
            return [f"needs key lists, got a {type(pattern).__name__} pattern"]
        if pattern.summary is not None and pattern.summary.per_query:
            return ["background keys differ between queries under this host mask"]
        return []

    def speed(self, inputs: AttentionInputs, pattern: Pattern) -> float:
        # fitted to the rows with planning of benchmarks/results/kernels-cpu.json
        assert isinstance(pattern, KeyIndex)
        if pattern.tiles is None or pattern.tiles.size < 16:
            return 0.2
        keys = pattern.index.shape[-1] + (pattern.summary.count if pattern.summary else 0)
        return 0.38 * inputs.n_keys / (keys + 300)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, KeyIndex)
        rows = _Rows(inputs, pattern)
        out = torch.cat([rows.attend(chunk) for chunk in rows.chunks()], dim=2)
        patches = out.flatten(2, 3) if pattern.tiles is None else pattern.tiles.scatter(out)
        if not pattern.dense_rows:
            return patches
        return torch.cat([_dense_rows(inputs, pattern.dense_rows), patches], dim=-2)


def _dense_rows(inputs: AttentionInputs, count: int) -> Tensor:
    bias = inputs.bias
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., :count, :]
    q = inputs.q[..., :count, :]
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    return dense_attention(q, inputs.k, inputs.v, bias, inputs.dropout, scale=inputs.scale)


class _Rows:
    """One call's operands, packed so that a chunk of tiles needs one gather for K and one for V."""

    def __init__(self, inputs: AttentionInputs, pattern: KeyIndex) -> None:
        self.inputs, self.pattern = inputs, pattern
        self.lead = inputs.q.shape[:2]
        self.k, self.v = inputs.k, inputs.v
        self.bias = _hardened(inputs)
        summary = pattern.summary
        if summary is not None:
            self.k, self.v = (torch.cat([x, summary.pool(x)], -2) for x in (self.k, self.v))
        index = pattern.index.expand(*self.lead, -1, -1)
        if summary is not None:
            cells = torch.arange(summary.count, device=index.device) + inputs.n_keys
            index = torch.cat([index, cells.expand(*index.shape[:-1], -1)], dim=-1)
        self.index = index
        tiles = pattern.tiles
        patches = inputs.q[..., pattern.dense_rows :, :]
        self.q = patches.unsqueeze(-2) if tiles is None else tiles.gather(patches)

    def chunks(self) -> list[slice]:
        """Slices over tiles whose gathered keys and values stay in cache."""
        count, keys = self.index.shape[-2:]
        width = self.k.shape[-1] + self.v.shape[-1]
        step = max(1, CHUNK_ELEMENTS // (self.lead[0] * self.lead[1] * keys * width))
        return [slice(i, i + step) for i in range(0, count, step)]

    def attend(self, chunk: slice) -> Tensor:
        """``[B, H, T, t, Dv]`` of the chunk's tiles."""
        index = self.index[:, :, chunk]
        q = self.q[:, :, chunk]
        k, v = (_take(x, index) for x in (self.k, self.v))
        mask, dead = self._mask(index, chunk)
        lead = q.shape[:2]
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        out = dense_attention(
            flat[0],
            flat[1],
            flat[2],
            _flat_mask(mask, lead, q.dtype),
            self.inputs.dropout,
            scale=self.inputs.scale,
        )
        out = out.view(*lead, *out.shape[1:])
        return out if dead is None else out.masked_fill(dead, 0.0)

    def _mask(self, index: Tensor, chunk: slice) -> tuple[Tensor | None, Tensor | None]:
        """Additive mask ``[B|1, H|1, T, t|1, K + G]`` and rows without a key."""
        rows = self._summary_rows(chunk)
        host = self._host_rows(chunk)
        if host is None:
            return self._pad_keys(rows), None
        keys = index[..., : self.pattern.index.shape[-1]].unsqueeze(-2)
        lead = (*self.lead, *host.shape[2:4])
        host = host.expand(*lead, -1).gather(-1, keys.expand(*lead, -1))
        if host.dtype == torch.bool:
            host = torch.zeros_like(host, dtype=self.q.dtype).masked_fill(~host, float("-inf"))
        mask = host.to(self.q.dtype)
        if rows is not None:
            wide = torch.broadcast_shapes(mask.shape[:-1], rows.shape[:-1])
            mask = torch.cat([mask.expand(*wide, -1), rows.to(mask.dtype).expand(*wide, -1)], -1)
        dead = (mask == float("-inf")).all(-1, keepdim=True)
        return mask.masked_fill(dead, 0.0), dead

    def _pad_keys(self, rows: Tensor | None) -> Tensor | None:
        """The summary's logits behind zeros for the ordinary keys."""
        if rows is None:
            return None
        zeros = rows.new_zeros(*rows.shape[:-1], self.pattern.index.shape[-1])
        return torch.cat([zeros, rows], dim=-1)

    def _summary_rows(self, chunk: slice) -> Tensor | None:
        """``[B|1, H|1, T, t|1, G]``."""
        summary, tiles = self.pattern.summary, self.pattern.tiles
        if summary is None:
            return None
        if tiles is not None and summary.bias.shape[-2] != tiles.count:
            return tiles.gather(summary.bias)[:, :, chunk]
        return summary.bias.unsqueeze(-2)[:, :, chunk]

    def _host_rows(self, chunk: slice) -> Tensor | None:
        """The host's mask for the chunk's queries, ``[B|1, H|1, T, t|1, Nk]``."""
        bias, tiles = self.bias, self.pattern.tiles
        if bias is None:
            return None
        if bias.shape[-2] == 1:
            shape = (*bias.shape[:2], self.q[:, :, chunk].shape[2], 1, bias.shape[-1])
            return bias.unsqueeze(-2).expand(shape)
        patches = bias[..., self.pattern.dense_rows :, :]
        rows = patches.unsqueeze(-2) if tiles is None else tiles.gather(patches)
        return rows[:, :, chunk]


def _hardened(inputs: AttentionInputs) -> Tensor | None:
    """The host's mask with keys it all but forbids (Swin's -100) forbidden: a tile's list may hold
    only such keys for one of its queries."""
    bias, allowed = inputs.bias, inputs.allowed()
    if bias is None or allowed is None or bias.dtype == torch.bool:
        return bias
    return bias.masked_fill(~allowed, float("-inf"))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``[B, H, N, D]`` by ``[B, H, T, K]``: ``[B, H, T, K, D]``, by one flat gather."""
    b, h, n, d = x.shape
    base = torch.arange(b * h, device=x.device).view(b, h, 1, 1) * n
    return x.reshape(b * h * n, d).index_select(0, (index + base).flatten()).view(*index.shape, d)


def _flat_mask(mask: Tensor | None, lead: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """``[B|1, H|1, T, t|1, K]`` to ``[B * H, T, t|1, K]``."""
    if mask is None:
        return None
    return mask.to(dtype).expand(*lead, *mask.shape[2:]).flatten(0, 1)
