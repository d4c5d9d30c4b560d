"""Images of different sizes padded to one length: padding is nobody's key and never a token."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn

SIZES = [(8, 8), (4, 6), (3, 9)]
INFOS = sparsiattn.list_strategies()
ATTENTION = [name for name, info in INFOS.items() if info.kind != "tokens"]
PLACED = {"local", "atrous", "avggt", "longformer", "bigbird", "bilevel", "sd_filter", "skipat"}
"""Those that need to know where tokens are in the image."""
TOKENS = [name for name, info in INFOS.items() if info.kind == "tokens"]


def naflex(pool: str = "token", **options: Any) -> NaFlexVit:
    torch.manual_seed(0)
    unknown = options.keys() - {field.name for field in fields(NaFlexVitCfg)}
    if unknown:
        pytest.skip(f"this timm has no {', '.join(unknown)}")
    cfg = NaFlexVitCfg(
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        class_token=pool == "token",
        reg_tokens=0,
        pos_embed_grid_size=(8, 8),
        global_pool=pool,
        **options,
    )
    return NaFlexVit(cfg, num_classes=10).eval()


def images(sizes: list[tuple[int, int]] = SIZES) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "patches": torch.randn(rows * columns, 192, generator=generator),
            "patch_coord": torch.cartesian_prod(torch.arange(rows), torch.arange(columns)),
            "patch_valid": torch.ones(rows * columns, dtype=torch.bool),
        }
        for rows, columns in sizes
    ]


def batch(parts: list[dict[str, Tensor]], length: int = 0) -> dict[str, Tensor]:
    """The images in one batch, padded with noise that no result may depend on."""
    length = max(length, *(len(part["patches"]) for part in parts), 0)
    out: dict[str, list[Tensor]] = {}
    for part in parts:
        missing = length - len(part["patches"])
        noise = torch.randn(missing, 192, generator=torch.Generator().manual_seed(missing))
        out.setdefault("patches", []).append(torch.cat([part["patches"], 9 * noise]))
        for name, value in (("patch_coord", 0), ("patch_valid", False)):
            shape = (missing, *part[name].shape[1:])
            rest = torch.full(shape, value, dtype=part[name].dtype)
            out.setdefault(name, []).append(torch.cat([part[name], rest]))
    return {name: torch.stack(values) for name, values in out.items()}


def patched(model: nn.Module, strategy: Any, **options: Any) -> Any:
    return sparsiattn.patch(model, strategy, input=(1, 3, 64, 64), **options)


def check_padding_is_nothing(model: nn.Module, strategy: Any, **options: Any) -> None:
    """The same logits alone, and in batches padded to two other lengths."""
    parts = images()
    with torch.no_grad(), patched(model, strategy, **options):
        alone = torch.cat([model(batch([part])) for part in parts])
        for length in (64, 81):
            torch.testing.assert_close(model(batch(parts, length)), alone, rtol=1e-5, atol=1e-5)
        small = model(batch(parts[1:], 30))
    torch.testing.assert_close(small, alone[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(ATTENTION) - PLACED))
def test_keys_do_not_depend_on_padding(name: str) -> None:
    check_padding_is_nothing(naflex(), name, only_if_faster=False)


@pytest.mark.parametrize("name", sorted(PLACED & set(ATTENTION)))
def test_images_of_several_shapes_have_no_one_grid(name: str) -> None:
    model = naflex()
    refused = pytest.raises(sparsiattn.SparsiattnError, match="positions in the image")
    with torch.no_grad(), patched(model, name, only_if_faster=False), refused:
        model(batch(images()))


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_do_not_depend_on_padding(name: str) -> None:
    check_padding_is_nothing(naflex(), name)


@pytest.mark.parametrize("pool", ["avg", "max", "map", "token"])
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("token_drop", {"keep": 0.5}),
        ("token_drop", {"keep": 10, "restore": "scatter"}),
        ("token_drop", {"keep": "adaptive", "restore": "unfold"}),
        ("token_drop", {"keep": 0.5, "score": "learned", "layers": [0, 1]}),
        ("token_drop", {"keep": 0.5, "fuse": True, "score": "mean_query"}),
        ("token_merge", {"r": 4}),
        ("hybrid", {"keep": 0.5, "k": 0.5}),
    ],
)
def test_every_head_reads_the_image_alone(
    pool: str, strategy: str, options: dict[str, Any]
) -> None:
    check_padding_is_nothing(naflex(pool), strategy, **options)


@pytest.mark.parametrize("options", [{"rope_type": "axial"}, {"use_key_only_attn_mask": True}])
@pytest.mark.parametrize("strategy", ["topk", "token_drop", "token_merge"])
def test_position_tables_and_key_masks(strategy: str, options: dict[str, Any]) -> None:
    check_padding_is_nothing(naflex(**options), strategy)


@pytest.mark.parametrize("length", [64, 100])
@pytest.mark.parametrize(("keep", "counts"), [(0.5, [32, 12, 14]), (30, [30, 24, 27])])
def test_shares_are_of_own_tokens(length: int, keep: Any, counts: list[int]) -> None:
    model, padded = naflex("avg"), batch(images(), length)
    with torch.no_grad(), patched(model, "token_drop", layers=[1], keep=keep) as patch:
        model(padded)
        kept = patch.source() >= 0
    assert kept.sum(1).tolist() == counts
    assert not (kept & ~padded["patch_valid"]).any()


def test_never_restored_is_refused_where_the_head_goes_by_the_mask() -> None:
    model = naflex("avg")
    refused = pytest.raises(sparsiattn.SparsiattnError, match="restore='auto'")
    with patched(model, "token_drop", layers=[1], restore=None), refused:
        model(batch(images()))


class MaskedViT(nn.Module):
    """Blocks of PyTorch over padded sequences, and a mean over what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = x.flatten(2).mT if x.dim() == 4 else x  # an image's patches, or tokens as they are
        if padding is None:
            padding = x.new_zeros(x.shape[:2], dtype=torch.bool)
        x = self.encoder(x, src_key_padding_mask=padding)
        real = (~padding)[..., None].to(x.dtype)
        return self.head((x * real).sum(1) / real.sum(1))


