"""`Backbone`, the contract of an adapter: what must be known of a model family to patch it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.fx
from torch import nn

from sparsiattn.attention import geometry
from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.layout import Layout
from sparsiattn.attention.packing import PackedInput
from sparsiattn.attention.site import Site
from sparsiattn.attention.structure import GUESS, Structure
from sparsiattn.errors import NothingToPatch, RenamedMembers
from sparsiattn.patching.discovery.exclusions import heads_per_call, over_channels, pools
from sparsiattn.patching.discovery.host_attributes import (
    class_rows,
    has_table,
    has_temperature,
    known_class_tokens,
    pair,
    trained_side,
)
from sparsiattn.patching.discovery.meta_model import MetaInputs, image_inputs
from sparsiattn.patching.discovery.probe import AttentionCall
from sparsiattn.patching.discovery.structure import traced_structure
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.attribute_override import AttributeOverride
from sparsiattn.runtime.multihead import why_not_reached

Pooling = Literal["prefix", "avg", "max", "other"]
"""The part of the final token sequence that a model's head reads; see `Backbone.pooling`."""

BIAS_TABLES = (
    *("relative_position_bias_table", "relative_position_index", "rel_pos", "rel_pos_bias"),
    *("attention_biases", "cpb_mlp", "meta_mlp"),
)
"""Names of tables of relative positions that all windows of an image share."""
SINGLE = (
    "a single query (class attention or a pooling head): nothing to save, so only sites= with this "
    "name patches it"
)
QUERY_TABLES = ("rel_pos_h", "height_rel")
"""Names of tables of relative positions whose bias depends on the query."""


