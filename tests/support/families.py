"""One small model of every family that computes softmax attention between tokens: the rows of the
support matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from tests.support.census import LISTS, Entry

# module file of timm -> its smallest model, or the one that shows most
TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halo2botnet50ts_256",
    "byobnet": "resnet50_clip",
    "cait": "cait_xxs24_224",
    "convit": "convit_tiny",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_9_240",
    "csatv2": "csatv2",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_distilled_patch16_224",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fastvit": "fastvit_sa12",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "iformer": "iformer_t",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "caformer_s18",
    "mobilenetv3": "mobilenetv4_hybrid_medium",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "pit": "pit_ti_224",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "shvit": "shvit_s1",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "xcit": "xcit_nano_12_p16_224",
}
TORCHVISION = {
    "maxvit": "maxvit_t",
    "swin_transformer": "swin_t",
    "swin_transformer (v2)": "swin_v2_t",
    "vision_transformer": "vit_b_32",
    "video.mvit": "mvit_v2_s",
    "video.swin_transformer": "swin3d_t",
}
# over a second and a half each: wide layers, many sites, or many sizes to try
HEAVY = {
    "byoanet", "byobnet", "crossvit", "csatv2", "davit", "deepseek_vit", "detr",
    "efficientformer_v2", "efficientvit_msra", "fastvit", "gcvit", "gemma4_vit", "hieradet_sam2",
    "lowformer", "maxxvit", "mobilenetv3", "mobilenetv5", "mobilevit", "mvitv2", "nest", "nextvit",
    "perceiver", "pvt_v2", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr",
    "tiny_vit", "tnt", "twins", "vision_transformer_sam", "vitamin", "vjepa2", "volo", "yolos",
}  # fmt: skip
# made of the same layers as another family
TWINS = {
    "altclip", "blip_2", "chinese_clip", "clip (vision)", "clipseg", "deit (teacher)",
    "dinov2 (backbone)", "git", "idefics3", "instructblip", "internvl", "janus", "kosmos-2",
    "metaclip_2", "mlcd", "owlv2", "owlvit", "sam_hq", "siglip (vision)", "smolvlm",
    "swin (backbone)", "vit_msn",
}  # fmt: skip
NO_ATTENTION = {"mobilevitv2", "swiftformer", "poolformer", "convnextv2", "focalnet"}


def _timm(name: str) -> Entry:
    import timm

    return Entry(name, name, partial(timm.create_model, name), resizes=True)


def _listed(library: str, name: str) -> Entry:
    return next(entry for entry in LISTS[library]() if entry.name == name)


def families() -> dict[str, Callable[[], Entry]]:
    """What makes the small model of a family, by ``library/family``."""
    import timm

    from tests.support import hosts_transformers

    found: dict[str, Callable[[], Entry]] = {}
    for family, name in TIMM.items():
        if timm.is_model(name):  # the oldest supported timm lacks some
            found[f"timm/{family}"] = partial(_timm, name)
    for family, name in TORCHVISION.items() if find_spec("torchvision") else ():
        found[f"torchvision/{family}"] = partial(_listed, "torchvision", name)
    for name in hosts_transformers.CASES if find_spec("transformers") else ():
        if name not in NO_ATTENTION:
            found[f"transformers/{name}"] = partial(_listed, "transformers", name)
    return found
