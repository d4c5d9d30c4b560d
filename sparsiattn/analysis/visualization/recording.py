"""`show`: run the model once on an image, and recompute its attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.analysis.visualization import token_places
from sparsiattn.analysis.visualization.photo import photo
from sparsiattn.analysis.visualization.result import BlockTokens, Point, SiteAttention
from sparsiattn.analysis.visualization.view import AttentionView
from sparsiattn.attention import AttentionInputs, Dense, Pattern, Site
from sparsiattn.errors import InvalidOption, InvalidType, ModelChanged
from sparsiattn.patching import Patch, eval_mode, patch_of
from sparsiattn.patching.site_selection import select
from sparsiattn.patching.survey import refresh
from sparsiattn.patching.warmup import unchanged
from sparsiattn.runtime import attention_rows
from sparsiattn.runtime.patch_state import unwrap
from sparsiattn.runtime.site_runtime import SiteRuntime
from sparsiattn.runtime.thread_state import BLOCK_CALL
from sparsiattn.strategies import Planner
from sparsiattn.training import Progress

MOST = 6_000_000
"""Largest number of stored attention values, 9 bytes each; queries are skipped to stay below it."""

# Default query positions of pictures, as shares of the image's height and width.
POINTS = (Point(0.36, 0.36), Point(0.5, 0.5), Point(0.7, 0.74))


@dataclass
class RecordedCall:
    """One attention call of the recorded forward pass.

    Attributes:
        runtime: The site.
        planner: Its planner.
        inputs: Its operands.
        places: Positions of its tokens in the image.
    """

    runtime: SiteRuntime
    planner: Planner
    inputs: AttentionInputs
    places: token_places.TokenPlaces

    def pattern(self) -> Pattern:
        """Plan this call again, and return the pattern."""
        n_keys = self.inputs.n_keys
        if self.runtime.stays_dense(n_keys):
            return Dense(self.inputs.n_queries, n_keys)
        return self.runtime.finish(self.planner(self.inputs), self.inputs)


class Recorder:
    """Observes one forward pass of a patched model, and stores the first call of each site."""

    def __init__(self, patch: Patch, sites: Sequence[Site]) -> None:
        self.patch = patch
        self.runtimes = {runtime.site.name: runtime for runtime in patch.runtimes}
        self.windows = {site.name: token_places.window_of(patch.model, site.name) for site in sites}
        self.calls: dict[str, RecordedCall] = {}
        self.token_states: dict[int, Any] = {}  # by block: the tokens in its attention
        self.mlp_states: dict[int, Any] = {}  # by block: the tokens in its MLP

    def __call__(self, site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        """Observer of `Patch.observing`."""
        runtime = self.runtimes[site.name]
        if runtime.block is not None and inputs.token_state is not None:
            self.token_states.setdefault(runtime.block, inputs.token_state)
        if site.name in self.windows and site.name not in self.calls:
            # computed now, while the map size stored for the window block is that of this call
            places = token_places.places_of(inputs, self.windows[site.name])
            self.calls[site.name] = RecordedCall(runtime, planner, inputs, places)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Register hooks inside the block, for map sizes and the tokens of MLPs."""
        with ExitStack() as handles:
            for window in filter(None, self.windows.values()):
                handles.enter_context(
                    window.module.register_forward_pre_hook(window.record_map, with_kwargs=True)
                )
            for runtime in self.patch.blocks:
                if runtime.placement == "bypass" and runtime.block.tail is not None:
                    entry = self.patch.model.get_submodule(runtime.block.tail.entry)
                    record = partial(self._record_mlp_tokens, runtime.index)
                    handles.enter_context(entry.register_forward_pre_hook(record))
            yield

    def _record_mlp_tokens(self, index: int, module: nn.Module, args: Any) -> None:
        self.mlp_states[index] = BLOCK_CALL.bypass_state

    def block_tokens(self) -> tuple[BlockTokens, ...]:
        """The remaining tokens after every block, from the first reduction on."""
        blocks = {runtime.index: runtime for runtime in self.patch.blocks}
        remaining = {i: state for i, state in self.mlp_states.items() if state is not None}
        if not self.mlp_states and self.patch.last_pass is not None:
            carried = self.patch.last_pass[0]
            last = getattr(carried, "states", (carried,))[0]
            # tokens after a block are those in its attention, unless it reduces after attention
            remaining = {
                i: self.token_states.get(i + 1, last)
                if blocks[i].placement in ("middle", "exit")
                else state
                for i, state in self.token_states.items()
            }
        return tuple(
            BlockTokens(
                name=blocks[i].block.name,
                index=i,
                count=state.n_original if state.ids is None else state.ids.shape[1],
                place=token_places.patch_tokens(state),
                fused=token_places.fused_tokens(state),
                mlp_only=bool(self.mlp_states),
            )
            for i, state in sorted(remaining.items())
        )


