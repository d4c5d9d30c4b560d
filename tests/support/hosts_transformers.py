"""Vision encoders of Hugging Face's transformers, made small by their configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

Shape = tuple[int, ...]

PLAIN: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 32, "patch_size": 4,
}  # fmt: skip
SIZED = {**PLAIN, "image_size": (32, 32), "patch_size": (4, 4)}
TEXT: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
TOWERS: dict[str, Any] = {"vision_config": PLAIN, "text_config": TEXT}
STAGES: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}
WINDOWS: dict[str, Any] = {**STAGES, "image_size": 64, "patch_size": 4, "window_size": 4}
VIDEO: dict[str, Any] = {**PLAIN, "num_frames": 4}
PYRAMID: dict[str, Any] = {
    "depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4],
}  # fmt: skip

# model class, configuration class, options, shape of the input where it is no square image
CASES: dict[str, tuple[Any, ...]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", PLAIN),
    "deit": ("DeiTForImageClassification", "DeiTConfig", PLAIN),
    "deit (teacher)": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", PLAIN),
    "vit_msn": ("ViTMSNForImageClassification", "ViTMSNConfig", PLAIN),
    "vit_mae": ("ViTMAEModel", "ViTMAEConfig", {**PLAIN, "mask_ratio": 0.0}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", PLAIN),
    "dinov2 (backbone)": ("Dinov2Backbone", "Dinov2Config", PLAIN),
    "dinov2_with_registers": (
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
        {**PLAIN, "num_register_tokens": 3},
    ),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {**PLAIN, "num_register_tokens": 3}),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", PLAIN),
    "clip": ("CLIPForImageClassification", "CLIPConfig", TOWERS),
    "clip (vision)": ("CLIPVisionModel", "CLIPVisionConfig", PLAIN),
    "metaclip_2": ("MetaClip2VisionModel", "MetaClip2VisionConfig", PLAIN),
    "altclip": ("AltCLIPVisionModel", "AltCLIPVisionConfig", PLAIN),
    "chinese_clip": ("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", PLAIN),
    "clipseg": ("CLIPSegVisionModel", "CLIPSegVisionConfig", PLAIN),
    "x_clip": ("XCLIPVisionModel", "XCLIPVisionConfig", {**PLAIN, "num_frames": 1}),
    "git": ("GitVisionModel", "GitVisionConfig", PLAIN),
    "groupvit": ("GroupViTVisionModel", "GroupViTVisionConfig", {
        "hidden_size": 48, "depths": [2, 2, 2], "num_hidden_layers": 6, "image_size": 32,
        "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0], "num_attention_heads": 4,
        "patch_size": 4, "intermediate_size": 96,
    }),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", TOWERS),
    "siglip (vision)": ("SiglipVisionModel", "SiglipVisionConfig", PLAIN),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4,
        "intermediate_size": 96, "num_patches": 64, "image_size": 32,
    }),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", PLAIN),
    "mlcd": ("MLCDVisionModel", "MLCDVisionConfig", PLAIN),
    "pixio": ("PixioModel", "PixioConfig", PLAIN),
    "tipsv2": ("Tipsv2VisionModel", "Tipsv2VisionConfig", PLAIN),
    "blip": ("BlipVisionModel", "BlipVisionConfig", PLAIN),
    "blip_2": ("Blip2VisionModel", "Blip2VisionConfig", PLAIN),
    "instructblip": ("InstructBlipVisionModel", "InstructBlipVisionConfig", PLAIN),
    "kosmos-2": ("Kosmos2VisionModel", "Kosmos2VisionConfig", PLAIN),
    "janus": ("JanusVisionModel", "JanusVisionConfig", PLAIN),
    "internvl": ("InternVLVisionModel", "InternVLVisionConfig", SIZED),
    "owlvit": ("OwlViTVisionModel", "OwlViTVisionConfig", PLAIN),
    "owlv2": ("Owlv2VisionModel", "Owlv2VisionConfig", PLAIN),
    "idefics2": ("Idefics2VisionTransformer", "Idefics2VisionConfig", PLAIN),
    "idefics3": ("Idefics3VisionTransformer", "Idefics3VisionConfig", PLAIN),
    "smolvlm": ("SmolVLMVisionTransformer", "SmolVLMVisionConfig", PLAIN),
    "pixtral": ("PixtralVisionModel", "PixtralVisionConfig", PLAIN),
    "llama4": ("Llama4VisionModel", "Llama4VisionConfig", {
        **PLAIN, "vision_output_dim": 48, "projector_input_dim": 48, "projector_output_dim": 48,
        "intermediate_size": 192,
    }),
    "beit": ("BeitForImageClassification", "BeitConfig",
             {**PLAIN, "use_relative_position_bias": True}),
    "data2vec-vision": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig",
                        {**PLAIN, "use_relative_position_bias": True}),
    "yolos": ("YolosModel", "YolosConfig",
              {**PLAIN, "image_size": [32, 32], "num_detection_tokens": 5}),
    "vitpose_backbone": ("VitPoseBackbone", "VitPoseBackboneConfig",
                         {**PLAIN, "patch_size": [16, 16], "image_size": [64, 64]}),
    "vitdet": ("VitDetModel", "VitDetConfig", {
        **PLAIN, "mlp_ratio": 2, "window_block_indices": [0], "window_size": 4,
        "use_relative_position_embeddings": True, "pretrain_image_size": 32,
    }),
    "dpt": ("DPTModel", "DPTConfig", PLAIN),
    "sam": ("SamVisionModel", "SamVisionConfig", {
        **PLAIN, "image_size": 64, "window_size": 4, "global_attn_indexes": [1],
        "output_channels": 16, "mlp_dim": 96,
    }),
    "sam_hq": ("SamHQVisionModel", "SamHQVisionConfig", {
        **PLAIN, "image_size": 64, "window_size": 4, "global_attn_indexes": [1],
        "output_channels": 16, "mlp_dim": 96,
    }),
    "sam2": ("Sam2HieraDetModel", "Sam2HieraDetConfig", {
        "hidden_size": 24, "num_attention_heads": 1, "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [24, 48, 96, 192],
        "num_attention_heads_per_stage": [1, 2, 4, 8], "global_attention_blocks": [3],
    }),
    "swin": ("SwinForImageClassification", "SwinConfig", WINDOWS),
    "swin (backbone)": ("SwinBackbone", "SwinConfig", WINDOWS),
    "donut-swin": ("DonutSwinForImageClassification", "DonutSwinConfig", WINDOWS),
    "maskformer-swin": ("MaskFormerSwinModel", "MaskFormerSwinConfig", WINDOWS),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", WINDOWS),
    "swin2sr": ("Swin2SRModel", "Swin2SRConfig", {**WINDOWS, "patch_size": 1}),
    "segformer": ("SegformerForImageClassification", "SegformerConfig", {
        **PYRAMID, "sr_ratios": [8, 4, 2, 1],
    }, (1, 3, 64, 64)),
    "glpn": ("GLPNModel", "GLPNConfig", PYRAMID, (1, 3, 64, 64)),
    "pvt": ("PvtForImageClassification", "PvtConfig", {**PYRAMID, "image_size": 64}),
    "pvt_v2": ("PvtV2ForImageClassification", "PvtV2Config", {**PYRAMID, "image_size": 64}),
    "hiera": ("HieraForImageClassification", "HieraConfig", {
        "embed_dim": 24, "image_size": [64, 64], "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
    }),
    "levit": ("LevitForImageClassification", "LevitConfig", {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1], "key_dim": [16, 16, 16],
    }),
    "cvt": ("CvtForImageClassification", "CvtConfig", {
        "embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3],
        "cls_token": [False, False, True],
    }, (1, 3, 64, 64)),
    "mobilevit": ("MobileViTForImageClassification", "MobileViTConfig", {
        "image_size": 64, "hidden_sizes": [48, 64, 80],
    }),
    "mobilevitv2": ("MobileViTV2ForImageClassification", "MobileViTV2Config", {"image_size": 64}),
    "swiftformer": ("SwiftFormerForImageClassification", "SwiftFormerConfig", {
        "depths": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64], "image_size": 64,
    }),
    "poolformer": ("PoolFormerForImageClassification", "PoolFormerConfig", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64],
    }, (1, 3, 64, 64)),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64],
    }, (1, 3, 64, 64)),
    "focalnet": ("FocalNetForImageClassification", "FocalNetConfig", {
        "embed_dim": 24, "depths": [1, 1], "image_size": 64, "focal_levels": [2, 2],
        "focal_windows": [3, 3], "hidden_sizes": [24, 48],
    }),
    "perceiver": ("PerceiverForImageClassificationConvProcessing", "PerceiverConfig", {
        "num_latents": 8, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 2,
    }, (1, 3, 224, 224)),
    "detr": ("TableTransformerModel", "TableTransformerConfig", {}, (1, 3, 64, 64)),
    "videomae": ("VideoMAEForVideoClassification", "VideoMAEConfig", VIDEO, (1, 4, 3, 32, 32)),
    "vivit": ("VivitModel", "VivitConfig", {**VIDEO, "tubelet_size": [2, 4, 4]},
              (1, 4, 3, 32, 32)),
    "timesformer": ("TimesformerModel", "TimesformerConfig", VIDEO, (1, 4, 3, 32, 32)),
    "vjepa2": ("VJEPA2Model", "VJEPA2Config", {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "crop_size": 32,
        "patch_size": 4, "frames_per_clip": 4, "pred_hidden_size": 48, "mlp_ratio": 2.0,
        "pred_num_attention_heads": 4, "pred_num_hidden_layers": 1,
    }, (1, 4, 3, 32, 32)),
}  # fmt: skip
if find_spec("transformers") and not find_spec("transformers.models.tipsv2"):
    del CASES["tipsv2"]  # the oldest supported transformers lacks it


def _patches(images: Tensor) -> dict[str, Any]:
    """SigLIP 2 with native aspect ratios takes cut and flattened patches."""
    rows, columns = images.shape[-2] // 4, images.shape[-1] // 4
    return {
        "pixel_values": rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.tensor([[rows, columns]] * len(images), device="cpu"),
    }


INPUTS: dict[str, Callable[[Tensor], dict[str, Any]]] = {"siglip2": _patches}


def builder(model: str, config: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        found = _named(transformers, model)
        settings = _named(transformers, config)(**options)
        return found._from_config(settings)  # type: ignore[no-any-return]

    return make


def _named(transformers: Any, name: str) -> Any:
    """A class that the package may not export at its top."""
    found = getattr(transformers, name, None)
    if found is not None:
        return found
    kind = name.split("Vision")[0].lower()
    from importlib import import_module

    return getattr(import_module(f"transformers.models.{kind}.modeling_{kind}"), name)


def entries() -> Iterator[tuple[str, Callable[[], nn.Module], Shape | None]]:
    for name, (model, config, options, *rest) in CASES.items():
        side = options.get("image_size", options.get("vision_config", {}).get("image_size", 32))
        rows, columns = (side, side) if isinstance(side, int) else side
        shape = rest[0] if rest else (1, 3, rows, columns)
        yield name, builder(model, config, options), shape
