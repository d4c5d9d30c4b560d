"""Binary block masking: any boolean mask as lists of key blocks for the `gather` kernel.

After Sharma & Geiping, "Efficiently Dispatching Flash Attention for Partially Filled Attention
Masks" (arXiv 2409.15097): empty tiles of the mask are skipped, full tiles need no mask, and a
reverse Cuthill-McKee permutation can move pairs into fewer tiles. Unlike in the paper's kernel,
every tile of queries has a list of its active blocks (full ones first), which need not be
contiguous.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import (
    AttentionInputs,
    CallShape,
    GatheredMask,
    InvalidOption,
    InvalidType,
    Mask,
    Work,
    attend_gathered,
)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Query tiles with lists of similar length, for one batched product.

    Attributes:
        tiles: Indices of the query tiles, ``[R]``.
        index: Key blocks of each tile, ``[B|1, H|1, R, C]``, full ones first, padded with blocks
            that ``bias`` masks.
        bias: 0 or minus infinity on the last ``W`` of the ``C * block`` keys,
            ``[B|1, H|1, R, tile, W]``; all blocks before them are full.
        dead: True for rows without a key, ``[B|1, H|1, R, tile, 1]``; ``bias`` is 0 there.
    """

    tiles: Tensor
    index: Tensor
    bias: Tensor
    dead: Tensor


@dataclass(frozen=True, eq=False)
class BlockMask(GatheredMask):
    """A mask with its active blocks, made by `block_mask`. ``keep`` has the original token order.

    Attributes:
        tile: Number of queries in a tile of the mask.
        block: Number of keys in a tile of the mask.
        buckets: The lists; tiles without a key are in no list.
        order: Index of the token at each position, ``[N]``; None without reordering.
        active_tiles: ``[B|1, H|1, T, U]``, True if a tile of the (reordered) mask has any pair.
        full_tiles: ``[B|1, H|1, T, U]``, True if it has every pair.
    """

    tile: int = field(default=64, kw_only=True)
    block: int = field(default=32, kw_only=True)
    buckets: tuple[Bucket, ...] = field(default=(), kw_only=True)
    order: Tensor | None = field(default=None, kw_only=True)
    active_tiles: Tensor = field(kw_only=True)
    full_tiles: Tensor = field(kw_only=True)

    @property
    def active(self) -> int:
        """Number of tiles with at least one pair, over all images and heads with separate lists."""
        return int(self.active_tiles.sum())

    @property
    def full(self) -> int:
        """Number of tiles with every pair, counted in the same way."""
        return int(self.full_tiles.sum())

    @property
    def lists(self) -> int:
        """Number of separate lists: images times heads of the mask."""
        return self.keep.shape[0] * self.keep.shape[1]

    def active_macs(self, width: int) -> int:
        """MACs per head on active tiles; ``width`` is the channels of a key plus its value."""
        return self.active * self.tile * self.block * width // max(1, self.lists)

    def computed_macs(self, width: int) -> int:
        """MACs per head that a kernel computes, including the padding of lists."""
        slots = sum(bucket.index.shape[-1] * len(bucket.tiles) for bucket in self.buckets)
        return slots * self.tile * self.block * width

    def ideal_macs(self, width: int) -> int:
        """MACs per head on kept pairs only."""
        return int(self.keep.sum()) * width // max(1, self.lists)

    def with_prefix(self, prefix: int, *, keys: bool) -> BlockMask:
        """The mask with prefix tokens added, in block form; itself if the mask has them already.

        Masks that already include the prefix avoid recomputing the blocks in every call.
        """
        columns = prefix if keys else 0
        parts = self.keep[..., :prefix, :], self.keep[..., :columns]
        if self.keep.is_meta or all(bool(part.all()) for part in parts):
            return self
        keep = self.keep.clone()
        keep[..., :prefix, :] = True
        keep[..., :columns] = True
        mask = Mask(self.n_queries, self.n_keys, keep, summary=self.summary)
        reorder = self.order is not None
        return block_mask(mask, tile=self.tile, block=self.block, reorder=reorder)

    def describe(self) -> Hashable | None:
        shapes = tuple([(bucket.index.shape, bucket.bias.shape) for bucket in self.buckets])
        summary = self.summary and (self.summary.count, self.summary.bias.shape)
        return self.keep.shape, self.tile, self.block, shapes, self.order is None, summary

    def why_not_gather(self, inputs: AttentionInputs) -> list[str]:
        reasons = []
        if inputs.bias is not None:
            reasons.append("block masks do not support a host mask; combine both masks first")
        if self.summary is not None:
            reasons.append("block masks do not support background keys; use background=None")
        return reasons

    def gather_work(self, inputs: AttentionInputs) -> Work:
        call, buckets = CallShape.of(inputs), self.buckets
        rows = sum(len(b.tiles) * b.index.shape[-1] for b in buckets) * self.block
        biases = call.batch * call.heads * sum(b.bias.shape[-3:].numel() for b in buckets)
        moved = call.rows_bytes(rows + call.keys) + 3 * biases * call.dtype.itemsize
        pairs, calls = self.computed_macs(1), 20.0 + 20.0 * len(buckets)
        return call.attending(pairs, calls=calls, moved=moved)

    def gather(self, inputs: AttentionInputs) -> Tensor:
        q, k, v = (_reordered(x, self.order) for x in (inputs.q, inputs.k, inputs.v))
        q, k, v = _units(q, self.tile), _units(k, self.block), _units(v, self.block)
        factors = {"scale": inputs.scale, "dropout": inputs.dropout}
        tiles = q.new_zeros(*q.shape[:-1], v.shape[-1])
        for bucket in self.buckets:
            rows = q.index_select(2, bucket.tiles)
            out = attend_gathered(rows, k, v, bucket.index, bucket.bias, **factors)
            out = out.masked_fill(bucket.dead, 0.0)
            tiles = tiles.to(out.dtype).index_copy(2, bucket.tiles, out)
        result = tiles.flatten(2, 3)[:, :, : self.n_queries]
        return result if self.order is None else _reordered(result, torch.argsort(self.order))


