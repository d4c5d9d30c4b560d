"""`nn.MultiheadAttention`, led to scaled dot product attention.

In eval mode without gradients it runs a fused operator, with ``need_weights=True`` it writes its
softmax out, and torch.compile takes its function for one opaque operator: in none of
these would a patch be seen. So a patched one is given another class, whose forward says the same in
a few lines; unlike a replaced ``forward``, a class survives deepcopy and pickle.
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
"""Whether a call wanted its attention weights, and if so, whether anything read them."""


class SparseMultihead(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that calls scaled dot product attention where a patch listens.

    Elsewhere, as inside `Patch.disabled`, it is its base class.
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
        # as in the base class: a hint that holds only while there is nothing to add to the mask
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
        """``[B, H, N, D]`` back to the form of the query."""
        out = out.transpose(1, 2).flatten(2)
        if query.dim() == 2:
            return out[0]
        return out if self.batch_first else out.transpose(0, 1)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one to add, ``[B|1, H|1, Nq|1, Nk]``; None if there is none."""
        bias = None
        if mask is not None:
            bias = _additive(mask, q.dtype)
            bias = bias[None, None] if mask.dim() == 2 else bias.unflatten(0, q.shape[:2])
        if padding is not None:
            extra = _additive(padding, q.dtype).reshape(-1, 1, 1, padding.shape[-1])
            bias = extra if bias is None else bias + extra
        return bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores; in a boolean one, True forbids."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def swap(module: nn.Module) -> bool:
    """Give an `nn.MultiheadAttention` its sparse class; whether it was one."""
    if type(module) is not nn.MultiheadAttention:
        return False
    module.__class__ = SparseMultihead
    return True


def swap_back(module: nn.Module) -> None:
    """Undo `swap`."""
    if type(module) is SparseMultihead:
        setattr(module, "__class__", nn.MultiheadAttention)  # noqa: B010


def why_not_reached(module: nn.Module) -> str | None:
    """Why the attention of a module of a dry run, whose classes are swapped, cannot be reached."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if type(module).forward is nn.MultiheadAttention.forward:
        return "a subclass of nn.MultiheadAttention: its fused path would pass the patch by"
    if module.bias_k is not None or module.add_zero_attn:
        return "attends to a key that is no token (add_bias_kv or add_zero_attn)"
    return None


_SIGNATURE = signature(nn.MultiheadAttention.forward)


def _arguments(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = _SIGNATURE.bind(module, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


class RefuseWeights:
    """Forward pre-hook (with keywords) of a patched `nn.MultiheadAttention`.

    Raises if the host wants attention weights, which it did not in the dry run: sparse attention
    has none to give.
    """

    def __init__(self, owner: Any, site: str) -> None:
        self.owner, self.site = owner, site

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        asked = args[4] if len(args) > 4 else kwargs.get("need_weights", True)
        if asked and not self.owner.disabled_here:
            raise ModelChanged(
                f"site {self.site!r} is asked for its attention weights (need_weights=True), which "
                "it was not when it was patched; sparse attention has none to give: ask inside "
                "`with patch.disabled():`, or leave this site out with sites="
            )


class _Weights(torch.Tensor):
    """Stands for attention weights in the dry run and tells its watcher that something read it."""

    watcher: WatchWeights

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # any use is a read; what it returns is a plain tensor, which nobody watches
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, _Weights):
                leaf.watcher.read = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class WatchWeights:
    """Forward hook of one `nn.MultiheadAttention` in the dry run.

    Where the host wants weights it returns a stand-in, which tells whether the host reads them.
    """

    def __init__(self, module: nn.Module) -> None:
        swap(module)
        module.register_forward_hook(self, with_kwargs=True)
        self.clear()

    def clear(self) -> None:
        """Forget the run so far."""
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
        """What became of the weights.

        Call it while the model's output is held: weights that outlive the forward pass were
        returned or stored, which counts as read.
        """
        if self._outlived():
            gc.collect()  # or they are merely part of a cycle
        if self.read or self._outlived():
            return "read"
        return "ignored" if self._stand_ins else "unasked"

    def _outlived(self) -> bool:
        return any(weights() is not None for weights in self._stand_ins)


def _weights_shape(module: nn.MultiheadAttention, call: dict[str, Any]) -> tuple[int, ...]:
    """``[B, N, S]``, with heads after B if they are not averaged, without B if unbatched."""
    query, key = call["query"], call["key"]
    axis = 1 if module.batch_first and query.dim() == 3 else 0
    batch = (query.shape[1 - axis],) if query.dim() == 3 else ()
    heads = () if call["average_attn_weights"] else (module.num_heads,)
    return (*batch, *heads, query.shape[axis], key.shape[axis])