def show(
    model: nn.Module,
    image: Any,
    *,
    layers: Sequence[int | str] | int | str | None = None,
    heads: Sequence[int] | int | None = None,
    queries: Sequence[tuple[int, int]] | None = None,
    image_size: int | tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> AttentionView:
    """Record a patched model's attention in one image.

    The result has the keys that each query keeps, the share of exact attention on these keys, and
    the tokens that are dropped or merged.

    Attention is recomputed from the queries and keys of each site, so it may run fused. In the
    recorded pass attention is dense everywhere: every site gets exact inputs, and the pattern is
    applied to them afterwards. Token strategies reduce tokens as usual.

    Args:
        model: A patched model. It runs once and is not changed.
        image: A path, a PIL image, or a normalised float tensor ``[C, H, W]`` or ``[1, C, H, W]``.
            Files are resized and cropped by the model's data config.
        layers: Patched sites to show: indices (negative from the end), names or globs; None for
            all.
        heads: Indices of heads; None for all.
        queries: ``(row, column)`` of patches on the grid of the first shown site. None for all
            patches; if these need more than 6 million attention values, only every second, third,
            ... row and column.
        image_size: Image size in pixels; needed if the model has no image size.
        progress: Called with 1 and the number of sites after each site.

    Returns:
        Tensors by site; `AttentionView.save` writes ``.png``, ``.svg`` and ``.html``.

    Raises:
        InvalidOption: The model is not patched, the patch is disabled, or an option is out of
            range.
        DataError: The image cannot be read, or does not fit the model.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> patch = sparsiattn.patch(model, "topk", k=0.25)
    >>> view = sparsiattn.show(model, tiny_images(1))
    >>> site = view["blocks.1.attn"]
    >>> site.exact.shape, site.grid, site.keys_kept(4, 2).shape  # of head 2: keys by patch
    (torch.Size([3, 65, 65]), (8, 8), torch.Size([3, 8, 8]))
    >>> bool((site.mass > site.density).all())  # better than chance
    True
    """
    patch = _active_patch(model)
    sites = _sites(layers, [runtime.site for runtime in patch.runtimes])
    tensor, pixels = photo(patch, image, image_size)
    recorder = Recorder(patch, sites)
    with torch.no_grad(), eval_mode(patch.model), unchanged(patch):
        with recorder.hooks(), patch.observing(recorder):
            patch.model(tensor)
        tokens = recorder.block_tokens()
    calls = [recorder.calls[site.name] for site in sites if site.name in recorder.calls]
    if not calls:
        raise InvalidOption(
            f"none of {[site.name for site in sites]} was recorded: show() cannot run inside "
            "Patch.disabled(), so leave that block first"
        )
    points = _points(queries, calls)
    step = 1 if queries is not None else _step(calls, heads)
    shown = []
    for call in calls:
        tokens_kept = _query_tokens(call, None if queries is None else points, step)
        shown.append(_site_attention(call, _heads(heads, call), tokens_kept))
        if progress is not None:
            progress(1, len(calls))
    return AttentionView(
        model=type(patch.model).__name__,
        strategy=patch.strategy.to_dict(),
        pixels=pixels,
        sites=tuple(shown),
        tokens=tokens,
        points=points,
        step=step,
    )


def _active_patch(model: nn.Module) -> Patch:
    patch = patch_of(model)
    if patch is None:
        raise InvalidOption(
            f"show() needs a patched model, but this {type(unwrap(model)).__name__} is not "
            "patched: call sparsiattn.patch(model, ...) first (strategy 'dense' shows plain "
            "attention)"
        )
    if not patch.runtimes:
        raise ModelChanged("show() found no patched site: unpatch() and patch the model again")
    patch.ensure_active("show")
    refresh(patch)
    return patch


def _sites(layers: Any, sites: list[Site]) -> list[Site]:
    if layers is None:
        return sites
    layers = [layers] if isinstance(layers, (int, str)) else layers
    names = {site.name for layer in layers for site in _matching(layer, sites)}
    return [site for site in sites if site.name in names]


def _matching(layer: object, sites: list[Site]) -> list[Site]:
    """The sites that match one index, name or glob."""
    if isinstance(layer, str):
        return select(sites, layer)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise InvalidType(f"layers must be indices or names of sites, got {layer!r}")
    if not -len(sites) <= layer < len(sites):
        raise InvalidOption(
            f"layers must be indices below {len(sites)}, the number of patched sites, got {layer}"
        )
    return [sites[layer]]


def _points(queries: Any, calls: Sequence[RecordedCall]) -> tuple[Point, ...]:
    """Query positions of pictures, as shares of the image's height and width."""
    if queries is None:
        return POINTS
    grid = next((call.places.grid for call in calls if call.places.grid is not None), None)
    if grid is None:
        raise InvalidOption(
            "queries= needs a site whose tokens have known positions in the image: leave it out"
        )
    points = []
    for query in queries:
        if not isinstance(query, (tuple, list)) or len(query) != 2:
            raise InvalidType(f"queries must be (row, column) of patches, got {query!r}")
        row, column = query
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise InvalidOption(f"query {(row, column)} is not on the grid {grid[0]} x {grid[1]}")
        points.append(Point((row + 0.5) / grid[0], (column + 0.5) / grid[1]))
    if not points:
        raise InvalidOption("queries is empty: pass at least one (row, column), or None for all")
    return tuple(points)


def _step(calls: Sequence[RecordedCall], heads: Any) -> int:
    """Distance of queries in rows and columns, so that at most `MOST` values are stored."""
    values = sum(
        len(_heads(heads, call)) * call.places.place.numel() * call.inputs.n_keys
        for call in calls
        if call.places.place is not None
    )
    return max(1, math.ceil(math.sqrt(values / MOST)))


def _heads(heads: Any, call: RecordedCall) -> list[int]:
    count = call.inputs.q.shape[1]
    if heads is None:
        return list(range(count))
    indices = [heads] if isinstance(heads, int) else list(heads)
    wrong = [head for head in indices if type(head) is not int or not 0 <= head < count]
    if wrong or not indices:
        raise InvalidOption(f"heads must be indices in 0..{count - 1}, got {heads!r}")
    return sorted(set(indices))


def _query_tokens(call: RecordedCall, points: Sequence[Point] | None, step: int) -> Tensor:
    """Query tokens whose attention is stored, ``[Q]``: prefix tokens, then patch tokens."""
    prefix, place = torch.arange(call.inputs.prefix), call.places.place
    if place is None:
        return prefix
    if points is None:
        patches = place[step // 2 :: step, step // 2 :: step].flatten()
    else:
        patches = torch.stack([place[point.on(place.shape)] for point in points])
    return torch.cat([prefix, patches[patches >= 0].unique()])


@torch.no_grad()
def _site_attention(call: RecordedCall, heads: list[int], queries: Tensor) -> SiteAttention:
    """Attention of some queries of a call, and means over all patch queries."""
    # planned here and not while recording, so that only one site's pattern is in memory
    inputs, pattern = attention_rows.in_float32(call.inputs), call.pattern()
    n, windows = inputs.n_queries, inputs.q.shape[0]
    window, row = queries // n, queries % n
    exact, weights = torch.zeros(2, len(heads), len(queries), inputs.n_keys)
    kept, background = torch.zeros_like(exact, dtype=torch.bool), torch.zeros(exact.shape[:2])
    sums = torch.zeros(3, len(heads))
    for rows in attention_rows.chunks(inputs):
        first = int(rows[0])
        part = attention_rows.compute(inputs, pattern, rows)
        sums += part.sums(max(0, inputs.prefix - first))[:, heads]
        in_chunk = (row >= first) & (row < first + len(rows))
        parts = (part.exact, part.pattern, part.kept, part.background)
        for out, values in zip((exact, weights, kept, background), parts, strict=True):
            chosen = values.cpu()[window[in_chunk], :, row[in_chunk] - first]
            out[:, in_chunk] = chosen.transpose(0, 1)[heads]
    return SiteAttention(
        name=inputs.site.name,
        index=inputs.site.index,
        heads=tuple(heads),
        tokens=n,
        keys=inputs.n_keys,
        windows=windows,
        prefix=inputs.prefix,
        block=call.runtime.block,
        queries=queries,
        exact=exact,
        kept=kept,
        pattern=weights,
        background=background,
        mass=sums[0] / max(1, windows * (n - inputs.prefix)),
        density=sums[1] / sums[2].clamp_min(1.0),
        dense=isinstance(pattern, Dense),
        **vars(call.places),
    )
