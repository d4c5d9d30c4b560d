"""`GatheredMask`: masks of plug-ins that define how the `gather` kernel computes them."""

from __future__ import annotations

from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Mask
from sparsiattn.kernels.gather_ops import GatherOperands, attend
from sparsiattn.kernels.prices import Work


class GatheredMask(Mask):
    """A mask whose structure saves work in the `gather` kernel, which calls its methods.

    Other kernels treat it as a plain `Mask`, or refuse it. Subclass it as a frozen dataclass and
    override the three methods, and `Pattern.describe` so that choices of kernels are cached.
    `block_mask` makes one.

    Attributes:
        n_queries: Number of queries, prefix included.
        n_keys: Number of keys, prefix included.
        keep: ``[B|1, H|1, Nq, Nk]``, True where the pair survives.
        summary: Pooled keys that stand for the dropped ones; None if there are none.
    """

    def why_not_gather(self, inputs: AttentionInputs) -> list[str]:
        """Every reason why this call cannot be gathered, like `Kernel.why_not`."""
        raise NotImplementedError

    def gather_work(self, inputs: AttentionInputs) -> Work:
        """The work of gathering, counted from shapes, like `Kernel.work`."""
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
    """Attention of query tiles, each over its own units of keys; differentiable.

    Args:
        q: Tiles of ``t`` queries, ``[B, H, T, t, D]``.
        k: Units of ``g`` keys, ``[B, H, U, g, D]``.
        v: Their values, ``[B, H, U, g, Dv]``.
        index: The units of each tile, ``[B|1, H|1, T, C]``.
        bias: Added to the logits of the last ``W`` of a tile's ``C * g`` keys,
            ``[B|1, H|1, T, t|1, W]``; None if there is none.
        scale: Factor of QK^T.
        dropout: Dropout probability of attention weights.

    Returns:
        ``[B, H, T, t, Dv]``.

    >>> import torch
    >>> x = torch.ones(1, 1, 2, 4, 8)
    >>> attend_gathered(x, x, x, torch.tensor([[[[0], [1]]]]), scale=1.0).shape
    torch.Size([1, 1, 2, 4, 8])
    """
    return attend(GatherOperands(q, k, v, index, bias, scale, dropout))
