"""Checks on a copy whether a block can run on some of its windows only (``skip="window"``)."""

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
"""Largest relative difference between a block on separate windows and on the complete map."""


def cut_of(runtime: BlockRuntime) -> WindowCut:
    """The windows of a block.

    Raises:
        InvalidOption: The block cannot run on some of its windows only.
    """
    module = runtime.owner.model.get_submodule(runtime.block.name)
    cut = WindowCut.of(module, inspect.signature(module.forward).parameters)
    if cut is None:
        raise _refused(runtime, "it has no window_size and shift_size")
    *size, _ = runtime.block.input_shape[1:]
    map_size = runtime.owner.map_size
    grid = (size[0], size[1]) if len(size) == 2 else stage_grid(size[0], (map_size, map_size))
    if grid is None:
        raise _refused(runtime, "the size of its feature map is not known")
    here = cut.at(grid)
    if runtime.block.input_shape != runtime.block.output_shape:
        raise _refused(runtime, "it changes the shape of its feature map")
    if has_data(module):
        _try_out(runtime, module, here, grid)
    return cut


def _try_out(runtime: BlockRuntime, module: nn.Module, cut: WindowCut, grid: Grid) -> None:
    """Compare the block on separate windows with the block on the complete map, using copies."""
    sites, block = runtime.block.sites, runtime.block
    inner = sites[0].removeprefix(f"{block.name}.")
    on_map = _awake(copy.deepcopy(module).float().eval())
    on_windows = copy.deepcopy(on_map)
    like = next(module.parameters())
    x = torch.randn(block.input_shape, generator=torch.Generator().manual_seed(0)).to(like.device)
    with torch.inference_mode(False), torch.no_grad():
        try:
            expected = first_tensor(on_map(*arguments_of(x, grid)))
            got = runs_apart(on_windows, inner, cut, x, grid)
        except Exception as error:
            why = f"on separate windows it raised {type(error).__name__}: {error}"
            raise _refused(runtime, why) from error
    if len(sites) != 1 or expected is None or not _alike(got, expected, x):
        raise _refused(runtime, "its result on separate windows differs from that on the full map")


def _awake(module: nn.Module) -> nn.Module:
    """The module with random values in all-zero parameters, so that every branch has an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if not bool(parameter.detach().any()):
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values)
    return module


def _alike(got: Tensor, expected: Tensor, x: Tensor) -> bool:
    if got.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return False
    # relative to what the block adds, since its input passes through unchanged either way
    added = (expected - x).abs().max()
    return bool(added > 0) and bool((got - expected).abs().max() <= CLOSE * added)


def _refused(runtime: BlockRuntime, why: str) -> InvalidOption:
    model = type(runtime.owner.model).__name__
    return InvalidOption(
        f"{model}: block {runtime.block.name!r} cannot run on some of its windows: {why}; use "
        "skip='mlp', other layers=, or an attention strategy such as 'connectivity'"
    )
