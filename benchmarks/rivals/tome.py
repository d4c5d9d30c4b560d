"""Token merging in plain PyTorch, written from its paper (ToMe, ICLR 2023, arXiv 2210.09461).

What a reader of the paper writes for a timm ViT, and what our `token_merge` is timed against:
subclasses of `Attention` and `Block`, no hooks, no masks of hosts, no positions to restore.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional as F

Merge = Callable[[Tensor], Tensor]


class MergingAttention(Attention):  # type: ignore[misc]
    """Attention that adds the log size of every key (eq. 1) and returns its mean keys, too."""

    def attend(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output ``[B, N, C]`` and the keys ``[B, N, D]``, mean over heads.

        Args:
            x: ``[B, N, C]``.
            size: Patches in every token, ``[B, N, 1]``; None for one each.
        """
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None if size is None else size.log()[:, None, None, :, 0]
        out = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(b, n, c)
        return self.proj(out), k.mean(1)


class MergingBlock(Block):  # type: ignore[misc]
    """A block that merges tokens between attention and MLP (section 3.1).

    Attributes:
        schedule: What all blocks of the model share.
    """

    schedule: Schedule

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        schedule = self.schedule
        assert isinstance(self.attn, MergingAttention)
        out, keys = self.attn.attend(self.norm1(x), schedule.size)
        x = x + self.drop_path1(self.ls1(out))
        merge = match(keys, schedule.r, schedule.prefix)
        size = torch.ones_like(x[..., :1]) if schedule.size is None else schedule.size
        x, size = merge(x * size), merge(size)
        x, schedule.size = x / size, size
        rest: Tensor = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + rest


class Schedule:
    """How many tokens each block merges, and the sizes of the present ones.

    Attributes:
        r: Tokens fewer after every block.
        prefix: Tokens that are never merged away: CLS, distillation.
        size: ``[B, N, 1]``; None while every token is one patch.
    """

    def __init__(self, r: int, prefix: int) -> None:
        self.r, self.prefix = r, prefix
        self.size: Tensor | None = None


def match(keys: Tensor, r: int, prefix: int) -> Merge:
    """Bipartite soft matching (section 3.1): the function that sums up matched tokens.

    Args:
        keys: ``[B, N, D]``.
        r: Tokens to merge, at most half.
        prefix: Leading tokens that are neither merged nor merged into.
    """
    keys = keys / keys.norm(dim=-1, keepdim=True)
    first, second = keys[:, ::2], keys[:, 1::2]
    scores = first @ second.transpose(-1, -2)
    scores[:, : (prefix + 1) // 2] = float("-inf")
    scores[:, :, : prefix // 2] = float("-inf")
    best, partner = scores.max(-1)
    ranked = best.argsort(dim=-1, descending=True)[..., None]
    moved, kept = ranked[:, :r], ranked[:, r:].sort(dim=1).values
    into = partner[..., None].gather(1, moved)

    def merge(x: Tensor) -> Tensor:
        first, second, c = x[:, ::2], x[:, 1::2], x.shape[-1]
        source = first.gather(1, moved.expand(-1, -1, c))
        stay = first.gather(1, kept.expand(-1, -1, c))
        return torch.cat([stay, second.scatter_add(1, into.expand(-1, -1, c), source)], dim=1)

    return merge


def apply(model: VisionTransformer, r: int) -> VisionTransformer:
    """Merge ``r`` tokens in every block of this model, from now on.

    The class token ends first, where timm's head looks for it: `match` keeps the order of those
    that stay, and the class token always does.
    """
    schedule = Schedule(r, model.num_prefix_tokens)

    def start(*_: object) -> None:
        schedule.size = None

    model.register_forward_pre_hook(start)
    for block in model.blocks:
        block.__class__, block.attn.__class__ = MergingBlock, MergingAttention
        block.schedule = schedule
    return model
