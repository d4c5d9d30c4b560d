"""A host after Depth Anything 3 (arXiv 2511.10647), written from its paper: a plain DINOv2 whose
first layers attend within each view, and whose later layers attend by turns within and across
views, by another shape of the tokens; a camera token stands before the patches of each view."""

from __future__ import annotations

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

PATCH, WIDTH = 8, 32


class AcrossViews(nn.Module):
    """``[B, V, 3, H, W]`` to depths ``[B, V, H, W]`` and cameras ``[B, V, 9]``."""

    def __init__(self, depth: int = 6, alternate_from: int = 2, size: tuple[int, int] = (32, 48)):
        super().__init__()
        self.alternate_from = alternate_from
        self.grid = (size[0] // PATCH, size[1] // PATCH)
        self.patch_embed = PatchEmbed(size, PATCH, 3, WIDTH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.camera_token = nn.Parameter(torch.randn(1, 2, WIDTH))  # of the first view, of others
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.patch_embed.num_patches, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, 2, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.depth_head = nn.ConvTranspose2d(WIDTH, 1, PATCH, PATCH)
        self.camera_head = nn.Linear(WIDTH, 9)

    def tokens(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images.flatten(0, 1))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos_embed

    def with_cameras(self, x: Tensor, views: int) -> Tensor:
        first, others = self.camera_token.split(1, dim=1)
        cameras = torch.cat([first, others.expand(-1, views - 1, -1)], dim=1).transpose(0, 1)
        return torch.cat([cameras.repeat(len(x) // views, 1, 1), x[:, 1:]], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batch, views = images.shape[:2]
        x = self.tokens(images)
        for index, block in enumerate(self.blocks):
            if index == self.alternate_from:
                x = self.with_cameras(x, views)
            if index >= self.alternate_from and index % 2:
                x = block(x.reshape(batch, -1, WIDTH)).reshape(x.shape)
            else:
                x = block(x)
        x = self.norm(x)
        patches = x[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        depths = self.depth_head(patches).squeeze(1).unflatten(0, (batch, views))
        return depths, self.camera_head(x[:, 0]).unflatten(0, (batch, views))
