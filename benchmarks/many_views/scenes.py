"""Views of one photo whose true matches are known.

Every view is the photo under a homography of its own, so the place where a patch of one view lies
in another follows from both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

ZOOM, TURN, TILT, SHIFT = (0.45, 0.8), 0.2, 0.12, 0.9
"""Sides of a view as a share of the photo's; radians; perspective; share of the free room."""


@dataclass(frozen=True)
class Scene:
    """Views of one photo.

    Attributes:
        images: ``[V, 3, S, S]``, 0 to 1.
        homographies: From places in a view to places in the photo, ``[V, 3, 3]``; both in -1 to 1.
    """

    images: Tensor
    homographies: Tensor

    @classmethod
    def of(cls, photo: Path, views: int, size: int, seed: int) -> Scene:
        """Random views; the same ones for a seed."""
        with Image.open(photo) as file:
            square = ImageOps.fit(file.convert("RGB"), (min(file.size),) * 2)
        pixels = torch.from_numpy(np.asarray(square).copy())
        image = pixels.permute(2, 0, 1)[None].float() / 255
        ways = homographies(views, seed)
        grids = moved(ways, centres(size)).view(views, size, size, 2)
        # a photo is smaller than its views together: bilinear, as a camera with more pixels
        images = F.grid_sample(
            image.expand(views, -1, -1, -1), grids, padding_mode="reflection", align_corners=False
        )
        return cls(images, ways)

    def matches(self, grid: int) -> Tensor:
        """The patch of view b where the centre of each patch of view a lies.

        Returns:
            Indices ``[V, grid * grid, V]`` into the patches of all views, view by view; -1 where it
            is outside of view b.
        """
        photo = moved(self.homographies, centres(grid))
        back = torch.linalg.inv(self.homographies)
        places = torch.stack([moved(back, p[None].expand(len(back), -1, -1)) for p in photo])
        cells = ((places + 1) * grid / 2).floor().long()  # [a, b, patches, (x, y)]
        inside = ((cells >= 0) & (cells < grid)).all(-1)
        first = torch.arange(len(back))[None, :, None] * grid**2
        return torch.where(inside, first + cells[..., 1] * grid + cells[..., 0], -1).transpose(1, 2)


def homographies(views: int, seed: int) -> Tensor:
    """Zoom, turn, tilt and shift of each view, ``[V, 3, 3]``."""
    random = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(views, *shape, generator=random).double()

    zoom, turn = between(*ZOOM), between(-TURN, TURN)
    ways = torch.zeros(views, 3, 3, dtype=torch.double)
    ways[:, 0, 0] = ways[:, 1, 1] = zoom * turn.cos()
    ways[:, 1, 0] = zoom * turn.sin()
    ways[:, 0, 1] = -ways[:, 1, 0]
    ways[:, :2, 2] = SHIFT * (1 - zoom[:, None]) * between(-1, 1, 2)
    ways[:, 2, :2] = between(-TILT, TILT, 2)
    ways[:, 2, 2] = 1
    return ways.float()


def centres(side: int) -> Tensor:
    """Centres of the cells of a square in -1 to 1, ``[1, side * side, 2]``, as (x, y)."""
    steps = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)[None]


def moved(ways: Tensor, places: Tensor) -> Tensor:
    """Places ``[V|1, n, 2]`` under homographies ``[V, 3, 3]``."""
    full = torch.cat([places, torch.ones_like(places[..., :1])], -1) @ ways.mT
    return full[..., :2] / full[..., 2:]
