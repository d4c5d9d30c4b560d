"""Masks of plug-ins that say themselves how the `gather` kernel computes them."""

from __future__ import annotations

from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Mask
from sparsiattn.kernels.cost import Work
from sparsiattn.kernels.gather_ops import GatherOperands, attend


class GatheredMask(Mask):
    """A mask whose structure saves work: the `gather` kernel asks it instead of its own lists.

    Every other kernel computes it as the `Mask` that it is, or refuses. Subclass it as a frozen
    dataclass, override the three methods, and `Pattern.describe` so that choices of kernels are
    kept between calls. `block_mask` makes one.

    Attributes:
        n_queries: Of `Mask`, as the next three.
        n_keys: Keys.
        keep: The surviving pairs.
        summary: Pooled keys.
    """

    def why_not_gather(self, inputs: AttentionInputs) -> list[str]:
        """Every reason why this call cannot be gathered, as `Kernel.why_not` gives them."""
        raise NotImplementedError

    def gather_work(self, inputs: AttentionInputs) -> Work:
        """What gathering does, counted from shapes, as `Kernel.work` does."""
        raise NotImplementedError

    def gather(self, inputs: AttentionInputs) -> Tensor:
        """Attention over the surviving pairs, ``[B, H, Nq, Dv]``; a row without a key is zero."""
        raise NotImplementedError


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of query tiles, each over units of keys of its own; differentiable.

    Args:
        q: Tiles of ``t`` queries, ``[B, H, T, t, D]``.
        k: Units of ``g`` keys, ``[B, H, U, g, D]``.
        v: Their values, ``[B, H, U, g, Dv]``.
        index: The units of each tile, ``[B|1, H|1, T, C]``.
        bias: Added to the logits of the last ``W`` of a tile's ``C * g`` keys,
            ``[B|1, H|1, T, t|1, W]``.
        scale: Factor of QK^T.
        dropout: Of attention weights.

    Returns:
        ``[B, H, T, t, Dv]``.

    >>> import torch
    >>> x = torch.ones(1, 1, 2, 4, 8)
    >>> attend_gathered(x, x, x, torch.tensor([[[[0], [1]]]]), scale=1.0).shape
    torch.Size([1, 1, 2, 4, 8])
    """
    return attend(GatherOperands(q, k, v, index, bias, scale, dropout))