def _reordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(-2, order)


def _units(x: Tensor, size: int) -> Tensor:
    """``[B, H, N, D]`` to ``[B, H, U, size, D]``, padded with zeros."""
    units: Tensor = F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))
    return units


def block_mask(
    mask: Mask | Tensor, *, tile: int = 64, block: int = 32, reorder: bool = False
) -> BlockMask:
    """The pattern of a boolean mask in block form, which is always equal to the mask.

    It reads the values of the mask. Compute it once for a static mask and keep the result; for a
    mask that depends on the image, every call costs about ``Nq * Nk`` reads and a sort. In a dry
    run, in which masks have no values, every tile counts as active.

    Args:
        mask: Boolean ``[B|1, H|1, Nq, Nk]``, or `Pattern.mask` of such a tensor.
        tile: Number of queries in a tile.
        block: Number of keys in a tile.
        reorder: Whether to permute tokens by reverse Cuthill-McKee for fewer active tiles. It needs
            SciPy and as many queries as keys; kernels undo the permutation.

    Returns:
        The pattern.

    Raises:
        InvalidType: ``mask`` is not a boolean mask.
        InvalidOption: A size is below 1, or tokens cannot be reordered.

    >>> import torch
    >>> near = torch.arange(256)
    >>> band = block_mask(((near[:, None] - near).abs() < 8)[None, None], tile=64, block=32)
    >>> band.active, band.full, band.to_mask().shape
    (14, 0, torch.Size([1, 1, 256, 256]))
    """
    keep = mask.keep if isinstance(mask, Mask) else mask
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.dim() != 4:
        got = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep)
        raise InvalidType(
            f"block_mask needs a boolean [B|1, H|1, Nq, Nk] tensor or Pattern.mask of one, got "
            f"{got}; pass the mask itself, as ranked patterns are key lists already"
        )
    for name, size in (("tile", tile), ("block", block)):
        if type(size) is not int or size < 1:
            raise InvalidOption(f"{name} must be an int >= 1, got {size!r}")
    order = rcm_order(keep) if reorder else None
    cells = _cells(keep if order is None else keep[..., order, :][..., order], tile, block)
    counts = cells.sum((-3, -1))
    active, full = counts > 0, counts == _sizes(keep, tile, block)
    return BlockMask(
        keep.shape[-2],
        keep.shape[-1],
        keep,
        summary=mask.summary if isinstance(mask, Mask) else None,
        tile=tile,
        block=block,
        buckets=_buckets(cells, active, full),
        order=order,
        active_tiles=active,
        full_tiles=full & active,
    )


