"""Small models of hosts outside timm: Hugging Face's and torchvision's real classes, and models
written by hand around `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getattr_static
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 32, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
REGISTERS = {**TINY, "num_register_tokens": 3}
TOWERS = {"vision_config": TINY, "text_config": TEXT}


def _hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        settings = getattr(transformers, config)(**options)
        return getattr(transformers, model)._from_config(settings, attn_implementation="sdpa")

    return make


def _torchvision() -> nn.Module:
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    return vision.VisionTransformer(32, 4, 2, 4, 48, 96, num_classes=5)


class Encoder(nn.Module):
    """A ViT by hand around `nn.TransformerEncoder`, without a class token."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, **options)
        self.embed = nn.Conv2d(3, 48, 4, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)

    def forward(self, images: Tensor, **masks: Tensor) -> Tensor:
        return self.encoder(self.embed(images).flatten(2).mT, **masks)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ln_1 = nn.MultiheadAttention(48, 4), nn.LayerNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        return x + self.attn(y, y, y, need_weights=False, attn_mask=None)[0]


class ClipTower(nn.Module):
    """The layout of OpenAI's CLIP: tokens first, batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.input_resolution = 32
        self.conv1 = nn.Conv2d(3, 48, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(48))
        self.positional_embedding = nn.Parameter(torch.randn(65, 48))
        self.transformer = nn.Sequential(_Block(), _Block())
        self.ln_post = nn.LayerNorm(48)
        self.proj = nn.Parameter(torch.randn(48, 8))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).mT
        first = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(x.transpose(0, 1))[0]) @ self.proj


# builder, adapter, prefix tokens, class tokens, pooling
HF = "huggingface"
HOSTS: dict[str, tuple[Callable[[], nn.Module], str, int, int, str]] = {
    "vit": (_hf("ViTForImageClassification", "ViTConfig", **TINY), HF, 1, 1, "prefix"),
    "vit_model": (_hf("ViTModel", "ViTConfig", **TINY), HF, 1, 1, "other"),
    "deit": (_hf("DeiTForImageClassification", "DeiTConfig", **TINY), HF, 2, 2, "prefix"),
    "deit_teacher": (
        _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", **TINY),
        HF, 2, 2, "prefix",
    ),
    "dinov2": (
        _hf("Dinov2ForImageClassification", "Dinov2Config", **TINY), HF, 1, 1, "other"
    ),
    "dinov2_registers": (
        _hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **REGISTERS),
        HF, 4, 1, "other",
    ),
    "dinov3": (_hf("DINOv3ViTModel", "DINOv3ViTConfig", **REGISTERS), HF, 4, 1, "other"),
    "clip": (_hf("CLIPVisionModel", "CLIPVisionConfig", **TINY), HF, 1, 1, "other"),
    "clip_projection": (
        _hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", **TINY),
        HF, 1, 1, "other",
    ),
    "clip_classifier": (
        _hf("CLIPForImageClassification", "CLIPConfig", **TOWERS), HF, 1, 1, "avg"
    ),
    "siglip": (_hf("SiglipVisionModel", "SiglipVisionConfig", **TINY), HF, 0, 0, "other"),
    "siglip_classifier": (
        _hf("SiglipForImageClassification", "SiglipConfig", **TOWERS), HF, 0, 0, "avg"
    ),
    "beit": (
        _hf("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True, **TINY),
        HF, 1, 1, "avg",
    ),
    "beit_shared_bias": (
        _hf("BeitForImageClassification", "BeitConfig", use_shared_relative_position_bias=True,
            use_mean_pooling=False, **TINY),
        HF, 1, 1, "prefix",
    ),
    "torchvision": (_torchvision, "torchvision_vit", 1, 1, "prefix"),
    "clip_tower": (ClipTower, "clip_vit", 1, 1, "prefix"),
    "encoder": (Encoder, "generic", 0, 0, "other"),
}  # fmt: skip


class OneTensor(nn.Module):
    """A host whose output is one tensor: logits, or the tokens of models without a head."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.host(*args, **kwargs)
        names = ("logits", "image_embeds", "last_hidden_state")
        found = (getattr(output, name, None) for name in names)
        return output if isinstance(output, Tensor) else next(x for x in found if x is not None)


def build(name: str) -> nn.Module:
    """The host in eval mode, with its small weights drawn again, so that every branch matters."""
    torch.manual_seed(1)
    model = HOSTS[name][0]().eval()
    forget_tables(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 0 and parameter.abs().max() < 0.15:
                parameter.normal_(std=0.15)
    return model


def forget_tables(model: nn.Module) -> None:
    """BEiT of transformers keeps a table for all models of a process: without this, one that was
    made in inference mode would fail every later test that trains."""
    for kind in {type(module) for module in model.modules()}:
        method = getattr_static(kind, "generate_relative_position_index", None)
        cached = method.__func__ if isinstance(method, staticmethod) else method
        plain = getattr(cached, "__wrapped__", None)
        if plain is not None:
            name = "generate_relative_position_index"
            setattr(kind, name, staticmethod(plain) if cached is not method else plain)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))
