"""The short list of `recommend` for speed alone: one setting of each family."""

from __future__ import annotations

from torch import Tensor, nn

from sparsiattn.analysis.recommendation.families import Settings, families, shape_of
from sparsiattn.analysis.recommendation.plan import START
from sparsiattn.patching.discovery.backbone import backbone_of
from sparsiattn.patching.survey import survey


def short_list(model: nn.Module, images: Tensor) -> list[Settings]:
    """Settings that are expected to take three quarters of the dense time, one of each family.

    Args:
        model: Not patched.
        images: A batch ``[B, C, H, W]`` of the size that will run.

    Returns:
        Keyword arguments of `patch`, in the order in which `recommend` tries them.

    Raises:
        NothingToPatch: The model has no attention that can be reached.

    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> [settings["strategy"] for settings in short_list(tiny_vit(), tiny_images())]
    ['token_merge', 'connectivity', 'token_merge', 'token_drop', 'hybrid']
    """
    shape = (1, *images.shape[1:])
    known = backbone_of(model).input_shape(model) == shape
    surveyed = survey(model, None if known else shape)
    surveyed.attention(model)  # raises where there is none
    own = {} if known else {"input": shape}
    return [
        {**family.build(family.solve(START)), **own}
        for family in families(shape_of(surveyed, model))
        if not family.parent  # a variant is tried only where its family does well
    ]