def rcm_order(keep: Tensor) -> Tensor:
    """Token order ``[N]`` by reverse Cuthill-McKee on ``M | M^T``, over all heads."""
    if keep.shape[-2] != keep.shape[-1]:
        raise InvalidOption(
            f"reorder=True needs as many queries as keys, got {keep.shape[-2]} and "
            f"{keep.shape[-1]}; use reorder=False"
        )
    try:
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import reverse_cuthill_mckee
    except ImportError as error:
        raise InvalidOption(
            "reorder=True needs SciPy, which is not installed; install scipy or use reorder=False"
        ) from error
    if keep.is_meta:  # a dry run: any order will do
        return torch.arange(keep.shape[-1], device=keep.device)
    shared = keep.flatten(0, 1).any(0)
    graph = csr_matrix((shared | shared.mT).cpu().numpy())
    order = reverse_cuthill_mckee(graph, symmetric_mode=True)
    return torch.tensor(order.tolist(), dtype=torch.long, device=keep.device)


def _cells(keep: Tensor, tile: int, block: int) -> Tensor:
    """``[B, H, Nq, Nk]`` as ``[B, H, T, tile, U, block]``, padded with False."""
    rows, columns = -keep.shape[-2] % tile, -keep.shape[-1] % block
    padded = F.pad(keep, (0, columns, 0, rows))
    cells: Tensor = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, tile))
    return cells


def _sizes(keep: Tensor, tile: int, block: int) -> Tensor:
    """Number of pairs of a full tile, ``[T, 1]``.

    Positions past the last query are not read, so a partial last row of tiles can be full.
    Positions past the last key must be masked, so a partial last column is never full.
    """
    rows = torch.arange(-(-keep.shape[-2] // tile), device=keep.device)
    queries = (keep.shape[-2] - rows * tile).clamp_max(tile)
    return queries[:, None] * block


def _buckets(cells: Tensor, active: Tensor, full: Tensor) -> tuple[Bucket, ...]:
    """Group tiles by the length of their lists, in powers of two.

    One row that attends to every key therefore does not lengthen all lists.
    """
    lengths = active.sum(-1)
    if lengths.is_meta:  # a dry run: without values every tile counts as active
        longest = [active.shape[-1]] * active.shape[-2]
    else:
        longest = lengths.flatten(0, 1).amax(0).tolist()
    ranked = (active.int() + (full & active).int()).argsort(dim=-1, descending=True, stable=True)
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(longest):
        if length:
            groups.setdefault((length - 1).bit_length(), []).append(number)
    return tuple(
        _bucket(numbers, cells, ranked[..., : max(longest[n] for n in numbers)], full)
        for _, numbers in sorted(groups.items())
    )


def _bucket(numbers: list[int], cells: Tensor, ranked: Tensor, full: Tensor) -> Bucket:
    tiles = torch.tensor(numbers, device=cells.device)
    index = ranked[:, :, tiles]
    always_full = 0 if full.is_meta else int(full[:, :, tiles].sum(-1).min())
    mixed = index[..., min(always_full, index.shape[-1]) :]
    tile, block = cells.shape[3], cells.shape[5]
    pairs = cells[:, :, tiles].transpose(3, 4)  # [B, H, R, U, tile, block]
    pairs = pairs.gather(3, mixed[..., None, None].expand(*mixed.shape, tile, block))
    pairs = pairs.transpose(3, 4).flatten(-2)  # [B, H, R, tile, W]
    # rows past the last query are unmasked in full blocks, but are not read
    dead = pairs.new_zeros(*pairs.shape[:-1], 1) if always_full else ~pairs.any(-1, keepdim=True)
    bias = torch.zeros_like(pairs, dtype=torch.float32).masked_fill(~(pairs | dead), float("-inf"))
    return Bucket(tiles, index, bias, dead)
