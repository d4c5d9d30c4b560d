"""Make `nn.MultiheadAttention` call scaled dot product attention, so that a patch can intercept it.

In eval mode without gradients it runs a fused operator, with ``need_weights=True`` it computes the
softmax itself, and torch.compile treats its function as one opaque operator. A patch could
intercept none of these. A patched module therefore gets another class with an equivalent forward.
Unlike a replaced ``forward``, a class survives deepcopy and pickle.
"""

from __future__ import annotations

import gc
import weakref
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.thread_state import SITE_CALLS

Weights = Literal["unasked", "ignored", "read"]
"""Whether a call requested its attention weights, and if so, whether anything read them."""


class SparseMultihead(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that calls scaled dot product attention while a patch is active.

    Otherwise, as inside `Patch.disabled`, it behaves as its base class.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        top = SITE_CALLS.top
        if top is None or top[0] is None:
            options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return super().forward(query, key, value, *options)
        # as in the base class: is_causal may replace the mask only if no other mask is added
        causal = is_causal and attn_mask is not None and key_padding_mask is None
        q, k, v = (self._heads(x, query) for x in self._project(query, key, value))
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        merged: Tensor = self.out_proj(self._merge(out, query))
        return merged, None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value and self.in_proj_weight is not None:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self.in_proj_weight is not None:
            weights: Any = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        operands = zip((query, key, value), weights, biases, strict=True)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in operands)

    def _heads(self, x: Tensor, query: Tensor) -> Tensor:
        """To ``[B, H, N, D]`` from ``[B, N, C]``, ``[N, B, C]`` or ``[N, C]``."""
        if query.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _merge(self, out: Tensor, query: Tensor) -> Tensor:
        """``[B, H, N, D]`` back to the layout of the query."""
        out = out.transpose(1, 2).flatten(2)
        if query.dim() == 2:
            return out[0]
        return out if self.batch_first else out.transpose(0, 1)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one additive mask, ``[B|1, H|1, Nq|1, Nk]``; None if there is no mask."""
        bias = None
        if mask is not None:
            bias = _additive(mask, q.dtype)
            bias = bias[None, None] if mask.dim() == 2 else bias.unflatten(0, q.shape[:2])
        if padding is not None:
            extra = _additive(padding, q.dtype).reshape(-1, 1, 1, padding.shape[-1])
            bias = extra if bias is None else bias + extra
        return bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as an additive one; True in a boolean mask means that the key is masked."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def swap(module: nn.Module) -> bool:
    """Give an `nn.MultiheadAttention` its sparse class; returns whether the module was one."""
    if type(module) is not nn.MultiheadAttention:
        return False
    module.__class__ = SparseMultihead
    return True


def swap_back(module: nn.Module) -> None:
    """Undo `swap`."""
    if type(module) is SparseMultihead:
        setattr(module, "__class__", nn.MultiheadAttention)  # noqa: B010


def why_not_reached(module: nn.Module) -> str | None:
    """Why the attention of a module cannot be intercepted; None if it can.

    Args:
        module: A module of a dry run, in which classes are swapped already.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if type(module).forward is nn.MultiheadAttention.forward:
        return "a subclass of nn.MultiheadAttention: its fused path would bypass the patch"
    if module.bias_k is not None or module.add_zero_attn:
        return "attends to a key that is not a token (add_bias_kv or add_zero_attn)"
    return None


_SIGNATURE = signature(nn.MultiheadAttention.forward)


def _arguments(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = _SIGNATURE.bind(module, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


class RefuseWeights:
    """Forward pre-hook (with keyword arguments) of a patched `nn.MultiheadAttention`.

    Raises `ModelChanged` if the host requests attention weights, which it did not in the dry run:
    sparse attention does not compute them.
    """

    def __init__(self, owner: Any, site: str) -> None:
        self.owner, self.site = owner, site

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        need_weights = args[4] if len(args) > 4 else kwargs.get("need_weights", True)
        if need_weights and not self.owner.disabled_here:
            raise ModelChanged(
                f"site {self.site!r} was called with need_weights=True, but not at patch time; "
                "sparse attention returns no attention weights: request them inside "
                "`with patch.disabled():`, or exclude this site with sites="
            )


class _Weights(torch.Tensor):
    """Stands in for attention weights in the dry run, and notes when something reads them."""

    watcher: WatchWeights

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # any use counts as a read; the result is a plain tensor
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, _Weights):
                leaf.watcher.read = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class WatchWeights:
    """Forward hook of one `nn.MultiheadAttention` in the dry run.

    If the host requests weights, it returns a stand-in, which notes whether the host reads them.
    """

    def __init__(self, module: nn.Module) -> None:
        swap(module)
        module.register_forward_hook(self, with_kwargs=True)
        self.clear()

    def clear(self) -> None:
        """Reset before another run."""
        self.read = False
        self._stand_ins: list[weakref.ref[_Weights]] = []

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        call = _arguments(module, args, kwargs)
        if not call["need_weights"] or type(module) is not SparseMultihead:
            return output
        weights = torch.empty(_weights_shape(module, call), device="meta").as_subclass(_Weights)
        weights.watcher = self
        self._stand_ins.append(weakref.ref(weights))
        return output[0], weights

    def verdict(self) -> Weights:
        """Whether the weights were requested and read.

        Call it while the model's output is still referenced: weights that outlive the forward pass
        were returned or stored, which counts as read.
        """
        if self._outlived():
            gc.collect()  # they may only be part of a reference cycle
        if self.read or self._outlived():
            return "read"
        return "ignored" if self._stand_ins else "unasked"

    def _outlived(self) -> bool:
        return any(weights() is not None for weights in self._stand_ins)


def _weights_shape(module: nn.MultiheadAttention, call: dict[str, Any]) -> tuple[int, ...]:
    """Shape of the weights: ``[B, N, S]``, ``[B, H, N, S]`` if not averaged; no B if unbatched."""
    query, key = call["query"], call["key"]
    axis = 1 if module.batch_first and query.dim() == 3 else 0
    batch = (query.shape[1 - axis],) if query.dim() == 3 else ()
    heads = () if call["average_attn_weights"] else (module.num_heads,)
    return (*batch, *heads, query.shape[axis], key.shape[axis])
