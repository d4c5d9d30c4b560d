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

from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.thread_state import SITE_CALLS

Weights = Literal["unasked", "ignored", "read"]
"""Whether a call asked for its attention weights, and if so, whether anything read them."""


class SparseMultihead(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that calls scaled dot product attention where a patch is listening,
    and is its base class elsewhere, as inside `Patch.disabled`."""

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
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
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
        found = None
        if mask is not None:
            found = _additive(mask, q.dtype)
            found = found[None, None] if mask.dim() == 2 else found.unflatten(0, q.shape[:2])
        if padding is not None:
            extra = _additive(padding, q.dtype).reshape(-1, 1, 1, padding.shape[-1])
            found = extra if found is None else found + extra
        return found


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
    """Forward pre-hook (with keywords) of a patched `nn.MultiheadAttention` that was not asked for
    its attention weights in the dry run: raises where it is, as there are none to give."""

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
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, _Weights):
                    item.watcher.read = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class WatchWeights:
    """Forward hook of one `nn.MultiheadAttention` in the dry run: where weights were asked for it
    returns a stand-in, which tells whether the host reads them."""

    def __init__(self, module: nn.Module) -> None:
        swap(module)
        module.register_forward_hook(self, with_kwargs=True)
        self.clear()

    def clear(self) -> None:
        self.read = False
        self._made: list[weakref.ref[_Weights]] = []

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = _arguments(module, args, kwargs)
        if not given["need_weights"] or type(module) is not SparseMultihead:
            return output
        made = torch.empty(_weights_shape(module, given), device="meta").as_subclass(_Weights)
        made.watcher = self
        self._made.append(weakref.ref(made))
        return output[0], made

    def verdict(self) -> Weights:
        """To be asked while the model's output is held: weights that outlive the forward pass were
        returned or stored, which counts as read."""
        if any(made() is not None for made in self._made):
            gc.collect()  # or they are merely part of a cycle
        if self.read or any(made() is not None for made in self._made):
            return "read"
        return "ignored" if self._made else "unasked"


def _weights_shape(module: nn.MultiheadAttention, given: dict[str, Any]) -> tuple[int, ...]:
    """``[B, N, S]``, with heads after B if they are not averaged, without B if unbatched."""
    query, key = given["query"], given["key"]
    axis = 1 if module.batch_first and query.dim() == 3 else 0
    batch = (query.shape[1 - axis],) if query.dim() == 3 else ()
    heads = () if given["average_attn_weights"] else (module.num_heads,)
    return (*batch, *heads, query.shape[axis], key.shape[axis])
