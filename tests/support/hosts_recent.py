"""Hosts that people patch in 2025 and 2026: dense heads on backbones, detectors, vision towers of
language models, video encoders; made small by their configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.across_views import AcrossViews
from tests.support.hosts_transformers import PLAIN

Shape = tuple[int, ...]
Make = Callable[[Any], nn.Module]
IMAGE = (1, 3, 64, 64)

DINO: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64,
    "patch_size": 8, "intermediate_size": 64,
}  # fmt: skip
NECK: dict[str, Any] = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
SWIN: dict[str, Any] = {
    "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4,
    "image_size": 64, "patch_size": 2, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
TOWER: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True)
class Host:
    """make: the model, from the module `transformers`. shape: of one image or video. inputs: what
    the model takes instead, made of that."""

    make: Make
    shape: Shape = IMAGE
    inputs: Callable[[Tensor], dict[str, Any]] | None = None


def _dino(T: Any, **options: Any) -> Any:
    return T.Dinov2Config(**DINO, out_indices=[1, 2, 3, 4], **options)


def _depth_anything(T: Any, prefix: str = "") -> nn.Module:
    config = getattr(T, f"{prefix}DepthAnythingConfig")(
        backbone_config=_dino(T, reshape_hidden_states=False), reassemble_hidden_size=32,
        patch_size=8, head_hidden_size=4, **NECK,
    )  # fmt: skip
    return getattr(T, f"{prefix}DepthAnythingForDepthEstimation")(config)  # type: ignore[no-any-return]


def _upernet(T: Any, backbone: Any) -> nn.Module:
    return T.UperNetForSemanticSegmentation(  # type: ignore[no-any-return]
        T.UperNetConfig(
            backbone_config=backbone, hidden_size=16, use_auxiliary_head=False,
            pool_scales=[1, 2], num_labels=3,
        )
    )  # fmt: skip


def _dpt(T: Any, head: str) -> nn.Module:
    config = T.DPTConfig(
        **DINO, **NECK, backbone_out_indices=[0, 1, 2, 3], reassemble_factors=[1, 1, 1, 0.5],
        use_auxiliary_head=False, num_labels=3,
    )  # fmt: skip
    return getattr(T, f"DPTFor{head}")(config)  # type: ignore[no-any-return]


def _eomt(T: Any, name: str, **options: Any) -> nn.Module:
    config = getattr(T, f"{name}Config")(
        **DINO, num_blocks=1, num_queries=5, num_upscale_blocks=1, num_labels=3, **options
    )
    return getattr(T, f"{name}ForUniversalSegmentation")(config)  # type: ignore[no-any-return]


def _packed(patch: int, merge: int = 2, times: int = 2) -> Callable[[Tensor], dict[str, Any]]:
    """Patches in squares of ``merge`` by ``merge``, as Qwen's image processor packs them."""

    def pack(images: Tensor) -> dict[str, Any]:
        rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
        b = len(images)
        x = images.view(b, 3, rows // merge, merge, patch, columns // merge, merge, patch)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(b * rows * columns, 3, 1, patch * patch)
        values = x.expand(-1, -1, times, -1).flatten(1)
        return {
            "hidden_states": values,
            "grid_thw": torch.tensor([[1, rows, columns]] * b, device="cpu"),
        }

    return pack


def _flat_patches(patch: int) -> Callable[[Tensor], dict[str, Any]]:
    """Kimi's patches, end to end in raster order."""

    def pack(images: Tensor) -> dict[str, Any]:
        rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
        x = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)
        grids = torch.tensor([[1, rows, columns]] * len(images), device="cpu")
        return {"pixel_values": x.reshape(-1, 3, patch, patch), "grid_thw": grids}

    return pack


def _placed_patches(patch: int) -> Callable[[Tensor], dict[str, Any]]:
    """Gemma 4's patches of every image, with their column and row beside them."""

    def pack(images: Tensor) -> dict[str, Any]:
        x = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1)
        rows, columns = x.shape[1:3]
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
        return {
            "pixel_values": x.reshape(len(images), rows * columns, -1),
            "pixel_position_ids": places.expand(len(images), -1, -1),
        }

    return pack


def _with_task(images: Tensor) -> dict[str, Any]:
    return {"pixel_values": images, "task_inputs": torch.zeros(len(images), 8, dtype=torch.long)}


def _with_prompt_depth(images: Tensor) -> dict[str, Any]:
    return {"pixel_values": images, "prompt_depth": images[:, :1, ::8, ::8].abs()}


