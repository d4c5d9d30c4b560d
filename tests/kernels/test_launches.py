"""How many kernels one attention site launches on a GPU, counted on tensors that are not there."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from sparsiattn import AttentionInputs, Site
from sparsiattn.kernels import Triton, cost, planning_work
from sparsiattn.strategies import Connectivity, Local, Strategy, finish
from tests.support.launches import Launches, counted, fake_gpu, on_gpu

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@dataclass(frozen=True)
class Place:
    """One attention site, and the most kernels that it may launch.

    Attributes:
        grid: Rows and columns of patches.
        most: With planning in Triton.
        without: On a GPU that is too old for it.
    """

    grid: tuple[int, int]
    most: int
    without: int
    batch: int = 8
    heads: int = 6
    prefix: int = 1
    dtype: torch.dtype = torch.bfloat16
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def strategy(self) -> Connectivity:
        return Connectivity(k=0.1, **self.options)

    def inputs(self) -> AttentionInputs:
        """Operands that are slices of one packed projection, as hosts have them."""
        patches = self.grid[0] * self.grid[1]
        shape = (self.batch, patches + self.prefix, 3, self.heads, 64)
        q, k, v = torch.empty(shape, dtype=self.dtype, device="cuda").permute(2, 0, 3, 1, 4)
        site = Site.of(q, k, v, prefix_tokens=self.prefix, grid=self.grid, key_grid=self.grid)
        tile = self.strategy.tile_for(patches)
        block = self.strategy.block_for(patches + self.prefix, tile)
        return AttentionInputs(q, k, v, 0.125, None, site, tile=tile, block=block)


PLACES = {
    "ViT-S/16 at 1024 px": Place((64, 64), 4, 14),
    "ViT-S/16 at 1024 px, float32": Place((64, 64), 4, 14, dtype=torch.float32),
    "DeiT-S at 224 px": Place((14, 14), 11, 11),
    "DINOv3 ViT-B at 2048 px": Place((128, 128), 4, 13, batch=1, heads=12, prefix=5),
    "ViT-S/16 at 1024 px, predictor": Place((64, 64), 38, 38, options={"scores": "predictor"}),
    "DeiT-S at 224 px, predictor": Place((14, 14), 31, 31, options={"scores": "predictor"}),
}


def second_call(place: Place, strategy: Strategy | None = None) -> Launches:
    """What a site launches once its tables are made."""
    strategy = strategy or place.strategy
    planner = strategy.planner(place.inputs().site)
    planner = on_gpu(planner) if isinstance(planner, nn.Module) else planner
    for _ in range(2):
        inputs = place.inputs()
        with counted() as launches:
            pattern = finish(
                planner(inputs), inputs, background=strategy.background_for(place.grid)
            )
            Triton()(inputs, pattern)
    return launches


@pytest.mark.parametrize("with_triton", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_a_site_launches_few_kernels(name: str, with_triton: bool) -> None:
    place = PLACES[name]
    with fake_gpu(with_triton=with_triton):
        launches = second_call(place)
    assert launches.names.count("forward") == 1, launches.names
    most = place.most if with_triton else place.without
    assert len(launches.names) <= most, launches.names
    assert launches.copied_to_device == []


def test_estimates_price_what_planning_launches() -> None:
    """`auto` and the report count with constants, which must not grow old."""
    by_torch, predictor = PLACES["ViT-S/16 at 1024 px"], PLACES["ViT-S/16 at 1024 px, predictor"]
    with fake_gpu(with_triton=False):
        calls = [second_call(by_torch), second_call(predictor)]
        calls.append(second_call(by_torch, Local(k=0.1)))
    voted, *others = ([x for x in call.names if x not in ("pool", "forward")] for call in calls)
    assert len(voted) == planning_work._TORCH_CALLS
    assert tuple(map(len, others)) == cost._GPU_CALLS


def test_what_is_counted() -> None:
    """Views and allocations are free, and a copy from the CPU is found."""
    with fake_gpu(), counted() as launches:
        x = torch.empty(4, 8, device="cuda")
        x.view(2, 16).mT.unsqueeze(0).expand(3, -1, -1)
        x.new_empty(3)
        assert launches.names == []
        torch.matmul(x, x.mT)
        x.add_(1)
        assert launches.names == ["mm", "add_"]
        torch.zeros(3).to("cuda")
    assert launches.copied_to_device == ["aten::_to_copy"]
