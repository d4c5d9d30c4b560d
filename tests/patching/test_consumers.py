"""Who reads the sequence behind a reduction: original positions come back for whoever needs them,
and for nobody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn

TOKENS, WIDTH = 65, 48
TINY = {"img_size": 64, "patch_size": 8, "embed_dim": WIDTH, "depth": 4, "num_heads": 3}
QUARTER = {"keep": 0.25, "layers": [2]}  # 16 of 64 patches: a square, as a map of 4 x 4
SHAPE = (1, 3, 64, 64)


class Host(nn.Module):
    """A ViT and a head of a user's own."""

    def __init__(self, read: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.vit = VisionTransformer(**TINY, num_classes=0)
        self.conv = nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.line = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.places = nn.Parameter(torch.randn(TOKENS, 1))
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.attend = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.score = nn.Linear(WIDTH, 1)
        self.read = read
        self.seen: list[int] = []

    def embed(self, x: Tensor) -> Tensor:
        return self.vit._pos_embed(self.vit.patch_embed(x))

    def forward(self, x: Tensor) -> Any:
        tokens = self.vit.norm(self.vit.blocks(self.embed(x)))
        self.seen.append(tokens.shape[1])
        return self.read(self, tokens)


def host(read: Callable[[Any, Tensor], Any]) -> Host:
    torch.manual_seed(0)
    return Host(read).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(1))


def square_map(m: Any, t: Tensor) -> Tensor:
    side = int((t.shape[1] - 1) ** 0.5)
    maps = t[:, 1:].transpose(1, 2).reshape(len(t), WIDTH, side, side)
    return F.interpolate(m.conv(maps), size=(64, 64))


POSITIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a square map of as many as there are": square_map,
    "the last token": lambda m, t: t[:, -1],
    "a token in the middle": lambda m, t: t[:, 5],
    "a weight for each position": lambda m, t: (t * m.places[: t.shape[1]]).sum(1),
    "a matrix over positions": lambda m, t: t.transpose(1, 2) @ m.places[: t.shape[1]],
    "a convolution along tokens": lambda m, t: m.line(t.transpose(1, 2)).mean(-1),
    "a sum": lambda m, t: t.sum(1),
    "every second token": lambda m, t: t[:, 1::2].mean(1),
    "an index": lambda m, t: t[:, torch.tensor([1, 2, 3])].mean(1),
    "which is the largest": lambda m, t: t[:, 1:].max(1).indices.float(),
    "the mean with the class token among them": lambda m, t: t.mean(1),
    "a mean of neighbours": lambda m, t: F.avg_pool1d(t.transpose(1, 2), 2).amax(-1),
    "rolled": lambda m, t: (t * t.roll(1, 1)).amax(1),
}
POOLED: dict[str, Callable[[Any, Tensor], Any]] = {
    "class token": lambda m, t: m.score(t[:, 0]),
    "first token as a slice": lambda m, t: t[:, :1].flatten(1),
    "mean of patches": lambda m, t: t[:, 1:].mean(1),
    "maximum": lambda m, t: t.amax(1),
    "norm, linear, then mean": lambda m, t: m.score(m.norm(t))[:, 1:].mean(dim=1),
    "class token and mean": lambda m, t: torch.cat([t[:, 0], t[:, 1:].mean(1)], -1),
    "adaptive average": lambda m, t: F.adaptive_avg_pool1d(t[:, 1:].transpose(1, 2), 1).flatten(1),
    "attention pooling": lambda m, t: m.attend(m.query.expand(len(t), -1, -1), t, t)[0],
    "softmax weights": lambda m, t: (m.score(t).softmax(1) * t).sum(1),
    "product with softmax weights": lambda m, t: m.score(t).softmax(1).transpose(1, 2) @ t,
    "split": lambda m, t: t.split([1, t.shape[1] - 1], dim=1)[0],
}