def _tower(T: Any, model: str, config: str, **options: Any) -> nn.Module:
    from tests.support.hosts_transformers import builder

    return builder(model, config, options)()


def _sam3(T: Any) -> nn.Module:
    backbone = T.Sam3ViTConfig(
        **{**DINO, "pretrain_image_size": 64}, window_size=4, global_attn_indexes=[1, 3]
    )
    sizes = [[32, 32], [16, 16], [8, 8]]
    config = T.Sam3VisionConfig(backbone_config=backbone, fpn_hidden_size=16,
                                backbone_feature_sizes=sizes)  # fmt: skip
    return T.Sam3VisionModel(config)  # type: ignore[no-any-return]


def _sam2(T: Any) -> nn.Module:
    backbone = T.Sam2HieraDetConfig(
        hidden_size=24, num_attention_heads=1, image_size=[128, 128],
        blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[24, 48, 96, 192],
        num_attention_heads_per_stage=[1, 2, 4, 8], global_attention_blocks=[3],
        window_size_per_stage=[8, 4, 8, 4],
    )  # fmt: skip
    return T.Sam2VisionModel(  # type: ignore[no-any-return]
        T.Sam2VisionConfig(
            backbone_config=backbone, backbone_channel_list=[192, 96, 48, 24], fpn_hidden_size=16,
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        )
    )  # fmt: skip


def _depth_pro(T: Any) -> nn.Module:
    tower = {**DINO, "image_size": 32, "patch_size": 8}
    config = T.DepthProConfig(
        patch_size=32, fusion_hidden_size=16, intermediate_hook_ids=[3, 1],
        intermediate_feature_dims=[16, 16], scaled_images_feature_dims=[16, 16, 16],
        image_model_config=T.Dinov2Config(**tower), patch_model_config=T.Dinov2Config(**tower),
        fov_model_config=T.Dinov2Config(**tower), merge_padding_value=0,
    )  # fmt: skip
    return T.DepthProForDepthEstimation(config)  # type: ignore[no-any-return]


def _zoedepth(T: Any) -> nn.Module:
    backbone = T.BeitConfig(
        **DINO, use_relative_position_bias=True, reshape_hidden_states=False,
        out_indices=[1, 2, 3, 4],
    )  # fmt: skip
    config = T.ZoeDepthConfig(
        backbone_config=backbone, **NECK, bottleneck_features=8, num_relative_features=8,
        bin_embedding_dim=8, num_patch_transformer_layers=1, patch_transformer_hidden_size=8,
        patch_transformer_intermediate_size=16, patch_transformer_num_attention_heads=2,
        reassemble_factors=[1, 1, 1, 0.5], num_attractors=[4, 2, 2, 1], backbone_hidden_size=32,
    )  # fmt: skip
    return T.ZoeDepthForDepthEstimation(config)  # type: ignore[no-any-return]


def _beit_segmentation(T: Any, name: str = "Beit") -> nn.Module:
    config = getattr(T, f"{name}Config")(
        **DINO, use_relative_position_bias=True, out_indices=[1, 2, 3, 4], num_labels=3,
        use_auxiliary_head=False, pool_scales=[1, 2], auxiliary_channels=8,
    )  # fmt: skip
    return getattr(T, f"{name}ForSemanticSegmentation")(config)  # type: ignore[no-any-return]


def _mask2former(T: Any) -> nn.Module:
    config = T.Mask2FormerConfig(
        backbone_config=T.SwinConfig(**SWIN), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=32, num_queries=5, num_labels=3,
    )  # fmt: skip
    return T.Mask2FormerForUniversalSegmentation(config)  # type: ignore[no-any-return]


def _maskformer(T: Any) -> nn.Module:
    decoder = T.DetrConfig(d_model=32, decoder_layers=1, encoder_layers=1, num_queries=5,
                           encoder_attention_heads=2, decoder_attention_heads=2,
                           encoder_ffn_dim=32, decoder_ffn_dim=32)  # fmt: skip
    config = T.MaskFormerConfig(
        backbone_config=T.SwinConfig(**SWIN), decoder_config=decoder, fpn_feature_size=32,
        mask_feature_size=32, num_labels=3,
    )  # fmt: skip
    return T.MaskFormerForInstanceSegmentation(config)  # type: ignore[no-any-return]


