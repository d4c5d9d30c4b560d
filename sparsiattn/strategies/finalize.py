"""Finishes the patterns of planners, so that a kernel can compute them.

A planner returns scores or a mask and can ignore prefix tokens, tiles, blocks, the host's mask and
background. `finish` adds these: prefix keys that are always kept, one key list per tile, forbidden
keys last, and summary keys for the dropped ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.auto_options import MOST_CELLS
from sparsiattn.attention.background import CountedSummary, Summary, key_cells, key_counts
from sparsiattn.attention.budget import at_most, blocks_within, count_of
from sparsiattn.attention.geometry import Tiles
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyIndex, KeyLists
from sparsiattn.attention.pattern import ComputedPattern, Dense, Mask, Pattern, Ranked
from sparsiattn.attention.top_logits import TopKeys, TopLogits
from sparsiattn.errors import InvalidOption, InvalidType
from sparsiattn.kernels import triton_plan
from sparsiattn.kernels.native import lists as native_lists
from sparsiattn.kernels.native import rows as native_rows
from sparsiattn.kernels.native import scores as native
from sparsiattn.kernels.native.factors import host_bias_of


def finish(
    pattern: Pattern,
    inputs: AttentionInputs,
    *,
    prefix_keys: bool = True,
    background: int | None = None,
    max_keys: int | None = None,
) -> Pattern:
    """Turn a planner's pattern into the pattern to compute: dense, a mask or key lists.

    Args:
        pattern: The pattern that the planner returned.
        inputs: The operands of the call.
        prefix_keys: Whether to keep every prefix key (within the budget, if there is one).
        background: Pool the dropped keys of each cell of a g x g grid into one summary key; None
            for no summary keys.
        max_keys: Keys of a list at most, whatever the planner's budget; None for no limit.

    Raises:
        InvalidType: The planner did not return a pattern.
        InvalidOption: The size of the pattern does not fit the call.
    """
    # without prefix_keys, prefix keys compete with patch keys, which needs single keys
    blocks = inputs.blocks if prefix_keys or not inputs.prefix else None
    # the compiled planner has ranked blocks for these inputs, so sizes need no check
    ranked = isinstance(pattern, Ranked) and pattern.best is not None
    if not ranked:
        _check_size(pattern, inputs, blocks)
    if max_keys is not None and isinstance(pattern, (Ranked, TopLogits)):
        pattern = replace(pattern, k=at_most(pattern.k, inputs.n_keys, max_keys))
    if isinstance(pattern, TopLogits):
        in_blocks = blocks if pattern.in_blocks else None
        voted = None
        if in_blocks is None and _ranks_patches(pattern, inputs, prefix_keys):
            voted = _voted_on_gpu(pattern, inputs, background)
        if voted is not None:
            return voted
        pattern = _rank_logits(pattern, inputs, prefix_keys, in_blocks)
    elif isinstance(pattern, Ranked):
        pattern = _rank(pattern, inputs, prefix_keys, blocks)
    elif isinstance(pattern, (KeyIndex, Mask)):
        pattern = _complete(pattern, inputs, prefix_keys, max_keys)
    if background is None or isinstance(pattern, (Dense, ComputedPattern)):
        return pattern
    return _with_summary(pattern, inputs, background)


def _complete(
    pattern: KeyIndex | Mask, inputs: AttentionInputs, prefix_keys: bool, max_keys: int | None
) -> Pattern:
    """Add prefix rows (and keys, to a mask) to a pattern whose keys are not ranked."""
    if max_keys is not None:
        raise InvalidOption(
            f"max_keys={max_keys} needs a strategy that ranks keys (Pattern.top), but the planner "
            f"at site {inputs.site.name!r} returned a fixed set: leave max_keys out"
        )
    if isinstance(pattern, KeyIndex) or not inputs.prefix:
        return pattern
    return pattern.with_prefix(inputs.prefix, keys=prefix_keys)


def _check_size(pattern: Pattern, inputs: AttentionInputs, blocks: Tiles | None) -> None:
    if not isinstance(pattern, Pattern):
        raise InvalidType(
            f"a planner must return a sparsiattn.Pattern (Pattern.top, Pattern.mask or "
            f"Pattern.dense), got {type(pattern).__name__} at site {inputs.site.name!r}"
        )
    rows, columns = [inputs.n_queries], [inputs.n_keys]
    if isinstance(pattern, Ranked):
        rows.append(inputs.n_queries - inputs.prefix)
        if inputs.tiles is not None:
            rows.append(inputs.tiles.count)
        if blocks is not None:
            columns.append(blocks.count)
    if pattern.n_keys not in columns or pattern.n_queries not in rows:
        raise InvalidOption(
            f"site {inputs.site.name!r} needs a pattern of {sorted(set(rows))} rows over "
            f"{inputs.n_keys} keys, got {pattern.n_queries} rows over {pattern.n_keys}; "
            "score every key of inputs.k, with one row per query of inputs.q"
        )


def _rank(
    pattern: Ranked, inputs: AttentionInputs, prefix_keys: bool, blocks: Tiles | None
) -> Pattern:
    """Top-k lists per tile or patch query; forbidden keys last, prefix keys first."""
    if count_of(pattern.k, inputs.n_keys) == inputs.n_keys:
        return Pattern.dense(inputs.n_queries, inputs.n_keys)
    scores = _row_scores(pattern.scores, inputs)
    keys = count_of(pattern.k, inputs.n_keys)
    if blocks is not None and keys > inputs.prefix:
        return _rank_blocks(pattern, scores, inputs, blocks)
    if scores.shape[-1] != inputs.n_keys:  # scores of blocks, but prefix keys use up the budget
        scores = scores.new_zeros(*scores.shape[:-1], inputs.n_keys)
    allowed = _row_allowed(inputs)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    index = native_lists.best_keys(scores, keys, inputs.prefix if prefix_keys else 0)
    # by keyword: Dynamo before torch 2.11 counts the keyword-only `summary` as positional
    rows, tiles = inputs.prefix, inputs.tiles
    return KeyIndex(inputs.n_queries, inputs.n_keys, index=index, tiles=tiles, dense_rows=rows)


def _rank_logits(
    pattern: TopLogits, inputs: AttentionInputs, prefix_keys: bool, blocks: Tiles | None
) -> Pattern:
    """Lists that a kernel finds while it computes, if one can; else as `_rank`."""
    keys, fits = count_of(pattern.k, inputs.n_keys), _ranks_patches(pattern, inputs, prefix_keys)
    if inputs.tiles is None:
        compiled = native_rows.serves(inputs)
    else:
        compiled = native_rows.plans(inputs) and pattern.votes
    if blocks is not None or not fits or not compiled:
        return _rank(pattern.ranked(), inputs, prefix_keys, blocks)
    tiles, rows, prefix = inputs.tiles, inputs.prefix, inputs.prefix
    if tiles is not None:
        # the choice has no gradient
        q, k = inputs.q.detach(), inputs.k.detach()
        bias, *bias_options = host_bias_of(inputs)
        bias = None if bias is None else bias.detach()
        sizes = (tiles.count, keys, prefix, inputs.scale)
        index = native_lists.voted_keys(q, k, *pattern.voter_tokens, *sizes, bias, *bias_options)
        return KeyIndex(inputs.n_queries, inputs.n_keys, index=index, tiles=tiles, dense_rows=rows)

    def make_index() -> Tensor:
        exact = replace(pattern, inputs=_at_least_float32(inputs))  # as in the kernel
        ranked = _rank(exact.ranked(), inputs, prefix_keys, None)
        assert isinstance(ranked, KeyIndex)
        return ranked.index

    return TopKeys(
        inputs.n_queries,
        inputs.n_keys,
        keys=keys,
        prefix=prefix,
        make_index=make_index,
        dense_rows=rows,
    )


def _ranks_patches(pattern: TopLogits, inputs: AttentionInputs, prefix_keys: bool) -> bool:
    """Whether lists hold all prefix keys, and some but not all of the others."""
    keys = count_of(pattern.k, inputs.n_keys)
    return inputs.prefix < keys < inputs.n_keys and (prefix_keys or not inputs.prefix)


def _voted_on_gpu(
    pattern: TopLogits, inputs: AttentionInputs, background: int | None
) -> KeyIndex | None:
    """Lists and summary from kernels that vote, rank and count; None if they do not serve."""
    if not triton_plan.serves(pattern):
        return None
    parts = None if background is None else _parts(inputs, background)
    index, bias = triton_plan.voted_lists(pattern, count_of(pattern.k, inputs.n_keys), parts)
    tiles, rows, source = inputs.tiles, inputs.prefix, (inputs.key_grid, inputs.prefix)
    summary = None
    if parts is not None and bias is not None:
        cells = inputs.table(key_cells, source[0], parts, source[1])
        summary = Summary(cells, parts, bias, source=source)
    sizes = inputs.n_queries, inputs.n_keys
    return KeyIndex(*sizes, index=index, tiles=tiles, dense_rows=rows, summary=summary)


def _at_least_float32(inputs: AttentionInputs) -> AttentionInputs:
    if inputs.q.dtype.itemsize > 2:
        return inputs
    return inputs.replace(q=inputs.q.float(), k=inputs.k.float())


def _rank_blocks(
    pattern: Ranked, scores: Tensor, inputs: AttentionInputs, blocks: Tiles
) -> KeyBlocks:
    """The best-scored blocks; the last one may exceed the budget in part."""
    count, chosen = blocks_within(pattern.k, inputs.n_keys, inputs.prefix, blocks), pattern.best
    if chosen is None or chosen.shape[-1] != count:
        if scores.shape[-1] == inputs.n_keys:
            scores = blocks.mean(scores[..., inputs.prefix :].mT).mT
        chosen = native.top(scores, count)
    return KeyBlocks(  # by keyword, as `KeyIndex` above
        inputs.n_queries,
        inputs.n_keys,
        chosen=chosen,
        blocks=blocks,
        keys=count_of(pattern.k, inputs.n_keys),
        prefix=inputs.prefix,
        tiles=inputs.tiles,
        dense_rows=inputs.prefix,
    )


def _row_scores(scores: Tensor, inputs: AttentionInputs) -> Tensor:
    """Drop the prefix rows and average over tiles, unless the planner has done so."""
    patches = inputs.n_queries - inputs.prefix
    if scores.shape[-2] == inputs.n_queries:
        scores = scores[..., inputs.prefix :, :]
    if inputs.tiles is not None and scores.shape[-2] == patches:
        # repeated slots have weight 0, and 0 * inf is NaN
        return inputs.tiles.mean(scores.clamp_min(torch.finfo(scores.dtype).min / 4096))
    return scores


def _row_allowed(inputs: AttentionInputs) -> Tensor | None:
    """Keys that at least one query of each row may attend to; None for all."""
    allowed = inputs.allowed()
    if allowed is None or allowed.shape[-2] == 1:
        return allowed
    allowed = allowed[..., inputs.prefix :, :]
    tiles = inputs.tiles
    return allowed if tiles is None else tiles.mean(allowed.float()) > 0


def _with_summary(pattern: Pattern, inputs: AttentionInputs, g: int) -> Pattern:
    assert isinstance(pattern, (KeyIndex, KeyBlocks, TopKeys, Mask))
    parts = _parts(inputs, g)
    source = inputs.key_grid, inputs.prefix
    cells = inputs.table(key_cells, source[0], parts, source[1])
    allowed = inputs.allowed()
    count_bias = _bias_counter(pattern, inputs, allowed, cells, parts)
    shared = allowed is None or allowed.shape[-2] == 1
    can_count = shared and isinstance(pattern, KeyLists)
    can_count = can_count and native.counts(inputs.q, parts[0] * parts[1], inputs.device)
    if can_count or isinstance(pattern, TopKeys):
        summary = CountedSummary(cells, parts, count_bias, allowed, source)
        return replace(pattern, summary=summary)
    return replace(pattern, summary=Summary(cells, parts, count_bias(), allowed, source))


def _bias_counter(
    pattern: Pattern,
    inputs: AttentionInputs,
    allowed: Tensor | None,
    cells: Tensor,
    parts: geometry.Grid,
) -> Callable[[], Tensor]:
    """A function that computes the summary's bias.

    The bias contains logs of counts: log(0) is minus infinity, so an empty cell has no weight.
    """
    if isinstance(pattern, KeyLists) and inputs.bias is None:
        if isinstance(pattern, KeyBlocks) and pattern.blocks.even:
            sizes = inputs.key_grid, inputs.block, parts, inputs.key_views
            return partial(_bias_by_block, pattern, cells.device, *sizes)
        total = inputs.table(key_counts, inputs.key_grid, parts, inputs.prefix)
        return partial(_bias_by_index, pattern, cells, total)
    return partial(_bias_by_mask, pattern, inputs, allowed, cells, parts[0] * parts[1])


def _parts(inputs: AttentionInputs, g: int) -> geometry.Grid:
    return cell_parts(inputs.key_grid, g, inputs.key_views)


def cell_parts(grid: geometry.Grid, g: int, views: int = 1) -> geometry.Grid:
    """Rows and columns of cells: g x g for each view.

    A single row of tokens gets g * g cells in one row. If one cell per view would be more cells
    than compiled code can count, cells span several views.

    >>> cell_parts((14, 14), 5), cell_parts((1, 100), 5), cell_parts((3 * 14, 14), 2, 3)
    ((5, 5), (1, 25), (6, 2))
    """
    if grid[0] == 1:
        return 1, min(g * g, grid[1])
    rows = views * min(g, grid[0] // views)
    return (min(rows, MOST_CELLS) if views > 1 == g else rows), min(g, grid[1])


def _bias_by_index(pattern: KeyLists, cells: Tensor, total: Tensor) -> Tensor:
    """The log of how many keys of each cell a list leaves out, ``[..., T, G]``.

    Args:
        pattern: The lists.
        cells: Cell of every key, ``[Nk]``.
        total: Number of keys of every cell, ``[G + 1]``.
    """
    index = pattern.index
    minus_one = geometry.table(torch.full, (1,), -1.0, device=cells.device)
    rest = total.expand(*index.shape[:-1], -1)
    rest = rest.scatter_add(-1, cells[index], minus_one.expand(index.shape))
    return rest[..., :-1].log()


def _bias_by_block(
    pattern: KeyBlocks,
    device: torch.device,
    grid: geometry.Grid,
    block: geometry.Tile,
    parts: geometry.Grid,
    views: int,
) -> Tensor:
    """As `_bias_by_index`, using tables of how many keys of each cell a block holds."""
    size = pattern.blocks.size
    full_blocks, partial_keys = divmod(pattern.keys - pattern.prefix, size)
    sizes = grid, block, parts, views
    members, total = geometry.table(_members_of_first, *sizes, device=device)
    lists = pattern.chosen[..., :full_blocks]
    if lists.is_cpu:  # where this is faster than one step
        rows = members[size].index_select(0, lists.flatten())
        rows = rows.view(*lists.shape, parts[0] * parts[1])
    else:
        rows = members[size][lists]
    picked = rows.sum(-2)
    if partial_keys:
        picked = picked + members[partial_keys][pattern.chosen[..., full_blocks]]
    return (total - picked).log()


def _members_of_first(
    grid: geometry.Grid,
    block: geometry.Tile,
    parts: geometry.Grid,
    views: int,
    *,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """How many of the first i keys of a block lie in each cell, and how many keys a cell holds.

    Returns:
        ``[size + 1, blocks, cells]`` and ``[cells]``.
    """
    assert not isinstance(block, int)
    cells = geometry.cell_ids(grid, parts, device=device)
    order = geometry.tiles(grid, block, views, device=device).order
    ids = torch.arange(parts[0] * parts[1], device=device)
    is_member = (cells[order].mT.unsqueeze(-1) == ids).float()
    members = torch.cat([torch.zeros_like(is_member[:1]), is_member.cumsum(0)])
    return members, members[-1].sum(0)


def _bias_by_mask(
    pattern: Pattern, inputs: AttentionInputs, allowed: Tensor | None, cells: Tensor, count: int
) -> Tensor:
    """Log count of each query's dropped keys, plus the mean of the host's bias over them.

    Lists have no rows for prefix queries.
    """
    bias = bias_of_dropped(pattern.to_mask(), inputs, allowed, cells, count)
    return bias[..., inputs.prefix :, :] if isinstance(pattern, KeyLists) else bias


def bias_of_dropped(
    keep: Tensor, inputs: AttentionInputs, allowed: Tensor | None, cells: Tensor, count: int
) -> Tensor:
    """The bias of summary keys: log counts of dropped keys, plus means of the host's bias.

    Args:
        keep: Keys that each row keeps, ``[B|1, H|1, R, Nk]``.
        inputs: The operands of the call; its bias must broadcast to these rows.
        allowed: Keys that the host allows for each row; None for all.
        cells: Cell of every key, ``[Nk]``.
        count: Number of cells, G.

    Returns:
        ``[B|1, H|1, R, G]``.
    """
    dropped = ~keep if allowed is None else ~keep & allowed
    is_member = (cells[:, None] == torch.arange(count, device=cells.device)).float()
    counts = dropped.float() @ is_member
    bias = counts.log()
    if inputs.bias is None or inputs.bias.dtype == torch.bool:
        return bias
    # clamped, since inf * 0 is NaN
    host = torch.where(dropped, inputs.bias.float().clamp_min(-1e4), 0.0) @ is_member
    return bias + host / counts.clamp_min(1.0)
