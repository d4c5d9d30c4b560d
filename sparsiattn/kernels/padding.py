"""MACs of kernels that compute padded lists: padding of tiles and blocks counts as work."""

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
    dense_rows: int | None = None,
) -> int:
    """Multiply-accumulates of QK^T and AV, including prefix queries and pooling of summary keys.

    Args:
        inputs: The operands of the call.
        pattern: Its key lists.
        slots: Number of positions in every list, padding included.
        tile: Number of queries of a tile as the kernel pads it; None for no padding.
        width: Channels of a key plus its value as the kernel pads them; None for no padding.
        dense_rows: Number of prefix queries, if the kernel computes and pads them like a tile;
            None for the dense attention of torch.
    """
    exact = inputs.q.shape[-1] + inputs.v.shape[-1]
    padded = exact if width is None else width
    prefix = pattern.dense_rows * exact if dense_rows is None else dense_rows * padded
    rows = list_count(pattern) * (tile_size(pattern) if tile is None else tile)
    pooled = 0 if pattern.summary is None else pattern.summary.count * pattern.n_keys
    each = rows * slots * padded + prefix * pattern.n_keys + pooled * exact
    return int(inputs.q.shape[:-2].numel() * each)


def list_count(pattern: KeyLists) -> int:
    """Number of lists of one image and head, T: one for every tile."""
    tiles = pattern.tiles
    return pattern.n_queries - pattern.dense_rows if tiles is None else tiles.count


def tile_size(pattern: KeyLists) -> int:
    """Number of queries that share one list."""
    return 1 if pattern.tiles is None else pattern.tiles.size


def summary_count(pattern: KeyLists) -> int:
    """Number of summary keys of every list."""
    return 0 if pattern.summary is None else pattern.summary.count


def row_keys(pattern: KeyLists) -> int:
    """Number of keys that every query sees, summary keys included."""
    return pattern.width + summary_count(pattern)
