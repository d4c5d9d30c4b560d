"""Padded batches: each image's own tokens, read from the host's mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsiattn.attention.inputs import MASKED_BELOW
from sparsiattn.attention.layout import HostCall, Layout, causal_mask
from sparsiattn.attention.packing import PackedPart

# Forms of `Layout` in which every row of a call is one image.
BY_IMAGE = ("b h n d", "(b h) n d")


@dataclass(frozen=True, eq=False)
class OwnTokens:
    """The positions of each image's own tokens in its padded row, ascending.

    Attributes:
        places: For every image the positions of its own tokens, prefix tokens first.
        total: Length of a row, padding included.
        parts: The grid of each image, if images have sizes of their own; else empty.
    """

    places: tuple[Tensor, ...]
    total: int
    parts: tuple[PackedPart, ...] = ()

    @property
    def padded(self) -> bool:
        """Whether any image is shorter than its row."""
        return any(len(places) < self.total for places in self.places)

    def groups(self) -> list[tuple[Tensor, Tensor, PackedPart | None]]:
        """Images with equally many own tokens and the same grid.

        Returns:
            Image indices ``[G]``, positions ``[G, n]``, and the grid, if it is known.
        """
        parts = self.parts or (None,) * len(self.places)
        alike: dict[tuple[int, PackedPart | None], list[int]] = {}
        for image, (places, part) in enumerate(zip(self.places, parts, strict=True)):
            alike.setdefault((len(places), part), []).append(image)
        device = self.places[0].device
        return [
            (
                torch.tensor(images, device=device),
                torch.stack([self.places[i] for i in images]),
                part,
            )
            for (_, part), images in alike.items()
        ]


def own_tokens(mask: Tensor, batch: int, keys: int, prefix: int) -> OwnTokens:
    """Each image's own tokens: all but the keys that its mask hides from every query.

    Prefix tokens are never padding. An image whose patches are all hidden (it only fills up the
    batch) keeps every token.

    Args:
        mask: Boolean or additive, ``[B|1, H|1, Nq|1, Nk|1]``.
        batch: Number of images.
        keys: Number of keys of each image.
        prefix: Number of leading tokens that are not patches.
    """
    visible = mask if mask.dtype == torch.bool else mask > MASKED_BELOW
    visible = visible.flatten(1, 2).any(1).expand(batch, keys).clone()
    visible[:, :prefix] = True
    visible |= ~visible[:, prefix:].any(1, keepdim=True)
    # one copy for all images: one per image would synchronise with the device each time
    lists = [row.nonzero().flatten().to(mask.device) for row in visible.cpu()]
    return OwnTokens(tuple(lists), keys)


def hides_keys(mask: Tensor) -> bool:
    """Whether the mask may hide a key from all queries, judged by the first query only."""
    first = mask[:, :, 0]
    return not bool((first if first.dtype == torch.bool else first > MASKED_BELOW).all())


def without_trivial_mask(call: HostCall) -> HostCall:
    """The call without its mask, if that masks nothing; it then equals a call without a mask."""
    mask = call.mask
    if mask is None or not bool(mask.all() if mask.dtype == torch.bool else not mask.any()):
        return call
    return replace(call, mask=None)


def with_explicit_mask(call: HostCall, layout: Layout) -> HostCall:
    """The call with a 4-D mask that includes the causal mask, if there is one."""
    assert call.mask is not None
    mask = causal_mask(call.mask, call.q, call.k) if call.causal else call.mask
    return replace(call, mask=layout.fold_mask(mask, call.q), causal=False)


def part_of(call: HostCall, layout: Layout, images: Tensor, rows: Tensor, keys: Tensor) -> HostCall:
    """The same call for some of the images and some of their tokens.

    Args:
        call: A call from `with_explicit_mask`, or one without a mask.
        layout: How the host lays out operands; its form is one of `BY_IMAGE`.
        images: Indices of the images, ``[G]``.
        rows: Positions of the queries, ``[G, n]``.
        keys: Positions of the keys, ``[G, m]``.
    """
    batch = layout.fold(call.q).shape[0]

    def cut(x: Tensor, places: Tensor) -> Tensor:
        heads = x if layout.form == "b h n d" else x.unflatten(0, (batch, -1))
        part = _taken(heads[images], places, dim=2)
        return part if layout.form == "b h n d" else part.flatten(0, 1)

    mask = call.mask
    if mask is not None:
        mask = mask.expand(batch, -1, -1, call.k.shape[-2])[images]
        mask = _taken(mask if mask.shape[2] == 1 else _taken(mask, rows, dim=2), keys, dim=3)
        if layout.form != "b h n d":
            mask = mask.expand(-1, layout.heads, -1, -1).flatten(0, 1)
    q, k, v = cut(call.q, rows), cut(call.k, keys), cut(call.v, keys)
    return replace(call, q=q, k=k, v=v, mask=mask)


def _taken(x: Tensor, places: Tensor, dim: int) -> Tensor:
    """Index ``x`` ``[G, ...]`` along ``dim`` by each image's positions ``[G, n]``."""
    if places.shape[1] == x.shape[dim]:  # ascending and distinct, so all of them in order
        return x
    shape = [places.shape[0], *[1] * (x.dim() - 1)]
    shape[dim] = -1
    size = [*x.shape]
    size[dim] = places.shape[1]
    return x.gather(dim, places.view(shape).expand(size))


def others(places: Tensor, total: int) -> Tensor:
    """The positions that are missing in ``places`` ``[G, n]``: ``[G, total - n]``, ascending."""
    taken = torch.zeros(len(places), total, dtype=torch.bool, device=places.device)
    taken = taken.scatter(1, places, True)
    order = taken.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : total - places.shape[1]]


def attend_by_group(
    call: HostCall,
    layout: Layout,
    own: OwnTokens,
    sparse: Callable[[HostCall, PackedPart | None], Tensor],
    dense: Callable[[HostCall], Tensor],
) -> Tensor:
    """Attention of a padded batch; images with equally many own tokens are computed together.

    Args:
        call: A call from `with_explicit_mask`.
        layout: How the host lays out operands.
        own: Each image's own tokens.
        sparse: Computes attention among own tokens; its second argument is their grid, if images
            have sizes of their own.
        dense: Computes the rows of padding. No query attends to these tokens, but the host may
            read their rows, and gets the values of the unpatched model.

    Returns:
        The result in the host's layout.
    """
    self_attention = call.q.shape[-2] == own.total
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for images, keys, grid in own.groups():
        every = torch.arange(call.q.shape[-2], device=keys.device).expand(len(images), -1)
        rows = keys if self_attention else every
        part = without_trivial_mask(part_of(call, layout, images, rows, keys))
        parts.append((images, rows, sparse(part, grid)))
        if rows.shape[1] < every.shape[1]:
            padding = others(rows, every.shape[1])
            parts.append((images, padding, dense(part_of(call, layout, images, padding, keys))))
    return _joined(parts, layout, call)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], layout: Layout, call: HostCall) -> Tensor:
    """The rows of all parts, written to their positions, in the host's layout."""
    folded = [layout.fold(rows).transpose(1, 2) for _, _, rows in parts]
    batch, tokens = layout.fold(call.q).shape[0], call.q.shape[-2]
    out = folded[0].new_zeros(batch, tokens, *folded[0].shape[2:])
    for (images, places, _), rows in zip(parts, folded, strict=True):
        out = out.index_put((images[:, None], places), rows.to(out.dtype))
    return layout.unfold(out.transpose(1, 2), call.q)