@pytest.mark.parametrize("read", POSITIONS)
@pytest.mark.parametrize("options", [QUARTER, {"r": 4}], ids=["drop", "merge"])
def test_readers_by_position_get_every_position(read: str, options: dict[str, Any]) -> None:
    model, x = host(POSITIONS[read]), images()
    name = "token_merge" if "r" in options else "token_drop"
    with torch.no_grad():
        dense = model(x)
        with pytest.raises(sparsiattn.InvalidOption, match="restore='auto'"):
            sparsiattn.patch(model, name, input=SHAPE, restore=None, **options)
        with sparsiattn.patch(model, name, input=SHAPE, **options) as live:
            out = model(x)
            assert (live.source() < 0).any() or name == "token_merge"
            assert "positions are restored" in str(live.report())
    assert model.seen == [TOKENS, TOKENS]
    assert out.shape == dense.shape


@pytest.mark.parametrize("read", POOLED)
def test_poolers_get_what_is_left(read: str) -> None:
    """With the values that the head gives for those tokens alone."""
    model, x = host(POOLED[read]), images()
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", input=SHAPE, **QUARTER) as live:
        out = model(x)
        source = live.source()
        whole = model.vit.norm(model.vit.blocks(model.embed(x)))
    assert model.seen == [1 + 16]
    left = whole[source >= 0].view(len(x), 17, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(out, model.read(model, left))


@pytest.mark.parametrize("read", ["mean of patches", "maximum", "attention pooling"])
def test_merged_tokens_are_pooled_by_their_size(read: str) -> None:
    """The pooled values are those of every patch with its cluster's token."""
    model, x = host(POOLED[read]), images()
    with torch.no_grad(), sparsiattn.patch(model, "token_merge", input=SHAPE, r=4):
        out = model(x)
        whole = model.vit.norm(model.vit.blocks(model.embed(x)))
        torch.testing.assert_close(out, model.read(model, whole))
    assert model.seen == [TOKENS]


def test_merged_tokens_beside_a_class_token_stay_merged() -> None:
    model = host(POOLED["class token"])
    with torch.no_grad(), sparsiattn.patch(model, "token_merge", input=SHAPE, r=4):
        model(images())
    assert model.seen == [TOKENS - 4 * 4]


class Hidden(Host):
    """Collects what blocks return and reads it later."""

    def forward(self, x: Tensor) -> Any:
        states, tokens = [], self.embed(x)
        for block in self.vit.blocks:
            tokens = block(tokens)
            states.append(tokens)
        self.seen += [t.shape[1] for t in states]
        return self.read(self, states)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("read", "lengths"),
    [
        (lambda m, s: [t[:, 0] for t in s], [65, 33, 33, 9]),
        (lambda m, s: s[-1][:, 0], [65, 33, 33, 9]),
        (lambda m, s: s[1], [65, 65, 33, 9]),
        (lambda m, s: [square_map(m, s[2]), s[3][:, 0]], [65, 33, 65, 9]),
        (lambda m, s: torch.cat(s, -1)[:, 0], [65, 65, 65, 65]),
        (lambda m, s: {"maps": [square_map(m, t) for t in s]}, [65, 65, 65, 65]),
    ],
)
def test_only_what_is_read_by_position_comes_back(read: Any, lengths: list[int]) -> None:
    torch.manual_seed(0)
    model, plain = Hidden(read).eval(), host(POOLED["class token"])
    plain.load_state_dict(model.state_dict())
    x, options = images(), {"keep": [0.5, 0.25], "layers": [1, 3], "input": SHAPE}
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", **options):
        model(x)
        last = model.vit.blocks(model.embed(x))
        with sparsiattn.patch(plain, "token_drop", **options):
            torch.testing.assert_close(plain.vit.blocks(plain.embed(x)), last)
    assert model.seen == lengths


def test_work_between_blocks_sees_every_position_and_goes_on() -> None:
    class Between(Host):
        def forward(self, x: Tensor) -> Any:
            tokens = self.embed(x)
            for block in self.vit.blocks:
                tokens = block(tokens)
                self.seen.append(tokens.shape[1])
                tokens = tokens + self.line(tokens.transpose(1, 2)).transpose(1, 2)
            return tokens[:, 0]

    torch.manual_seed(0)
    model = Between(square_map).eval()
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.5, layers=[1], input=SHAPE):
        assert model(images()).shape == (2, WIDTH)
    assert model.seen == [TOKENS] * 4


