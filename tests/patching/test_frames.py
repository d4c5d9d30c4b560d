"""Videos whose frames are images in one batch: tokens are dropped in every frame by itself, and
whatever reads across frames gets every position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn

TOKENS, WIDTH, FRAMES = 65, 48, 3
TINY = {"img_size": 64, "patch_size": 8, "embed_dim": WIDTH, "depth": 4, "num_heads": 3}
SHAPE = (1, FRAMES, 3, 64, 64)
QUARTER: dict[str, Any] = {"keep": 0.25, "layers": [2]}
Read = Callable[[Any, Tensor], Tensor]


class Frames(nn.Module):
    """A ViT over all frames at once, and a head of a user's own on ``[B * FRAMES, N, C]``."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.vit = VisionTransformer(**TINY, num_classes=0)
        self.mix = nn.Parameter(torch.randn(FRAMES, FRAMES))
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.attend = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.read = read
        self.seen: list[int] = []

    def tokens(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(video.flatten(0, 1)))
        for block in self.vit.blocks:
            x = block(x, attn_mask=mask)
        return self.vit.norm(x)

    def forward(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.tokens(video, mask)
        self.seen.append(tokens.shape[1])
        return self.read(self, tokens)


def host(read: Read) -> Frames:
    torch.manual_seed(0)
    return Frames(read).eval()


def videos(batch: int = 1) -> Tensor:
    return torch.randn(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(1))


def attended_over_time(m: Any, t: Tensor) -> Tensor:
    in_time = t.unflatten(0, (-1, FRAMES)).transpose(1, 2).flatten(0, 1)
    return m.attend(in_time, in_time, in_time)[0].amax(0)


def pooled(m: Any, t: Tensor) -> Tensor:
    query = m.query.expand(len(t), 1, 1, WIDTH)
    return F.scaled_dot_product_attention(query, t, t)


ACROSS: dict[str, Read] = {
    "mean over frames": lambda m, t: t.unflatten(0, (-1, FRAMES)).mean(1).amax(1),
    "mean over the batch": lambda m, t: t.mean(0).amax(0),
    "the same with its dimension": lambda m, t: t.mean(0, keepdim=True).amax(1),
    "difference of frames": lambda m, t: (t[1:] - t[:-1]).amax(1),
    "two frames added": lambda m, t: (t[0] + t[1]).amax(0),
    "softmax over frames": lambda m, t: t.softmax(0).amax(1),
    "a matrix over frames": lambda m, t: (m.mix @ t.flatten(1)).view(t.shape).amax(1),
    "frames behind tokens": lambda m, t: t.transpose(0, 1).amax(1).amax(0),
    "tokens first": lambda m, t: t.permute(1, 0, 2).prod(1).amax(0),
    "every frame with every other": lambda m, t: (t[None] * t[:, None]).amax((0, 2)),
    "attention over time": attended_over_time,
    "rolled": lambda m, t: (t * t.roll(1, 0)).amax(1),
}
BY_FRAME: dict[str, Read] = {
    "class token": lambda m, t: t[:, 0],
    "mean of patches": lambda m, t: t[:, 1:].mean(1),
    "maximum": lambda m, t: t.amax(1),
    "mean of class tokens": lambda m, t: t[:, 0].unflatten(0, (-1, FRAMES)).mean(1),
    "maximum, then a matrix over frames": lambda m, t: m.mix @ t.amax(1),
    "attention pooling": lambda m, t: pooled(m, t[:, None]),
}


def of_images(model: Frames, video: Tensor, name: str, options: dict[str, Any]) -> Tensor:
    """Every position of the frames, had they come as images."""
    with sparsiattn.patch(model.vit, name, **options):
        whole: Tensor = model.vit.forward_features(video.flatten(0, 1))
    return whole


@pytest.mark.parametrize("read", ACROSS)
@pytest.mark.parametrize("options", [QUARTER, {"r": 4}], ids=["drop", "merge"])
@torch.no_grad()
def test_readers_across_frames_get_every_position(read: str, options: dict[str, Any]) -> None:
    model, video = host(ACROSS[read]), videos()
    name = "token_merge" if "r" in options else "token_drop"
    with sparsiattn.patch(model, name, input=SHAPE, **options):
        out = model(video)
    assert model.seen == [TOKENS]
    expected = model.read(model, of_images(model, video, name, options))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("read", BY_FRAME)
@torch.no_grad()
def test_readers_of_every_frame_get_what_is_left(read: str) -> None:
    model, video = host(BY_FRAME[read]), videos()
    with sparsiattn.patch(model, "token_drop", input=SHAPE, **QUARTER) as live:
        out = model(video)
        source = live.source()
    assert source.shape == (FRAMES, TOKENS)
    assert model.seen == [1 + 16]
    whole = of_images(model, video, "token_drop", QUARTER)
    expected = model.read(model, whole[source >= 0].view(FRAMES, 17, WIDTH))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_of_a_frame_is_no_token() -> None:
    """Shares count each frame's own tokens, as where every frame comes alone, without padding."""
    model, video = host(BY_FRAME["class token"]), videos(2)
    own = torch.tensor([40, 64, 52, 64, 64, 33])
    mask = (torch.arange(TOKENS) <= own[:, None])[:, None, None]
    with sparsiattn.patch(model, "token_drop", input=SHAPE, **QUARTER):
        out = model(video, mask)
    alone = []
    with sparsiattn.patch(model.vit, "token_drop", **QUARTER):
        for frame, count in zip(video.flatten(0, 1), own.tolist(), strict=True):
            x = model.vit._pos_embed(model.vit.patch_embed(frame[None]))[:, : 1 + count]
            alone.append(model.vit.norm(model.vit.blocks(x))[:, 0])
    torch.testing.assert_close(out, torch.cat(alone), rtol=1e-4, atol=1e-5)
