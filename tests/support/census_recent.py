"""What becomes of hosts of 2025 and 2026, and of every task head of transformers' families: one
outcome for each strategy, kept by ``python benchmarks/support.py --recent``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import census, hosts_recent, hosts_transformers, matrix, zoo
from tests.support.hosts_recent import Host

COLUMNS = ("connectivity", "token_drop", "token_drop (norm)", "token_merge")
TOKENS = COLUMNS[1:]
# who does what, by the names of transformers' own tables
TASKS = (
    "MODEL_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES", "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES", "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_MAPPING_NAMES",
)  # fmt: skip
# models of the same configurations, or without softmax attention
SKIPPED = {
    "deit (teacher)", "dinov2 (backbone)", "swin (backbone)", "mobilevitv2", "swiftformer",
    "poolformer", "convnextv2", "focalnet",
}  # fmt: skip
# in `hosts_recent` with the layers that they need, or with another configuration's options
ELSEWHERE = {
    "DPTForDepthEstimation", "DPTForSemanticSegmentation", "BeitForSemanticSegmentation",
    "Data2VecVisionForSemanticSegmentation", "YolosForObjectDetection", "ViTMAEForPreTraining",
    "PerceiverForImageClassificationFourier", "PerceiverForImageClassificationLearned",
    "PerceiverModel",
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "HieraForPreTraining": {
        "decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 2, "mask_ratio": 0.5,
    },
}  # fmt: skip


def _with_text(images: Tensor) -> dict[str, Any]:
    return {"pixel_values": images, "input_ids": torch.tensor([[0, 5, 6, 1]] * 2)}


def _masked_video(videos: Tensor) -> dict[str, Any]:
    masked = torch.arange(128).expand(len(videos), -1) % 2 == 0  # 2 x 8 x 8 tubes
    return {"pixel_values": videos, "bool_masked_pos": masked}


INPUTS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "CLIPModel": _with_text,
    "SiglipModel": _with_text,
    "VideoMAEForPreTraining": _masked_video,
}


def heads() -> Iterator[tuple[str, Host]]:
    """Every task head of the families in `hosts_transformers`, beside the one that is there."""
    import transformers
    from transformers.models.auto import modeling_auto

    shapes = {name: shape for name, _, shape in hosts_transformers.entries()}
    for case, (known, config, options, *_) in hosts_transformers.CASES.items():
        kind = hosts_transformers._named(transformers, config).model_type
        for name in () if case in SKIPPED else sorted(_classes(modeling_auto, kind) - {known}):
            if name not in ELSEWHERE:
                make = partial(_head, name, config, {**options, **OPTIONS.get(name, {})})
                inputs = INPUTS.get(name, hosts_transformers.INPUTS.get(case))
                yield f"{case}: {name}", Host(make, shapes[case] or hosts_recent.IMAGE, inputs)


def _head(name: str, config: str, options: dict[str, Any], transformers: Any) -> nn.Module:
    return hosts_transformers.builder(name, config, options)()


def _classes(tables: Any, kind: str) -> set[str]:
    found: set[str] = set()
    for table in TASKS:
        named = getattr(tables, table, {}).get(kind, ())
        found |= {named} if isinstance(named, str) else set(named)
    return found


def subject(name: str, host: Host) -> matrix.Subject:
    """The model with values, and two images."""
    import transformers

    make = partial(host.make, transformers)
    entry = census.Entry(name, name, make, host.shape, inputs=host.inputs)
    model = _of_unit_gain(zoo.drawn(make))
    specimen = census.Specimen(entry, make, model, host.shape, [])
    return matrix.made(specimen, model)


def _of_unit_gain(model: nn.Module) -> nn.Module:
    """Weights as large as trained ones, so that attention has peaks and shows in the output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("weight") or not parameter.dim():
                continue
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1, generator=generator)
                continue
            width = parameter.numel() // len(parameter)
            parameter.normal_(std=width**-0.5, generator=generator)
    return model


def outcome(subject: matrix.Subject, column: str) -> str:
    """``"works"``, ``"refused: ..."`` or ``"fails: ..."``, which no cell should say."""
    text = matrix.cells(subject, column, [])["auto"]
    if text.startswith("refused") and "Pass input=" in text:
        text = f"fails: asks for the input that was given ({text})"
    if text.startswith("refused") and "tensor([" in text:
        text = f"fails: prints tensors ({text.split('tensor([')[0]}...)"
    return textwrap.shorten(text, 600, placeholder=" ...")


def outcomes(name: str, host: Host) -> dict[str, str]:
    """`outcome` by strategy."""
    model = subject(name, host)
    return {column: outcome(model, column) for column in COLUMNS}


def shares(rows: dict[str, dict[str, str]]) -> tuple[float, float]:
    """Share of the hosts that connectivity patches, and that some token strategy does."""
    connected = sum(row["connectivity"] == matrix.WORKS for row in rows.values())
    shorter = sum(any(row[c] == matrix.WORKS for c in TOKENS) for row in rows.values())
    return connected / len(rows), shorter / len(rows)
