"""`Site`: one attention call of one model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.structure import NO_PATCHES, Structure
from sparsiattn.errors import PLUGIN_REMOVED_IN, renamed_property


@dataclass(frozen=True)
class Site:
    """One attention call of one model, as found at patch time. Sizes are those of one window.

    Attributes:
        name: Module path, e.g. ``blocks.3.attn``.
        index: Position among the model's sites, from 0.
        depth: Number of sites of the model.
        tokens: Number of queries, prefix included.
        keys: Number of keys, prefix included.
        heads: Number of attention heads, H.
        head_dim: Width of a query and a key, D.
        value_dim: Width of a value, Dv.
        grid: Rows and columns of the patch queries, ``(1, n)`` if they are not in raster order.
        key_grid: The same for the patch keys.
        prefix_tokens: Number of tokens that are not patches (CLS, distillation, registers,
            prompts). Planners and kernels get all of them first, wherever the host has them; see
            ``structure``.
        windows: Windows per image; 1 for global attention.
        raster: Whether patch tokens are in raster order.
        calls: Attention calls in one forward pass (2 for differential attention).
        shared: Whether those calls must use the same keys.
        bias: The kind of mask that the host adds: ``"mask"`` can forbid keys, ``"bias"`` only
            favours some, ``"none"`` is no mask.
        halo: Number of patches by which the keys extend beyond the queries on every side.
        structure: How the host's sequence maps to the image, and the source of that knowledge;
            None for a site that was made by hand.
        lengths: Number of tokens in every call, if these are images of several sizes; ``tokens`` is
            that of the largest then.

    >>> import torch
    >>> x = torch.zeros(1, 2, 17, 8)
    >>> site = Site.of(x, x, x, prefix_tokens=1)
    >>> site.tokens, site.grid, site.macs
    (17, (4, 4), 9248)
    """

    name: str
    index: int
    depth: int
    tokens: int
    keys: int
    heads: int
    head_dim: int
    value_dim: int
    grid: Grid
    key_grid: Grid
    prefix_tokens: int = 0
    windows: int = 1
    raster: bool = True
    calls: int = 1
    shared: bool = False
    bias: Literal["none", "bias", "mask"] = "none"
    halo: int = 0
    structure: Structure | None = None
    lengths: tuple[int, ...] = ()

    margin = renamed_property("margin", "halo", PLUGIN_REMOVED_IN)

    @property
    def leading_tokens(self) -> int:
        """Number of special tokens before the patches, in the host's own order."""
        return self.prefix_tokens if self.structure is None else self.structure.prefix

    @property
    def suffix_tokens(self) -> int:
        """Number of special tokens after the patches, in the host's own order."""
        return 0 if self.structure is None else self.structure.suffix

    @property
    def reordered(self) -> bool:
        """Whether planners get the tokens in another order than the host's.

        They get special tokens first and patches in raster order.
        """
        merged = self.structure is not None and self.structure.merge > 1
        return self.prefix_tokens > self.leading_tokens or merged

    @property
    def packed(self) -> bool:
        """Whether its sequences are of several images, so that each call has its own grid."""
        return self.structure is not None and self.structure.packed

    @property
    def is_guess(self) -> bool:
        """Whether grid and special tokens were guessed from the number of tokens."""
        return self.structure is not None and not self.structure.known

    @property
    def of_image(self) -> bool:
        """Whether its tokens are known to be patches of the image, plus special tokens."""
        queries = self.structure is not None and self.structure.source == NO_PATCHES
        return not (self.is_guess or queries)

    @property
    def placed(self) -> bool:
        """Whether the positions of the tokens in the image (or images) are known."""
        return self.raster and not self.is_guess

    @property
    def views(self) -> int:
        """Number of images or frames in the sequence, stacked vertically in ``grid``."""
        return 1 if self.structure is None else self.structure.views

    @property
    def has_views_apart(self) -> bool:
        """Whether there are special tokens between the patches of several images."""
        return self.views > 1 and bool(self.structure and self.structure.specials)

    def described(self, structure: Structure) -> Site:
        """A copy with another structure of its sequence."""
        grid, same = structure.stacked_grid, self.keys == self.tokens
        return replace(
            self,
            grid=grid,
            key_grid=grid if same else self.key_grid,
            prefix_tokens=structure.special_count,
            raster=structure.raster,
            structure=structure,
        )

    @property
    def macs(self) -> int:
        """Multiply-accumulates of QK^T and AV for one image, dense."""
        pairs = self.tokens * self.keys * self.calls
        if self.lengths:
            pairs = sum(length**2 for length in self.lengths)
        return pairs * self.heads * self.windows * (self.head_dim + self.value_dim)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with one entry per field."""
        return asdict(self)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, prefix_tokens: int = 0, **fields: Any) -> Site:
        """A site that fits the given tensors; for tests and for use outside a model.

        Args:
            q: Queries ``[B, H, Nq, D]``.
            k: Keys ``[B, H, Nk, D]``.
            v: Values ``[B, H, Nk, Dv]``.
            prefix_tokens: Number of leading tokens that are not image patches.
            **fields: Other fields of the site; they override what the shapes imply.

        >>> import torch
        >>> x = torch.zeros(1, 2, 17, 8)
        >>> Site.of(x, x, x, prefix_tokens=1).grid
        (4, 4)
        """
        n, m = q.shape[-2] - prefix_tokens, k.shape[-2] - prefix_tokens
        known = {
            "name": "attn",
            "index": 0,
            "depth": 1,
            "tokens": q.shape[-2],
            "keys": k.shape[-2],
            "heads": q.shape[1],
            "head_dim": q.shape[-1],
            "value_dim": v.shape[-1],
            "grid": geometry.infer_grid(n),
            "key_grid": geometry.infer_grid(m),
            "prefix_tokens": prefix_tokens,
        }
        return cls(**{**known, **fields})
