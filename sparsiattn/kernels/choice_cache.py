"""A cache of kernel choices, so that a forward pass does not ask every kernel again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.background import CountedSummary, Summary
from sparsiattn.attention.derivatives import is_transformed
from sparsiattn.attention.factored_bias import FactoredBias
from sparsiattn.attention.geometry import Tiles
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyIndex
from sparsiattn.attention.lengths import Lengths
from sparsiattn.attention.pattern import Computed, Dense, Logits, Mask, Output, Pattern
from sparsiattn.attention.site import Site
from sparsiattn.kernels import cost
from sparsiattn.kernels.base import Choice

# Patterns that their fields describe completely.
_KNOWN_PATTERNS = (KeyBlocks, KeyIndex, Mask, Dense, Lengths, Computed, Logits, Output)
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_MOST_CHOICES = 64


class ChoiceCache:
    """Choices by everything that a kernel may read; see `Kernel`.

    Reads and writes are single operations on a dict, so threads can share it: at worst two of them
    ask the kernels at the same time.
    """

    def __init__(self) -> None:
        self._choices: dict[Hashable, Choice] = {}
        self._valid_for: tuple[Site, int] | None = None

    def __len__(self) -> int:
        return len(self._choices)

    def key(self, inputs: AttentionInputs, pattern: Pattern) -> Hashable | None:
        """The key of a call for `get` and `keep`.

        Returns:
            None for patterns and tensors of unknown classes, which cannot be described.
        """
        if type(inputs.q) not in _PLAIN_TENSORS:
            return None
        site, prices = self._valid_for or (None, 0)
        if site is not inputs.site or prices != cost.generation():
            # one comparison here saves a site and a count in every key
            self._choices, self._valid_for = {}, (inputs.site, cost.generation())
        return describe(inputs, pattern)

    def get(self, key: Hashable | None) -> Choice | None:
        """The cached choice of a key; None if there is none."""
        return None if key is None else self._choices.get(key)

    def keep(self, key: Hashable | None, choice: Choice) -> None:
        """Cache a choice for later calls with that key; does nothing if the key is None."""
        if key is None:
            return
        if len(self._choices) >= _MOST_CHOICES:  # shapes that never repeat
            self._choices = {}
        self._choices[key] = choice


def describe(inputs: AttentionInputs, pattern: Pattern) -> Hashable | None:
    """Everything except values that a kernel may read besides the site.

    It is kept short, since it is computed in every call of every site.
    """
    fields = pattern.describe()
    if fields is None:
        if type(pattern) not in _KNOWN_PATTERNS:
            return None
        fields = tuple([_of(value) for value in vars(pattern).values()])
    q, k, v, bias, token_state = inputs.q, inputs.k, inputs.v, inputs.bias, inputs.token_state
    device = q.device.type
    layouts = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride())
    types = (q.dtype, k.dtype, v.dtype, q.device)
    mask = None
    if bias is not None:
        sides = bias.sides if isinstance(bias, FactoredBias) else None
        mask = (bias.shape, bias.stride(), bias.dtype, bias.device, bias.requires_grad, sides)
    grids = inputs.query_grid, inputs.key_grid, inputs.views
    options = (inputs.scale, inputs.dropout, *grids)
    groups = (inputs.tile, inputs.block, None if token_state is None else token_state.reduced)
    modes = (
        torch.is_grad_enabled() and (q.requires_grad, k.requires_grad, v.requires_grad),
        torch.is_inference_mode_enabled(),
        q.is_inference(),
        device != "meta" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.are_deterministic_algorithms_enabled(),
        is_transformed(),
    )
    return layouts, types, mask, options, groups, type(pattern), fields, modes


def _of(value: Any) -> Hashable:
    """A pattern's field without values: the shape of a tensor, the parameters of a table.

    The number of tokens, a separate field, completes the parameters. Types are compared instead of
    calling isinstance, which is slow for tensors.
    """
    kind = type(value)
    if kind is Tensor:
        return value.shape  # type: ignore[no-any-return]
    if kind is Tiles:
        return value.parts, value.columns, value.smallest
    if kind is CountedSummary and value.counted:  # does not compute its bias
        return value.count  # type: ignore[no-any-return]
    if kind is Summary or kind is CountedSummary:
        allowed = value.allowed
        return value.count, value.bias.shape, allowed if allowed is None else allowed.shape
    return value  # type: ignore[no-any-return]
