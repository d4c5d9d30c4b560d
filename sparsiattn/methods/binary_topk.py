"""Binary scores: keys are selected with one bit per channel; attention is in full precision.

After BiT: Robustly Binarized Multi-distilled Transformer, arXiv 2205.13016.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, InvalidOption, Pattern, Strategy
from sparsiattn.methods._options import check_flag


@dataclass(frozen=True)
class BinaryTopK(Strategy):
    """Keys with the most sign bits in common with the query; attention on them is exact.

    ``s_ij = sign(q_i) . sign(k_j) = D - 2 popcount(bits(q_i) xor bits(k_j))`` for head dim D, with
    sign(0) = 1. BiT's scale per tensor (its section 3.1) does not change the ranking and is left
    out. Only D + 1 values occur, so among equal scores the longer key is preferred.

    With tiles, the sign bits are those of the mean query of a tile.

    The report counts the scores as ``Nq Nk D`` MACs per head, as they run as a matmul of plus and
    minus ones. On hardware with popcount they are as many binary operations, which the literature
    counts as 1/64 each; there is no such kernel here, and no speed is claimed for it.

    Args:
        k: Share or count of keys per query, prefix keys included.
        center: Whether to subtract the mean key before taking signs, so that channels in which all
            keys agree become informative. Softmax is not affected, as q . c is equal for all keys.
            Queries are not centred, as this would change logits.

    >>> import torch
    >>> hamming(torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[3.0, 1.0, 1.0]])).tolist()
    [[1.0]]
    """

    name = "binary_topk"
    paper = "https://arxiv.org/abs/2205.13016"
    fidelity = (
        "inspired by: BiT binarises and trains a whole model; here only the scores that select "
        "keys are binary, and nothing is trained"
    )

    k: float = 0.25
    center: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("center", self.center, InvalidOption)

    def plan(self, inputs: AttentionInputs) -> Pattern:
        keys = inputs.k - _mean_key(inputs) if self.center else inputs.k
        scores = hamming(inputs.row_queries, keys).float()
        # scores differ by 2 or more, so lengths in [0, 1] only break ties
        length = keys.float().norm(dim=-1).unsqueeze(-2)
        return Pattern.top(scores + length / length.amax(-1, keepdim=True).clamp_min(1e-6), self.k)


def signs(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else -1, in the dtype of ``x``; without gradient."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def hamming(q: Tensor, k: Tensor) -> Tensor:
    """Number of channels with equal sign minus number of channels with different sign.

    Args:
        q: ``[..., Nq, D]``.
        k: ``[..., Nk, D]``.

    Returns:
        ``[..., Nq, Nk]``, exact in half precision up to D = 256 (bfloat16) or 2,048 (float16).
    """
    return signs(q) @ signs(k).mT


def _mean_key(inputs: AttentionInputs) -> Tensor:
    """Mean of the patch keys that any query may attend to, ``[B, H, 1, D]``."""
    keys, visible = inputs.k[..., inputs.prefix :, :], inputs.visible_keys
    if visible is None:
        return keys.mean(-2, keepdim=True)
    weight = visible[..., inputs.prefix :, None].to(keys.dtype)
    return (keys * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp_min(1.0)
