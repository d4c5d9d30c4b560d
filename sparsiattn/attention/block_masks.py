"""Binary block masking: any boolean mask as lists of key blocks that a block kernel can take.

After Sharma & Geiping, "Efficiently Dispatching Flash Attention for Partially Filled Attention
Masks" (arXiv 2409.15097): tiles of the mask without a single pair are skipped, full tiles need no
mask, and reverse Cuthill-McKee may first bring the pairs together. Unlike the paper's kernel every
tile of queries has a list of its active blocks, full ones first, so they need not be one run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.pattern import Mask
from sparsiattn.errors import InvalidOption, InvalidType


@dataclass(frozen=True, eq=False)
class Bucket:
    """Query tiles whose lists are about as long, for one batched product.

    tiles: ids of the query tiles, ``[R]``. index: key blocks of each, ``[B|1, H|1, R, C]``, full
    ones first, padded with blocks that ``bias`` shuts. bias: 0 or minus infinity on the last ``W``
    of the ``C * block`` keys, ``[B|1, H|1, R, tile, W]``; before them every block is full. Rows
    without a key are open there and True in ``dead``, ``[B|1, H|1, R, tile, 1]``.
    """

    tiles: Tensor
    index: Tensor
    bias: Tensor
    dead: Tensor


@dataclass(frozen=True, eq=False)
class BlockMask(Mask):
    """A mask with its active blocks; made by `block_mask`. ``keep`` stays in the tokens' order.

    tile, block: queries and keys of a tile of the mask. buckets: the lists; tiles without a key are
    in none. order: which token stands at each place, ``[N]``, or None. active_tiles, full_tiles:
    ``[B|1, H|1, T, U]``, True where a tile of the (reordered) mask has any and every pair.
    """

    tile: int = field(default=64, kw_only=True)
    block: int = field(default=32, kw_only=True)
    buckets: tuple[Bucket, ...] = field(default=(), kw_only=True)
    order: Tensor | None = field(default=None, kw_only=True)
    active_tiles: Tensor = field(kw_only=True)
    full_tiles: Tensor = field(kw_only=True)

    @property
    def active(self) -> int:
        """Tiles with at least one pair, over all images and heads whose lists differ."""
        return int(self.active_tiles.sum())

    @property
    def full(self) -> int:
        """Tiles with every pair, counted in the same way."""
        return int(self.full_tiles.sum())

    @property
    def lists(self) -> int:
        """Heads and images whose lists differ."""
        return self.keep.shape[0] * self.keep.shape[1]

    def active_macs(self, width: int) -> int:
        """MACs per head on active tiles; width: of a key and its value together."""
        return self.active * self.tile * self.block * width // max(1, self.lists)

    def computed_macs(self, width: int) -> int:
        """MACs per head with the lists' padding, which is what a kernel computes."""
        slots = sum(b.index.shape[-1] * len(b.tiles) for b in self.buckets)
        return slots * self.tile * self.block * width

    def ideal_macs(self, width: int) -> int:
        """MACs per head on the surviving pairs alone."""
        return int(self.keep.sum()) * width // max(1, self.lists)


def block_mask(
    mask: Mask | Tensor, *, tile: int = 64, block: int = 32, reorder: bool = False
) -> BlockMask:
    """The pattern of a boolean mask ``[B|1, H|1, Nq, Nk]`` in block form; equal to it, always.

    It looks at the mask's values: do it once for a static mask and keep the result; for one that
    depends on the image its cost, about ``Nq * Nk`` reads and a sort, comes with every call. In a
    dry run, where masks have no values, every tile counts as active.
    tile, block: queries and keys of a tile. reorder: permute tokens by reverse Cuthill-McKee
    (SciPy; needs as many queries as keys) to have fewer active tiles; kernels undo it.

    Raises `InvalidType` for what is no mask, `InvalidOption` for sizes below 1 and for a reordering
    that cannot be had.

    >>> import torch
    >>> near = torch.arange(256)
    >>> found = block_mask(((near[:, None] - near).abs() < 8)[None, None], tile=64, block=32)
    >>> found.active, found.full, found.to_mask().shape
    (14, 0, torch.Size([1, 1, 256, 256]))
    """
    keep = mask.keep if isinstance(mask, Mask) else mask
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.dim() != 4:
        got = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep)
        raise InvalidType(
            f"block_mask needs a boolean [B|1, H|1, Nq, Nk] tensor or Pattern.mask of one, got "
            f"{got}; ranked patterns are lists of keys already"
        )
    for name, size in (("tile", tile), ("block", block)):
        if type(size) is not int or size < 1:
            raise InvalidOption(f"{name} must be an int >= 1, got {size!r}")
    order = rcm_order(keep) if reorder else None
    placed = keep if order is None else keep[..., order, :][..., order]
    cells = _cells(placed, tile, block)
    counts = cells.sum((-3, -1))
    active, whole = counts > 0, counts == _sizes(keep, tile, block)
    return BlockMask(
        keep.shape[-2], keep.shape[-1], keep,
        summary=mask.summary if isinstance(mask, Mask) else None,
        tile=tile, block=block, buckets=_buckets(cells, active, whole), order=order,
        active_tiles=active, full_tiles=whole & active,
    )  # fmt: skip


