"""Finds the blocks of a model that process image patches, in which token strategies work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sparsiattn.attention.block import Block
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption
from sparsiattn.patching.places import unknown_places
from sparsiattn.strategies.token_base import TokenStrategy


@dataclass(frozen=True)
class TokenBlocks:
    """The blocks of a model, divided for a token strategy.

    Attributes:
        blocks: Blocks that process the image's patches, in order.
        plain: Whether one sequence runs through all of them; see `is_plain`.
        others: ``(name, reason)`` of blocks that keep every token: decoders, queries, text.
    """

    blocks: list[Block]
    plain: bool
    others: tuple[tuple[str, str], ...] = ()


def token_blocks(
    blocks: Sequence[Block],
    sites: Mapping[str, Site],
    map_module: str | None,
    tokens: TokenStrategy,
) -> TokenBlocks:
    """Divide the blocks into those that process image patches and the others.

    If patches run through blocks of several forms, only blocks in the same part of the model as
    the patch embedding count: a detector's own encoder and decoder do not.

    Args:
        blocks: All blocks of the model.
        sites: Its sites.
        map_module: Path of the convolution that makes tokens; None if there is none.
        tokens: The token strategy, for errors.

    Raises:
        InvalidOption: It is a guess which blocks process patches.
    """
    _refuse_guesses(blocks, sites, tokens)
    chosen = [block for block in blocks if _of_image(block, sites)]
    others = {b.name: _why_not(b, sites) for b in blocks if b not in chosen}
    plain = is_plain(chosen, sites)
    if not plain and map_module is not None:
        root = _common(map_module, chosen[0].name)
        outside = [block for block in chosen if not block.name.startswith(root)]
        others |= {block.name: f"it is not part of {root.rstrip('.')!r}" for block in outside}
        chosen = [block for block in chosen if block not in outside]
        plain = is_plain(chosen, sites)
    followed = [b for a, b in pairwise(blocks) if b.after and a in chosen]
    chosen = [replace(block, after=block in followed) for block in chosen]
    named = ((b.name, others[b.name]) for b in blocks if b.name in others)
    return TokenBlocks(chosen, plain, tuple(named))


def is_plain(blocks: Sequence[Block], sites: Mapping[str, Site]) -> bool:
    """Whether sequences ``[B, N, C]`` run through all blocks, with global attention.

    A batch may hold several sequences per image: its tiles, or the frames of a video.
    """
    sizes = {shape[1:] for block in blocks for shape in (block.input_shape, block.output_shape)}
    attend_alike = all(
        block.input_shape == block.output_shape
        and len(block.input_shape) == 3
        and all(is_row(block, sites[name]) for name in block.sites)
        for block in blocks
    )
    return len(sizes) == 1 and attend_alike


def is_row(block: Block, site: Site) -> bool:
    """Whether a site attends within the same sequences that its block passes on."""
    fits = block.input_shape[:-1] == (site.windows, site.tokens)
    return fits and site.tokens == site.keys


def row_sites(blocks: Sequence[Block], sites: Mapping[str, Site]) -> list[Site | None]:
    """For each block, a site whose structure describes the sequences that the block passes on.

    It is the block's first site. If a batch holds several sequences per image, that site must
    attend within each of them. A block that attends across them takes the site of another block of
    the same input shape, or None if there is none.
    """
    first = [sites[block.sites[0]] for block in blocks]
    known = {b.input_shape: site for b, site in zip(blocks, first, strict=True) if is_row(b, site)}
    return [
        site if block.input_shape[0] == 1 or is_row(block, site) else known.get(block.input_shape)
        for block, site in zip(blocks, first, strict=True)
    ]


def _of_image(block: Block, sites: Mapping[str, Site]) -> bool:
    return all(sites[name].of_image for name in block.sites)


def _refuse_guesses(
    blocks: Sequence[Block], sites: Mapping[str, Site], tokens: TokenStrategy
) -> None:
    """Refuse models in which no block is known to process patches.

    Also refuse a block whose tokens are a guess next to one that is known.
    """
    guesses = {
        block.name: sites[name]
        for block in blocks
        for name in reversed(block.sites)
        if not sites[name].of_image
    }
    if len(guesses) == len(blocks):
        raise InvalidOption(unknown_places(tokens, guesses[blocks[0].name]))
    for before, block in pairwise(blocks):
        pair = [guesses[b.name] for b in (before, block) if b.name in guesses]
        if block.after and len(pair) == 1:
            raise InvalidOption(unknown_places(tokens, pair[0]))


def _why_not(block: Block, sites: Mapping[str, Site]) -> str:
    site = next(sites[name] for name in block.sites if not sites[name].of_image)
    return f"its tokens may not be patches: {site.structure}"


def _common(map_module: str, block: str) -> str:
    """Path of the smallest module that contains both, with a trailing dot."""
    path = ""
    for a, b in zip(map_module.split("."), block.split("."), strict=False):
        if a != b:
            break
        path += f"{a}."
    return path