def _oneformer(T: Any) -> nn.Module:
    config = T.OneFormerConfig(
        backbone_config=T.SwinConfig(**SWIN), conv_dim=32, mask_dim=32, hidden_dim=32,
        encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=32, num_queries=5, task_seq_len=8, num_labels=3, text_encoder_width=32,
        text_encoder_num_layers=1, text_encoder_context_length=8, text_encoder_vocab_size=32,
        query_dec_layers=1,
    )  # fmt: skip
    return T.OneFormerForUniversalSegmentation(config)  # type: ignore[no-any-return]


def _yolos(T: Any) -> nn.Module:
    config = T.YolosConfig(**{**DINO, "image_size": [64, 64]}, num_detection_tokens=5)
    return T.YolosForObjectDetection(config)  # type: ignore[no-any-return]


DECODER: dict[str, Any] = {
    "d_model": 16, "num_queries": 5, "decoder_layers": 1, "decoder_ffn_dim": 32, "num_labels": 3,
}  # fmt: skip


def _rf_detr(T: Any) -> nn.Module:
    backbone = T.RfDetrDinov2Config(
        **DINO, num_windows=2, window_block_indexes=[0, 2], out_indices=[2, 4]
    )
    config = T.RfDetrConfig(
        backbone_config=backbone, **DECODER, decoder_self_attention_heads=2, group_detr=1,
        decoder_cross_attention_heads=2, c2f_num_blocks=1,
    )  # fmt: skip
    return T.RfDetrForObjectDetection(config)  # type: ignore[no-any-return]


def _lw_detr(T: Any) -> nn.Module:
    backbone = T.LwDetrViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=64, patch_size=8,
        pretrain_image_size=64, window_block_indices=[0, 2], num_windows=4, out_indices=[2, 4],
    )  # fmt: skip
    config = T.LwDetrConfig(
        backbone_config=backbone, **DECODER, decoder_self_attention_heads=2, group_detr=1,
        decoder_cross_attention_heads=2, c2f_num_blocks=1, projector_scale_factors=[1.0],
    )  # fmt: skip
    return T.LwDetrForObjectDetection(config)  # type: ignore[no-any-return]


HGNET: dict[str, Any] = {
    "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 16],
    "stage_mid_channels": [8] * 4, "stage_out_channels": [16] * 4, "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [1] * 4, "hidden_sizes": [16] * 4, "depths": [1] * 4,
    "embedding_size": 8, "out_indices": [2, 3, 4],
}  # fmt: skip
HYBRID: dict[str, Any] = {
    **DECODER, "encoder_hidden_dim": 16, "encoder_in_channels": [16] * 3,
    "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "decoder_in_channels": [16] * 3, "num_denoising": 0, "decoder_layers": 2,
}  # fmt: skip


def _d_fine(T: Any) -> nn.Module:
    config = T.DFineConfig(backbone_config=T.HGNetV2Config(**HGNET), **HYBRID)
    return T.DFineForObjectDetection(config)  # type: ignore[no-any-return]


def _deimv2(T: Any) -> nn.Module:
    backbone = T.DINOv3ViTConfig(
        **{**DINO, "patch_size": 16}, num_register_tokens=2, out_indices=[2, 3, 4],
        reshape_hidden_states=True, apply_layernorm=False,
    )  # fmt: skip
    options = {**HYBRID, "encoder_in_channels": [32] * 3, "sta_inplanes": 8}
    return T.Deimv2ForObjectDetection(  # type: ignore[no-any-return]
        T.Deimv2Config(backbone_config=backbone, **options)
    )


def _videoprism(T: Any) -> nn.Module:
    config = T.VideoPrismVisionConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, num_spatial_layers=2,
        num_temporal_layers=2, num_frames=4, image_size=32, tubelet_size=[1, 8, 8],
    )  # fmt: skip
    return T.VideoPrismVisionModel(config)  # type: ignore[no-any-return]


