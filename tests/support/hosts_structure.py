"""What `patch` must find in the small models of `hosts_transformers` and in torchvision's, worked
out by hand from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.support import hosts_transformers

Grid = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """Tokens of a site. times: how many sites in a row are alike."""

    grid: Grid
    heads: int = 4
    prefix: int = 0
    windows: int = 1
    key_grid: Grid | None = None
    raster: bool = True
    bias: str = "none"
    times: int = 1

    def row(self) -> tuple[Any, ...]:
        keys = self.key_grid or self.grid
        counts = (side[0] * side[1] + self.prefix for side in (self.grid, keys))
        return (*counts, self.heads, self.grid, keys, self.prefix, self.windows, self.raster,
                self.bias)  # fmt: skip


def row_of(site: Any) -> tuple[Any, ...]:
    return (site.tokens, site.keys, site.heads, site.grid, site.key_grid, site.prefix_tokens,
            site.windows, site.raster, site.bias)  # fmt: skip


def _plain(prefix: int = 0, **options: Any) -> list[Shape]:
    return [Shape((8, 8), prefix=prefix, times=2, **options)]


def _swin(side: int = 4, last: int = 2) -> list[Shape]:
    """Two stages of one plain and one shifted block, in windows of 4 x 4."""
    stages = ((2, side * side), (4, last * last))
    return [
        Shape((4, 4), heads, windows=windows, bias=bias)
        for heads, windows in stages
        for bias in ("bias", "mask")
    ]


def _pyramid(last: int = 0) -> list[Shape]:
    """Four stages at strides 4 to 32 of 64 pixels, keys reduced to 2 x 2 everywhere."""
    grids = ((16, 16), (8, 8), (4, 4), (4, 4))
    heads = (1, 2, 3, 3)
    stages = [Shape(grid, h, key_grid=(2, 2)) for grid, h in zip(grids, heads, strict=True)]
    return [*stages, Shape((2, 2), 4, prefix=last)]


SAM = [Shape((4, 4), windows=16, bias="bias"), Shape((16, 16), bias="bias")]
VIDEO = Shape((16, 8), times=2)  # two steps in time, 8 x 8 patches each

STRUCTURE: dict[str, list[Shape]] = {
    **dict.fromkeys(
        ["vit", "vit_msn", "dinov2", "dinov2 (backbone)", "clip", "clip (vision)", "metaclip_2",
         "altclip", "chinese_clip", "clipseg", "git", "mlcd", "blip", "blip_2", "instructblip",
         "kosmos-2", "internvl", "owlvit", "owlv2", "dpt"],
        _plain(1),
    ),
    **dict.fromkeys(
        ["ijepa", "siglip", "siglip (vision)", "aimv2", "janus", "idefics2", "idefics3",
         "smolvlm"],
        _plain(),
    ),
    "deit": _plain(2),
    "deit (teacher)": _plain(2),
    "tipsv2": _plain(2),  # one register
    "dinov2_with_registers": _plain(4),
    "dinov3_vit": _plain(4),
    "pixio": _plain(8),
    "pixtral": _plain(bias="mask"),  # images of one batch must not see each other
    "beit": _plain(1, bias="bias"),
    "data2vec-vision": _plain(1, bias="bias"),
    "vitpose_backbone": [Shape((4, 4), times=2)],
    # shuffled, padded, or with other tokens behind the patches
    "vit_mae": [Shape((1, 64), prefix=1, raster=False, times=2)],
    "siglip2": _plain(),
    "yolos": _plain(6),  # five of them behind the patches
    "x_clip": _plain(2),  # a message behind the patches
    "llama4": _plain(1),
    "groupvit": [
        *_plain(8), Shape((1, 8), key_grid=(1, 64), raster=False),
        Shape((1, 12), raster=False, times=2), Shape((1, 4), key_grid=(1, 8), raster=False),
        Shape((1, 4), raster=False, times=2),
    ],
    # windows and stages
    "vitdet": [Shape((4, 4), windows=4, bias="bias"), Shape((8, 8), bias="bias")],
    "sam": SAM,
    "sam_hq": SAM,
    "sam2": [
        Shape((8, 8), 1, windows=4), Shape((4, 4), 2, windows=4, key_grid=(8, 8)),
        Shape((2, 2), 4, windows=4, key_grid=(4, 4)), Shape((4, 4), 4),
        Shape((7, 7), 8, key_grid=(14, 14)),  # windows of 14, larger than what is left
    ],
    **dict.fromkeys(
        ["swin", "swin (backbone)", "donut-swin", "maskformer-swin", "swinv2"], _swin()
    ),
    "swin2sr": _swin(16, 16),  # pixels for patches, nothing merged
    "segformer": _pyramid(),
    "glpn": _pyramid(),
    "pvt": _pyramid(1),  # a class token in the last stage
    "pvt_v2": _pyramid(),
    "hiera": [
        Shape((1, 64), 1, windows=4, raster=False),
        Shape((1, 16), 2, windows=4, key_grid=(1, 64), raster=False),
        Shape((1, 4), 4, windows=4, key_grid=(1, 16), raster=False),
        Shape((1, 16), 4, raster=False), Shape((1, 4), 8, key_grid=(1, 16), raster=False),
    ],
    "levit": [
        Shape((4, 4), 2, bias="bias"), Shape((2, 2), 2, key_grid=(4, 4), bias="bias"),
        Shape((2, 2), 3, bias="bias"),
    ],
    "cvt": [
        Shape((16, 16), 1, key_grid=(8, 8)), Shape((8, 8), 2, key_grid=(4, 4), times=2),
        Shape((4, 4), 3, prefix=1, key_grid=(2, 2), times=3),
    ],
    # every second pixel in a sequence, four sequences
    "mobilevit": [Shape((4, 4), windows=4, times=2), Shape((2, 2), windows=4, times=4)],
    # latents and queries are no patches
    "perceiver": [
        Shape((1, 8), 2, key_grid=(1, 55 * 55), raster=False), Shape((1, 8), 2, raster=False)
    ],
    "detr": [
        Shape((2, 2), 8, times=6),
        *[Shape((1, 100), 8, raster=False, key_grid=keys) for keys in ((1, 100), (1, 4))] * 6,
    ],
    # videos
    "videomae": [VIDEO],
    "vivit": [Shape((16, 8), prefix=1, times=2)],
    "vjepa2": [VIDEO],
    "timesformer": [Shape((1, 4), windows=64), Shape((8, 8), prefix=1, windows=4)] * 2,
}  # fmt: skip

for newer in set(STRUCTURE) - set(hosts_transformers.CASES):  # in the oldest supported version
    del STRUCTURE[newer]
NONE = {
    "mobilevitv2": "not attention between tokens",
    "swiftformer": "not attention between tokens",
    "poolformer": "no attention to patch",
    "convnextv2": "no attention to patch",
    "focalnet": "no attention to patch",
}
"""Models without attention between tokens, and what `patch` says of them."""

SILENT = {"segformer", "glpn", "cvt", "detr", "perceiver"}
"""Configurations that say no input size, or (Perceiver's) not this model's."""


def _torchvision_swin(v2: bool) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    parts: dict[str, Any] = (
        {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        if v2
        else {}
    )
    return swin.SwinTransformer(  # type: ignore[no-any-return]
        [4, 4], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=5, **parts
    )


def _torchvision_maxvit() -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=5)  # type: ignore[no-any-return]


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], list[Shape]]] = {
    "swin": (lambda: _torchvision_swin(False), _swin()),
    "swin_v2": (lambda: _torchvision_swin(True), _swin()),
    "maxvit": (
        _torchvision_maxvit,
        [Shape((4, 4), heads, windows=windows, bias="bias", times=2)
         for heads, windows in ((2, 16), (4, 4))],
    ),
}  # fmt: skip
