"""Whether a block can run on some of its windows, tried on a copy before a model is touched."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.layout import stage_grid
from sparsiattn.attention.windows import WindowCut
from sparsiattn.errors import InvalidOption
from sparsiattn.patching.discovery.meta_model import has_data
from sparsiattn.runtime.block_runtime import BlockRuntime
from sparsiattn.runtime.hook_tools import first_tensor
from sparsiattn.runtime.window_skip import arguments_of, runs_apart

CLOSE = 1e-3
"""Largest difference, of the largest entry, between a block on windows apart and on its map."""


def cut_of(runtime: BlockRuntime) -> WindowCut:
    """How the windows of a block lie in its map.

    Raises:
        InvalidOption: It cannot run on some of them.
    """
    module = runtime.owner.model.get_submodule(runtime.block.name)
    cut = WindowCut.of(module, inspect.signature(module.forward).parameters)
    if cut is None:
        raise _refused(runtime, "it has no window_size and shift_size")
    *size, _ = runtime.block.input_shape[1:]
    then = runtime.owner.map_size
    grid = (size[0], size[1]) if len(size) == 2 else stage_grid(size[0], (then, then))
    if grid is None:
        raise _refused(runtime, "the size of its map is not known")
    here = cut.at(grid)
    if runtime.block.input_shape != runtime.block.output_shape:
        raise _refused(runtime, "it changes its map")
    if has_data(module):
        _try_out(runtime, module, here, grid)
    return cut


def _try_out(runtime: BlockRuntime, module: nn.Module, cut: WindowCut, grid: Grid) -> None:
    """Compare the block on windows apart with the block on its map; both are copies."""
    sites, block = runtime.block.sites, runtime.block
    inner = sites[0].removeprefix(f"{block.name}.")
    whole = _awake(copy.deepcopy(module).float().eval())
    apart = copy.deepcopy(whole)
    like = next(module.parameters())
    x = torch.randn(block.input_shape, generator=torch.Generator().manual_seed(0)).to(like.device)
    with torch.inference_mode(False), torch.no_grad():
        try:
            expected = first_tensor(whole(*arguments_of(x, grid)))
            got = runs_apart(apart, inner, cut, x, grid)
        except Exception as error:
            why = f"tried on windows apart, it raised {type(error).__name__}: {error}"
            raise _refused(runtime, why) from error
    if len(sites) != 1 or expected is None or not _alike(got, expected, x):
        raise _refused(runtime, "on windows apart it does not give what it gives on its map")


def _awake(module: nn.Module) -> nn.Module:
    """The module with other weights where all are zero, so that no branch adds zeros alone."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if not bool(parameter.detach().any()):
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values)
    return module


def _alike(got: Tensor, expected: Tensor, x: Tensor) -> bool:
    if got.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return False
    # of what the block adds: its input goes through unchanged either way
    added = (expected - x).abs().max()
    return bool(added > 0) and bool((got - expected).abs().max() <= CLOSE * added)


def _refused(runtime: BlockRuntime, why: str) -> InvalidOption:
    model = type(runtime.owner.model).__name__
    return InvalidOption(
        f"{model}: block {runtime.block.name!r} cannot run on some of its windows: {why}; use "
        "skip='mlp', other layers=, or an attention strategy such as 'connectivity'"
    )