def with_prefix(pattern: BlockMask, prefix: int, *, keys: bool) -> BlockMask:
    """The pattern with leading queries, and with leading keys if wanted, open; itself if they are.
    A mask that opens them beforehand spares the search for its blocks in every call."""
    columns = prefix if keys else 0
    seen = pattern.keep[..., :prefix, :], pattern.keep[..., :columns]
    if pattern.keep.is_meta or all(bool(part.all()) for part in seen):
        return pattern
    keep = pattern.keep.clone()
    keep[..., :prefix, :] = True
    keep[..., :columns] = True
    mask = Mask(pattern.n_queries, pattern.n_keys, keep, summary=pattern.summary)
    reorder = pattern.order is not None
    return block_mask(mask, tile=pattern.tile, block=pattern.block, reorder=reorder)


def rcm_order(keep: Tensor) -> Tensor:
    """Token of every place, ``[N]``, by reverse Cuthill-McKee on ``M | M^T``, over all heads."""
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
    if keep.is_meta:  # a dry run: any order stands for it
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
    """Pairs of every tile when full, ``[T, U]``. Places past the last query ask for nothing, so a
    ragged last row of tiles can be full; places past the last key must be shut, so a ragged last
    column never is."""
    rows = torch.arange(-(-keep.shape[-2] // tile), device=keep.device)
    queries = (keep.shape[-2] - rows * tile).clamp_max(tile)
    return queries[:, None] * block


def _buckets(cells: Tensor, active: Tensor, whole: Tensor) -> tuple[Bucket, ...]:
    """Tiles by the length of their lists, in powers of two: one row that sees every key must not
    make all lists as long."""
    lengths = active.sum(-1)
    if lengths.is_meta:  # a dry run: without values every tile counts as active
        longest = [active.shape[-1]] * active.shape[-2]
    else:
        longest = lengths.flatten(0, 1).amax(0).tolist()
    ranked = (active.int() + (whole & active).int()).argsort(dim=-1, descending=True, stable=True)
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(longest):
        if length:
            groups.setdefault((length - 1).bit_length(), []).append(number)
    return tuple(
        _bucket(torch.tensor(rows, device=cells.device), cells, ranked, whole, max(
            longest[row] for row in rows
        ))
        for _, rows in sorted(groups.items())
    )  # fmt: skip


def _bucket(rows: Tensor, cells: Tensor, ranked: Tensor, whole: Tensor, width: int) -> Bucket:
    index = ranked[:, :, rows, :width]
    fulls = 0 if whole.is_meta else min(width, int(whole[:, :, rows].sum(-1).min()))
    last = index[..., fulls:]
    tile, block = cells.shape[3], cells.shape[5]
    inner = cells[:, :, rows].transpose(3, 4)  # [B, H, R, U, tile, block]
    picks = last[..., None, None].expand(*last.shape, tile, block)
    inner = inner.gather(3, picks).transpose(3, 4).flatten(-2)
    # rows past the last query are open where a full block says so, which nobody reads
    dead = ~inner.any(-1, keepdim=True) if not fulls else inner.new_zeros(*inner.shape[:-1], 1)
    bias = torch.zeros_like(inner, dtype=torch.float32).masked_fill(~(inner | dead), float("-inf"))
    return Bucket(rows, index, bias, dead)
