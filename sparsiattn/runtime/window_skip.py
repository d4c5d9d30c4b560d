"""Blocks that run on selected windows only; the other windows pass through unchanged.

The selected windows are gathered and passed to the block as a batch of small maps of one window
each. The block divides each map into one window, so everything in it, norms and MLP included, is
computed for these windows only. The result is scattered back into the block's input. A pre-hook of
the block's attention replaces the mask of shifted windows, which the block builds for the whole
map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.windows import WindowCut
from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.block_hooks import BlockHook
from sparsiattn.runtime.hook_tools import first_argument, first_tensor, replace_first
from sparsiattn.runtime.ownership import runs_in_another
from sparsiattn.runtime.thread_state import BLOCK_CALL, in_backward

PARTITION = "always_partition"
"""An argument of transformers' Swin; without it, a small map changes the block permanently."""


@dataclass(frozen=True, eq=False)
class ChosenWindows:
    """The windows on which a block runs.

    Attributes:
        x: The block's input, ``[B, H, W, C]`` or ``[B, N, C]``.
        rows: ``[B, m * n]``, indices of the tokens in the ``m`` windows of each image.
        taken: The windows as passed to the block, ``[B * m, rows, columns, C]`` or
            ``[B * m, n, C]``.
        grid: Rows and columns of the whole map.
        window: Rows and columns of a window.
        mask: ``[B * m, n, n]``, added to the logits of these windows; None without a shift.
    """

    x: Tensor
    rows: Tensor
    taken: Tensor
    grid: Grid
    window: Grid
    mask: Tensor | None

    @classmethod
    def of(
        cls, x: Tensor, windows: Tensor, index: Tensor, cut: WindowCut, grid: Grid
    ) -> ChosenWindows:
        """Gather windows.

        Args:
            x: The block's input.
            windows: All of its windows ``[B, W, n, C]``.
            index: ``[B, m]``, indices of the windows to keep.
            cut: How the map is divided into windows.
            grid: Rows and columns of the map.
        """
        rows = cut.order(grid, x.device)[index].flatten(1)
        into = index[..., None, None].expand(-1, -1, *windows.shape[2:])
        shape = cut.window if x.dim() == 4 else (windows.shape[2],)
        taken = windows.gather(1, into).reshape(-1, *shape, x.shape[-1])
        masks = cut.mask(grid, x.device)
        mask = None if masks is None else masks[index].flatten(0, 1).to(x.dtype)
        return cls(x, rows, taken, grid, cut.window, mask)

    def arguments(self, args: Any, kwargs: Any, parameters: tuple[str, ...]) -> Any:
        """The block's arguments for these windows only."""
        kwargs = {name: self._fitted(value) for name, value in kwargs.items()}
        args = tuple(self._fitted(value) for value in args)
        if PARTITION in parameters:
            args = args[: parameters.index(PARTITION)]
            kwargs[PARTITION] = True
        return args, kwargs

    def _fitted(self, value: Any) -> Any:
        if value is self.x:
            return self.taken
        is_size = isinstance(value, (tuple, list)) and tuple(value) == self.grid
        return self.window if is_size else value

    def with_mask(self, args: Any, kwargs: Any) -> Any:
        """Arguments of the block's attention with the mask of these windows."""
        n = self.window[0] * self.window[1]

        def fitted(value: Any) -> Any:
            is_mask = isinstance(value, Tensor) and value.dim() == 3 and value.shape[1:] == (n, n)
            return self.mask if is_mask else value

        first, *other_args = args
        return (first, *map(fitted, other_args)), {name: fitted(v) for name, v in kwargs.items()}

    def scattered(self, result: Tensor) -> Tensor:
        """The block's input, with its result in the windows that it ran on."""
        flat = self.x.reshape(self.x.shape[0], -1, self.x.shape[-1])
        into = self.rows[..., None].expand(-1, -1, flat.shape[-1])
        rows = result.reshape(into.shape).to(flat.dtype)
        scattered: Tensor = flat.scatter(1, into, rows).view(self.x.shape)
        return scattered


def all_windows(x: Tensor, cut: WindowCut, grid: Grid) -> Tensor:
    """The windows of a map, ``[B, W, n, C]``."""
    order = cut.order(grid, x.device)
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    windows: Tensor = flat.index_select(1, order.flatten()).unflatten(1, order.shape)
    return windows


class EnterWindows(BlockHook):
    """Forward pre-hook of a block: passes it the selected windows."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        runtime = self.runtime
        BLOCK_CALL.windows = None
        if runtime.is_off() or runs_in_another(runtime.owner, module):
            return None
        x = first_argument(args, kwargs)
        assert x is not None
        assert runtime.cut is not None
        BLOCK_CALL.restoring = False
        state = runtime.begin(x)
        grid, cut = state.grid, runtime.cut.at(state.grid)
        windows = all_windows(x, cut, grid)
        # strategies see each window as one token, the mean of its tokens
        state = replace(state, grid=cut.count(grid))
        index = runtime.spare(state, windows.mean(2)).ids
        if index is None:
            return None
        chosen = ChosenWindows.of(x, windows, index, cut, grid)
        BLOCK_CALL.windows = chosen
        return chosen.arguments(args, kwargs, cut.parameters)


class MaskWindows(BlockHook):
    """Forward pre-hook of a shifted block's attention: passes it the mask of its windows."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        chosen = BLOCK_CALL.windows
        if self.runtime.is_off() or chosen is None:
            if in_backward() and not self.runtime.is_off():
                raise ModelChanged(
                    f"block {self.runtime.block.name!r} checkpoints its own forward, and its "
                    "windows are not known when it is recomputed: checkpoint the whole block from "
                    "outside, or use skip='mlp'"
                )
            return None
        return None if chosen.mask is None else chosen.with_mask(args, kwargs)


class LeaveWindows(BlockHook):
    """Forward hook of a block: merges its result with the windows that skipped it."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        chosen = BLOCK_CALL.windows
        if chosen is None or self.runtime.is_off():
            return None
        BLOCK_CALL.windows = None
        host = first_tensor(output)
        assert host is not None
        return replace_first(output, host, chosen.scattered(host))


def runs_apart(block: nn.Module, attention: str, cut: WindowCut, x: Tensor, grid: Grid) -> Tensor:
    """Output of a block that runs on each of its windows separately.

    Args:
        block: A copy of the block; a hook is left on it.
        attention: Path of its attention module.
        cut: How the block divides a map of this size into windows.
        x: The map.
        grid: Rows and columns of the map.
    """
    windows = all_windows(x, cut, grid)
    index = torch.arange(windows.shape[1], device=x.device).expand(x.shape[0], -1)
    chosen = ChosenWindows.of(x, windows, index, cut, grid)

    def mask(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return None if chosen.mask is None else chosen.with_mask(args, kwargs)

    block.get_submodule(attention).register_forward_pre_hook(mask, with_kwargs=True)
    args, kwargs = chosen.arguments(arguments_of(x, grid), {}, cut.parameters)
    result = first_tensor(block(*args, **kwargs))
    assert result is not None
    return chosen.scattered(result)


def arguments_of(x: Tensor, grid: Grid) -> tuple[Any, ...]:
    """Positional arguments of a block: a map, or a sequence and the size of its map."""
    return (x,) if x.dim() == 4 else (x, grid)
