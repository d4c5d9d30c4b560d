"""Choices of kernels kept for calls alike, so that a forward pass does not ask every kernel."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.background import Summary
from sparsiattn.attention.geometry import Tiles
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyIndex
from sparsiattn.attention.pattern import Computed, Dense, Lengths, Logits, Mask, Output, Pattern
from sparsiattn.attention.site import Site
from sparsiattn.kernels import cost
from sparsiattn.kernels.base import Choice

# Patterns whose fields are known to say all there is to know about them.
_KNOWN = (KeyBlocks, KeyIndex, Mask, Dense, Lengths, Computed, Logits, Output)
_PLAIN = (Tensor, nn.Parameter)
_MOST = 64


class ChoiceCache:
    """A few choices by everything that a kernel may look at; see `Kernel`. Reads and writes are
    single steps on a dict, so threads share it: at worst two of them ask the kernels at once."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Choice] = {}
        self._for: tuple[Site, int] | None = None

    def __len__(self) -> int:
        return len(self._found)

    def key(self, inputs: AttentionInputs, pattern: Pattern) -> Hashable | None:
        """What `get` and `keep` take; None for what cannot be described: patterns and tensors of
        classes from elsewhere."""
        described = type(pattern) in _KNOWN or type(pattern).describe is not Pattern.describe
        if not described or type(inputs.q) not in _PLAIN:
            return None
        if self._for is None or self._for[0] is not inputs.site or self._for[1] != _priced():
            # one comparison here instead of a site and a count in every key
            self._found, self._for = {}, (inputs.site, _priced())
        return describe(inputs, pattern)

    def get(self, key: Hashable | None) -> Choice | None:
        return None if key is None else self._found.get(key)

    def keep(self, key: Hashable | None, choice: Choice) -> None:
        if key is None:
            return
        if len(self._found) >= _MOST:  # shapes that never repeat
            self._found = {}
        self._found[key] = choice


_priced = cost.generation


def describe(inputs: AttentionInputs, pattern: Pattern) -> Hashable:
    """Everything but values that a kernel may look at besides the site; kept short, since every
    call of every site pays for it."""
    q, k, v, bias, token_state = inputs.q, inputs.k, inputs.v, inputs.bias, inputs.token_state
    kind = q.device.type
    return (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(),
        q.dtype, k.dtype, v.dtype, q.device,
        torch.is_grad_enabled() and (q.requires_grad, k.requires_grad, v.requires_grad),
        bias if bias is None
        else (bias.shape, bias.stride(), bias.dtype, bias.device, bias.requires_grad),
        inputs.scale, inputs.dropout, inputs.query_grid, inputs.key_grid, inputs.tile, inputs.block,
        token_state if token_state is None else token_state.reduced,
        type(pattern), pattern.describe() or tuple([_of(x) for x in vars(pattern).values()]),
        torch.is_inference_mode_enabled(), q.is_inference(),
        kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _of(value: Any) -> Hashable:
    """A field of a pattern without values: tensors by shape, tables by what they were made from
    (with the number of tokens, a field of its own). No isinstance: for tensors that is slow."""
    kind = type(value)
    if kind is Tensor:
        return value.shape  # type: ignore[no-any-return]
    if kind is Tiles:
        return value.parts, value.columns, value.smallest
    if kind is Summary:
        allowed = value.allowed
        return value.count, value.bias.shape, allowed if allowed is None else allowed.shape
    return value  # type: ignore[no-any-return]