class Dino(VisionTransformer):
    """As DINOv2's own: a keyword or the mode decides what the caller gets."""

    def forward_features(self, x: Tensor, masks: Any = None) -> Any:
        tokens = self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))
        return {"cls": tokens[:, 0], "patches": tokens[:, 1:]}

    def forward(self, x: Tensor, is_training: bool = False, **kwargs: Any) -> Any:
        out = self.forward_features(x, **kwargs)
        return out if is_training or self.training else self.head(out["cls"])

    def encode(self, x: Tensor) -> Tensor:
        return self.blocks(self._pos_embed(self.patch_embed(x)))


def dino() -> Dino:
    torch.manual_seed(0)
    return Dino(**TINY, num_classes=5).eval()


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "is_training": lambda m, x: m(x, is_training=True)["patches"],
    "is_training by position": lambda m, x: m(x, True)["patches"],
    "forward itself": lambda m, x: m.forward(x, is_training=True)["patches"],
    "train mode": lambda m, x: m.train()(x)["patches"],
    "forward_features": lambda m, x: m.forward_features(x)["patches"],
    "another method": lambda m, x: m.encode(x)[:, 1:],
    "blocks": lambda m, x: m.blocks(m._pos_embed(m.patch_embed(x)))[:, 1:],
    "a loop": lambda m, x: looped(m, x)[:, 1:],
}


def looped(model: Any, x: Tensor) -> Tensor:
    tokens = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        tokens = block(tokens)
        assert tokens.shape[1] == TOKENS
    return tokens


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("options", [{"keep": 0.5}, {"r": 4}], ids=["drop", "merge"])
def test_every_way_of_asking_for_patches(way: str, options: dict[str, Any]) -> None:
    model, x = dino(), images()
    name = "token_merge" if "r" in options else "token_drop"
    with torch.no_grad(), sparsiattn.patch(model, name, **options):
        logits = model(x)
        patches = CALLS[way](model, x)
        assert patches.shape == (2, 64, WIDTH)
        assert not torch.equal(patches, torch.zeros_like(patches))
        model.eval()
        assert torch.equal(model(x), logits)
        assert torch.equal(model(x, is_training=False), logits)


@pytest.mark.parametrize("way", CALLS)
def test_restore_none_refuses_every_way_of_asking(way: str) -> None:
    model, x = dino(), images()
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", restore=None):
        logits = model(x)
        with pytest.raises(sparsiattn.InvalidOption, match="restore='auto'"):
            CALLS[way](model, x)
        assert torch.equal(model.eval()(x), logits)


def test_a_call_in_another_way_that_only_pools_stays_short() -> None:
    class Labelled(Host):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = super().forward(x)
            return logits if labels is None else (F.mse_loss(logits, labels), logits)

    torch.manual_seed(0)
    model = Labelled(POOLED["mean of patches"]).eval()
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", input=SHAPE, **QUARTER):
        logits = model(images())
        loss, again = model(images(), labels=torch.zeros(2, WIDTH))
        assert torch.equal(again, logits)
        torch.testing.assert_close(loss, logits.square().mean())
    assert set(model.seen) - {TOKENS} == {17}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_parts_called_from_outside(reentrant: bool) -> None:
    model, x = dino(), images()

    def grads(checkpoint: bool) -> list[Tensor]:
        model.zero_grad()
        tokens = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            if checkpoint:
                tokens = torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=reentrant)
            else:
                tokens = block(tokens)
        assert tokens.shape[1] == TOKENS
        tokens.square().sum().backward()
        return [p.grad for p in model.blocks.parameters()]

    with sparsiattn.patch(model, "token_drop", keep=0.5):
        direct = [g.clone() for g in grads(False)]
        for mine, theirs in zip(grads(True), direct, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_transformers_backbones_hand_whole_states_to_their_necks() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        image_size=64, patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8, reassemble_factors=[1, 1, 1, 0.5], use_auxiliary_head=False,
        num_labels=3,
    )  # fmt: skip
    model, seen = transformers.DPTForSemanticSegmentation(config).eval(), []
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.25, layers=[1]) as live:

        def note(_: Any, args: Any, kwargs: Any) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            seen.extend(tuple(t.shape) for t in states)

        model.neck.register_forward_pre_hook(note, with_kwargs=True)
        model(images())
        assert int((live.source() >= 0).sum(1).max()) == 17
    assert seen == [(2, 65, 32)] * 4