@pytest.mark.parametrize("count", [2, 16])
@pytest.mark.parametrize(
    ("strategy", "options"),
    [("topk", {}), ("connectivity", {}), ("token_drop", {}), ("token_merge", {"r": 2})],
)
def test_encoder_with_key_padding_mask(strategy: str, options: dict[str, Any], count: int) -> None:
    model = MaskedViT().eval()
    sizes = [16 - i % 6 for i in range(count)]
    rows = [torch.randn(1, n, 32, generator=torch.Generator().manual_seed(n)) for n in sizes]
    with torch.no_grad(), sparsiattn.patch(model, strategy, input=(1, 32, 4, 4), **options):
        alone = torch.cat([model(row) for row in rows])
        for length in (16, 20):
            x = torch.cat([F.pad(row, (0, 0, 0, length - row.shape[1]), value=7.0) for row in rows])
            padding = torch.arange(length) >= torch.tensor(sizes)[:, None]
            torch.testing.assert_close(model(x, padding), alone, rtol=1e-5, atol=1e-5)


def top_keys_by_hand(q: Tensor, k: Tensor, v: Tensor, own: list[Tensor], share: float) -> Tensor:
    """Top-k attention in plain loops, among each image's own tokens."""
    out = torch.zeros_like(v)
    for image, places in enumerate(own):
        keep = -int(-share * len(places) // 1)
        for head in range(q.shape[1]):
            for row in places.tolist():
                logits = k[image, head, places] @ q[image, head, row] * q.shape[-1] ** -0.5
                best = logits.topk(keep)
                weights = best.values.softmax(0)
                out[image, head, row] = weights @ v[image, head, places[best.indices]]
    return out


class Bare(nn.Module):
    """Attention alone, under whatever mask comes."""

    def forward(self, qkv: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*qkv.chunk(3, -1), attn_mask=mask)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Bare()
        self.mask: Tensor | None = None

    def forward(self, qkv: Tensor) -> Tensor:
        return self.attn(qkv, self.mask)


@pytest.mark.parametrize("form", ["keys", "pairs", "additive"])
def test_keys_by_hand_wherever_padding_lies(form: str) -> None:
    generator, host = torch.Generator().manual_seed(0), Host()
    qkv = torch.randn(3, 2, 12, 24, generator=generator)
    real = torch.rand(3, 12, generator=generator) < 0.7
    own = [row.nonzero().flatten() for row in real]
    with sparsiattn.patch(host, "topk", k=0.3, tile=1, input=(1, 2, 12, 24)):
        host.mask = real[:, None, None]
        if form == "pairs":
            host.mask = host.mask & real[:, None, :, None]
        if form == "additive":
            host.mask = torch.zeros(3, 1, 1, 12).masked_fill(~host.mask, float("-inf"))
        out = host(qkv)
    expected = top_keys_by_hand(*qkv.chunk(3, -1), own, 0.3)
    for image, places in enumerate(own):
        torch.testing.assert_close(out[image][:, places], expected[image][:, places])
