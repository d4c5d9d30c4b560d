"""What kernels that fill places in lists compute: padding of tiles and blocks counts as work."""

from __future__ import annotations

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyLists


def slot_macs(
    inputs: AttentionInputs,
    pattern: KeyLists,
    slots: int,
    *,
    tile: int | None = None,
    width: int | None = None,
) -> int:
    """QK^T and AV over ``slots`` places for every query of every tile, the dense rows of prefix
    queries and the pooling of summary keys. tile: queries of a tile as the kernel pads them; width:
    of a key and its value, padded."""
    tiles, summary = pattern.tiles, pattern.summary
    exact = inputs.q.shape[-1] + inputs.v.shape[-1]
    rows = pattern.n_queries - pattern.dense_rows if tiles is None else tiles.count
    size = (1 if tiles is None else tiles.size) if tile is None else tile
    pooled = 0 if summary is None else summary.count * pattern.n_keys
    each = rows * size * slots * (exact if width is None else width)
    each += (pattern.dense_rows * pattern.n_keys + pooled) * exact
    return int(inputs.q.shape[:-2].numel() * each)


def summary_count(pattern: KeyLists) -> int:
    return 0 if pattern.summary is None else pattern.summary.count
