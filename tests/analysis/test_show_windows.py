"""Where `show` finds the tokens of windows: checked by changing one patch of the image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import AttentionInputs, Planner, Site
from tests.support import zoo


def seen_by(patch: sparsiattn.Patch, images: Tensor) -> dict[str, Tensor]:
    """The queries that reach every site, ``[windows * N, H * D]``."""
    found: dict[str, Tensor] = {}

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        found[site.name] = inputs.q.transpose(1, 2).flatten(0, 1).flatten(1)

    with patch.observing(observe), torch.no_grad():
        patch.model(images)
    return found


def torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    torch.manual_seed(1)
    model: nn.Module = SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5).eval()
    return model


def transformers_swin() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    torch.manual_seed(1)
    model: nn.Module = transformers.SwinForImageClassification(config).eval()
    return model


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "vit_registers": lambda: zoo.build("vit_registers"),
    "samvit": lambda: zoo.build("samvit"),
    "swin": lambda: zoo.build("swin"),
    "swinv2": lambda: zoo.build("swinv2"),
    "torchvision_swin": torchvision_swin,
    "transformers_swin": transformers_swin,
}


@pytest.mark.parametrize(
    "host",
    zoo.slow_but(
        ["vit_registers", "samvit", "swin", "torchvision_swin"], *list(HOSTS)[-1:], "swinv2"
    ),
)
def test_tokens_are_where_a_changed_patch_shows_up(host: str) -> None:
    """In the first block only the token of the changed patch differs; in the second one those do
    that attended to it, its whole window."""
    model = HOSTS[host]()
    side = 32 if host in ("vit_registers", "samvit") else 64
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(3))
    patch = sparsiattn.patch(model, "local", k=3, input=(1, 3, side, side))
    first, second = sparsiattn.show(model, images).sites[:2]
    before = seen_by(patch, images)
    assert first.place is not None
    assert second.place is not None
    pixels = side // first.place.shape[0]
    for row, column in ((0, 0), (3, 5), (first.place.shape[0] - 1, 1)):
        changed = images.clone()
        changed[..., row * pixels : (row + 1) * pixels, column * pixels : (column + 1) * pixels] = 1
        after = seen_by(patch, changed)
        differ = (after[first.name] != before[first.name]).any(-1).nonzero().flatten()
        assert differ.tolist() == [first.place[row, column].item()]
        window = first.place // first.tokens == first.place[row, column] // first.tokens
        moved = (after[second.name] != before[second.name]).any(-1).nonzero().flatten()
        expected = second.place[window].sort().values
        assert moved[moved % second.tokens >= second.prefix].tolist() == expected.tolist()


def test_windows_hide_what_lies_in_others() -> None:
    model = zoo.build("swin")
    sparsiattn.patch(model, "topk", k=0.25)
    site = sparsiattn.show(model, zoo.images(model, 1))["layers.0.blocks.1.attn"]
    seen = site.attention(3, 3) > 0
    rows, columns = seen.any(0).any(1).nonzero().flatten(), seen.any(0).any(0).nonzero().flatten()
    assert rows.tolist() == columns.tolist() == [2, 3, 4, 5]  # shifted by half a window
    assert torch.allclose(site.attention(3, 3).sum((1, 2)), torch.ones(2))
    assert bool((site.density < 0.6).all())  # of the pairs that the host's mask allows