def _pe_video(T: Any) -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384",
              "model_args": size, "num_classes": 16, "global_pool": "map"}  # fmt: skip
    config = T.PeVideoEncoderConfig(
        vision_config=vision, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return T.PeVideoEncoder(config)  # type: ignore[no-any-return]


def _videomt(T: Any) -> nn.Module:
    config = T.VideomtConfig(
        **DINO, num_blocks=1, num_queries=5, num_upscale_blocks=1, num_labels=3
    )
    return T.VideomtForUniversalSegmentation(config)  # type: ignore[no-any-return]


def _tipsv2_dpt(T: Any) -> nn.Module:
    backbone = T.Tipsv2VisionConfig(**DINO, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    config = T.Tipsv2DptConfig(
        backbone_config=backbone, **NECK, reassemble_factors=[1, 1, 1, 0.5], num_labels=3
    )
    return T.Tipsv2DptForDepthEstimation(config)  # type: ignore[no-any-return]


def _depth_anything_3(T: Any) -> nn.Module:
    return AcrossViews()


VIDEO = (1, 4, 3, 32, 32)
HOSTS: dict[str, Host] = {
    "dpt (depth)": Host(partial(_dpt, head="DepthEstimation")),
    "dpt (segmentation)": Host(partial(_dpt, head="SemanticSegmentation")),
    "depth_anything": Host(_depth_anything),
    "prompt_depth_anything": Host(
        partial(_depth_anything, prefix="Prompt"), inputs=_with_prompt_depth
    ),
    "depth_anything_3": Host(_depth_anything_3, (1, 3, 3, 32, 48)),
    "tipsv2_dpt": Host(_tipsv2_dpt),
    "zoedepth": Host(_zoedepth),
    "depth_pro": Host(_depth_pro, (1, 3, 128, 128)),
    "upernet (dinov2)": Host(lambda T: _upernet(T, _dino(T))),
    "upernet (swin)": Host(lambda T: _upernet(T, T.SwinConfig(**SWIN))),
    "beit (segmentation)": Host(_beit_segmentation),
    "data2vec (segmentation)": Host(partial(_beit_segmentation, name="Data2VecVision")),
    "dinov2 (four maps)": Host(lambda T: T.Dinov2Backbone(_dino(T))),
    "eomt": Host(partial(_eomt, name="Eomt")),
    "eomt_dinov3": Host(partial(_eomt, name="EomtDinov3")),
    "mask2former (swin)": Host(_mask2former),
    "maskformer (swin)": Host(_maskformer),
    "oneformer (swin)": Host(_oneformer, inputs=_with_task),
    "sam2 (vision)": Host(_sam2, (1, 3, 128, 128)),
    "sam3 (vision)": Host(_sam3),
    "yolos (detection)": Host(_yolos),
    "rf_detr": Host(_rf_detr),
    "lw_detr": Host(_lw_detr),
    "d_fine": Host(_d_fine),
    "deimv2": Host(_deimv2, (1, 3, 128, 128)),
    "videoprism": Host(_videoprism, VIDEO),
    "pe_video": Host(_pe_video, VIDEO),
    "videomt": Host(_videomt, (1, 2, 3, 64, 64)),
    "vit_mae (masked)": Host(lambda T: T.ViTMAEForPreTraining(T.ViTMAEConfig(
        **PLAIN, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, mask_ratio=0.5,
    )), (1, 3, 32, 32)),
    "qwen2_5_vl": Host(partial(
        _tower, model="Qwen2_5_VisionTransformerPretrainedModel", config="Qwen2_5_VLVisionConfig",
        **TOWER, patch_size=8, out_hidden_size=32, window_size=32, fullatt_block_indexes=[1],
    ), inputs=_packed(8)),
    "qwen3_vl": Host(partial(
        _tower, model="Qwen3VLVisionModel", config="Qwen3VLVisionConfig", **TOWER, patch_size=8,
        out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0],
    ), inputs=_packed(8)),
    "glm4v": Host(partial(
        _tower, model="Glm4vVisionModel", config="Glm4vVisionConfig", **TOWER, patch_size=8,
        image_size=64, out_hidden_size=32,
    ), inputs=_packed(8)),
    "kimi_k25": Host(partial(
        _tower, model="Kimi_K25VisionModel", config="Kimi_K25VisionConfig", patch_size=8,
        pos_emb_height=8, pos_emb_width=8, num_attention_heads=2, num_hidden_layers=2,
        hidden_size=32, intermediate_size=64,
    ), inputs=_flat_patches(8)),
    "gemma3": Host(partial(
        _tower, model="SiglipVisionModel", config="SiglipVisionConfig", **PLAIN,
        vision_use_head=False,
    ), (1, 3, 32, 32)),
    "gemma4": Host(partial(
        _tower, model="Gemma4VisionModel", config="Gemma4VisionConfig", hidden_size=32,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, patch_size=8, position_embedding_size=64,
    ), (1, 3, 72, 72), _placed_patches(8)),
}  # fmt: skip