class Backbone(RenamedMembers):
    """Adapter for a family of models.

    This base class works for any model that calls scaled dot product attention. Subclasses override
    the methods for which they know a better answer. Decide by structure (the attributes of a
    module), not by class names or versions.

    Attributes:
        registers_as: The kind of plug-in, for the registry.
        name: Name in the registry and in reports.
        summary: One line for `list_backbones`.

    >>> class Mine(Backbone):
    ...     name = "mine"
    ...     def matches(self, model):
    ...         return hasattr(model, "my_blocks")
    >>> Mine().matches(torch.nn.Identity())
    False
    """

    renamed_members: ClassVar[Mapping[str, str]] = {
        "edits": "attribute_overrides",
        "packs": "packs_batch",
        "raster": "is_raster_order",
        "margin": "halo",
        "why_leave": "why_skip",
        "dry_inputs": "meta_inputs",
    }

    registers_as: ClassVar[str] = "backbones"
    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    def why_not(self, model: nn.Module) -> list[str]:
        """Reasons why this adapter does not fit the model; empty if it does.

        Args:
            model: The user's model.
        """
        raise NotImplementedError

    def input_shape(self, model: nn.Module) -> tuple[int, ...] | None:
        """The shape of one image, ``(1, C, H, W)``.

        Args:
            model: The user's model.

        Returns:
            The size that the model was built for, else the one in ``pretrained_cfg`` or ``config``;
            None if neither states it.
        """
        embed = getattr(model, "patch_embed", None)
        convolutions = (m for m in self.image_module(model).modules() if isinstance(m, nn.Conv2d))
        channels = next((c.in_channels for c in convolutions), 3)
        built = getattr(embed, "img_size", None)
        if built is not None:
            return (1, channels, *pair(built))
        card = getattr(model, "pretrained_cfg", None)
        if isinstance(card, dict) and "input_size" in card:
            return (1, *card["input_size"])
        config = getattr(model, "config", None)
        side = getattr(config, "image_size", trained_side(model))
        return None if side is None else (1, getattr(config, "num_channels", 3), *pair(side))

    def meta_inputs(self, model: nn.Module, shape: tuple[int, ...]) -> MetaInputs:
        """The inputs of the model in a dry run, as meta tensors.

        Args:
            model: The model.
            shape: Shape of one image.

        Returns:
            Positional and keyword arguments.
        """
        return image_inputs(model, shape)

    def attribute_overrides(self, model: nn.Module) -> list[AttributeOverride]:
        """Attributes to set so that every attention module calls scaled dot product attention.

        Args:
            model: The model; it is not changed here.
        """
        overrides = []
        for module in model.modules():
            if getattr(module, "fused_attn", None) is False and not has_temperature(module):
                overrides.append(AttributeOverride(module, "fused_attn", True, False))
            # makes nested tensors of padded batches, for its fused layers only
            if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
                overrides.append(AttributeOverride(module, "use_nested_tensor", False, True))
        return overrides

    def image_module(self, model: nn.Module) -> nn.Module:
        """The module whose first argument is the image."""
        embed = getattr(model, "patch_embed", None)
        return embed if isinstance(embed, nn.Module) else model

    def prefix_tokens(self, call: AttentionCall) -> int:
        """Number of CLS, distillation and register tokens at the start of a call's sequence.

        If the model has no ``num_prefix_tokens``, its class tokens count if the remaining tokens
        then form a better grid.

        Args:
            call: The attention call.
        """
        count = call.nearest("num_prefix_tokens")
        if isinstance(count, int):
            return count
        most = next(filter(None, map(class_rows, reversed(call.parents))), 0)
        return min((0, most), key=lambda p: geometry.skew(call.q[-2] - p, call.aspect))

    def class_tokens(self, model: nn.Module) -> int:
        """How many prefix tokens are class tokens (CLS, distillation), which precede registers.

        If the model has no ``num_prefix_tokens``, class tokens are those that it has as attributes
        of known names. They count only as far as sequences start with prefix tokens.

        Args:
            model: The model.

        Returns:
            Their number; 0 if there are none.
        """
        return known_class_tokens(model)

    def packs_batch(self, model: nn.Module) -> bool:
        """Whether the model packs the images of a batch into one sequence (Pixtral).

        Args:
            model: The model.
        """
        return False

    def packed_input(self, model: nn.Module) -> PackedInput | None:
        """How the model takes several images of known sizes as one sequence; None if it does not.

        Args:
            model: The model.
        """
        return None

    def pooling(self, model: nn.Module) -> Pooling:
        """The part of the final token sequence that the model's head reads.

        Args:
            model: The model.

        Returns:
            ``"prefix"`` tokens only, the ``"avg"`` or ``"max"`` of the patch tokens, or
            ``"other"``: both, all tokens (no head), attention pooling, unknown.
        """
        return "other"

    def grid(self, call: AttentionCall, n: int, aspect: float) -> Grid:
        """Rows and columns of the patch tokens of one window.

        Args:
            call: The attention call.
            n: Number of patch tokens.
            aspect: Height over width of the image, in patches.
        """
        return geometry.infer_grid(n, aspect)

    def patch_size(self, model: nn.Module) -> Grid:
        """Rows and columns of pixels in a patch; non-square patches change the grid's aspect.

        Args:
            model: The model.
        """
        size = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
        return pair(size) if isinstance(size, (int, tuple, list)) else (1, 1)

    def shares_keys(self, call: AttentionCall) -> bool:
        """Whether several calls of one module must use the same keys.

        This holds for the two calls of differential attention, whose difference cancels attention
        that they have in common.

        Args:
            call: The attention call.
        """
        return call.count > 1 and call.nearest("lambda_q1") is not None

    def is_raster_order(self, call: AttentionCall) -> bool:
        """Whether patch tokens are in raster order.

        Args:
            call: The attention call.
        """
        return True

    def bias(self, call: AttentionCall) -> Literal["none", "bias", "mask"]:
        """The kind of the host's mask.

        Args:
            call: The attention call.

        Returns:
            ``"none"`` without a mask, ``"bias"`` if it only favours some keys, and ``"mask"`` if it
            may forbid keys. ``"mask"`` is always correct, but slower.
        """
        if call.mask is None:
            return "none"
        if call.mask_dtype == torch.bool:
            return "mask"
        if any(has_table(call, name) for name in QUERY_TABLES):
            return "bias"
        same_in_windows = len(call.mask) < len(call.q) or call.mask[0] == 1
        from_table = same_in_windows and any(has_table(call, name) for name in BIAS_TABLES)
        return "bias" if from_table else "mask"

    def halo(self, call: AttentionCall) -> int:
        """Number of patches by which the keys of a window extend beyond its queries on every side.

        Args:
            call: The attention call.
        """
        halo = getattr(call.module, "halo_size", 0)
        return halo if isinstance(halo, int) else 0

    def why_skip(self, call: AttentionCall) -> str | None:
        """Why a call should stay dense although it could be patched; None if it is a site.

        Args:
            call: The attention call.
        """
        if isinstance(call.module, torch.fx.GraphModule):
            return (
                "a torch.fx graph, which has no attention modules any more: patch the original "
                "model, and extract features with forward hooks or features_only=True"
            )
        if over_channels(call):
            return "attention over channels, not over tokens"
        if pools(call):
            return "a pooling head that returns one vector for the image: nothing to save"
        if call.weights == "read":
            return "the model reads its attention weights (need_weights=True)"
        unreached = why_not_reached(call.module)
        if unreached is not None:
            return unreached
        if not (call.uniform or call.parts):
            return (
                f"{call.count} calls of attention with different shapes (if these are images or "
                "windows of several sizes, pass an input= with one size to patch them)"
            )
        return None

    def sites(
        self, calls: Iterable[AttentionCall], aspect: float, named: Collection[str] = ()
    ) -> tuple[list[tuple[Site, Layout]], list[tuple[str, str]]]:
        """Divide a model's calls into sites and calls that stay dense.

        Calls with a single query stay dense unless the user named them.

        Args:
            calls: Every attention call of the model.
            aspect: Height over width of the image, in patches.
            named: Names in the user's ``sites=``.

        Returns:
            Sites with the layout of their host, and ``(name, reason)`` of every other call.
        """
        sites, skipped = [], []
        for call in calls:
            call = replace(call, aspect=aspect)
            layout = Layout.of(call.q, heads_per_call(call))
            alone = call.q[-2] == 1 and call.name not in named
            reason = SINGLE if alone else self.why_skip(call)
            if reason is None and layout is None:
                reason = f"a query of shape {tuple(call.q)}, whose number of heads is unknown"
            if reason is not None or layout is None:
                skipped.append((call.name, str(reason)))
            else:
                sites.append((self._site(call, layout, aspect), layout))
        numbered = [
            (replace(site, index=index, depth=len(sites)), layout)
            for index, (site, layout) in enumerate(sites)
        ]
        return numbered, skipped

    def _site(self, call: AttentionCall, layout: Layout, aspect: float) -> Site:
        shapes = (call.q, call.k, call.v)
        q, k, v = (layout.fold(torch.empty(shape, device="meta")).shape for shape in shapes)
        queries, key_grid = traced_structure(call, layout)
        if queries is None:
            queries, key_grid = self._inferred_structure(call, (q, k), aspect)
        if key_grid is None:
            key_grid = self.grid(call, k[2] - queries.special_count, aspect)
        return Site(
            name=call.name,
            index=0,
            depth=0,
            tokens=q[2],
            keys=k[2],
            heads=q[1],
            head_dim=q[3],
            value_dim=v[3],
            grid=queries.stacked_grid,
            key_grid=key_grid,
            prefix_tokens=queries.special_count,
            windows=q[0],
            raster=queries.raster,
            calls=call.count,
            shared=self.shares_keys(call),
            bias=self.bias(call),
            halo=self.halo(call),
            structure=queries,
            lengths=() if call.uniform or not call.parts else call.lengths,
        )

    def _inferred_structure(
        self, call: AttentionCall, shapes: tuple[torch.Size, torch.Size], aspect: float
    ) -> tuple[Structure, Grid]:
        """The structure of the tokens according to the adapter, and the grid of the keys."""
        (windows, _, tokens, _), keys = shapes[0], shapes[1][2]
        prefix = self.prefix_tokens(call) if windows == 1 < tokens else 0
        grid, key_grid = (self.grid(call, n - prefix, aspect) for n in (tokens, keys))
        raster = self.is_raster_order(call)
        # there must be one token for each position of the feature map that they come from
        confirmed = call.map is None or math.prod(call.map.size) == (tokens - prefix) * windows
        confirmed = not raster or (confirmed and geometry.skew(tokens - prefix, aspect) < 1e-6)
        known = self.name not in ("", "generic") and confirmed
        source = f"the adapter {self.name}" if known else GUESS
        return Structure(grid, prefix=prefix, raster=raster, source=source), key_grid


def backbone_of(model: nn.Module) -> Backbone:
    """The adapter for a model: the first one that fits.

    Raises:
        NothingToPatch: No adapter fits.
    """
    for backbone in REGISTRY.all("backbones").values():
        if not backbone.why_not(model):
            return backbone  # type: ignore[no-any-return]
    raise NothingToPatch(f"no backbone adapter fits {type(model).__name__}")


def backbone_named(name: str) -> Backbone:
    """The adapter with that name."""
    return REGISTRY.get("backbones", name)  # type: ignore[no-any-return]
