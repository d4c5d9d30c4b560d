"""`show`: run the model once on a photo and compute anew what its attention did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.analysis.visualization import attention_rows as attention
from sparsiattn.analysis.visualization.photo import photo
from sparsiattn.analysis.visualization.result import AttentionView, BlockTokens, Point, SiteShown
from sparsiattn.analysis.visualization.token_places import (
    TokenPlaces,
    Window,
    fused_tokens,
    placing,
    stream_place,
    window_of,
)
from sparsiattn.attention.patterns import Dense
from sparsiattn.attention.site import AttentionInputs, Site
from sparsiattn.errors import InvalidOption, InvalidType, ModelChanged, unknown
from sparsiattn.patching.model_call import eval_mode
from sparsiattn.runtime.handle import Patch, patch_of, unwrap
from sparsiattn.runtime.sdpa_intercept import THREAD
from sparsiattn.strategies.base import Planner
from sparsiattn.training.progress import Progress

MOST = 6_000_000
"""Attention values kept per picture, 9 bytes each; where all queries need more, fewer are taken."""

# Patches that pictures show where none are asked for, as shares of the image's height and width.
POINTS = ((0.36, 0.36), (0.5, 0.5), (0.7, 0.74))


class Call:
    """What one attention call of the run handed over."""

    def __init__(self, inputs: AttentionInputs, planner: Planner, window: Window | None) -> None:
        self.inputs, self.planner = inputs, planner
        self.place = placing(inputs, window)


class Recorder:
    """Observes one forward pass of a patched model; only the first call of each site counts."""

    def __init__(self, patch: Patch, wanted: Sequence[Site]) -> None:
        self.patch, self.wanted = patch, {site.name for site in wanted}
        self.calls: dict[str, Call] = {}
        self.streams: dict[int, Any] = {}  # by block: what its attention sees
        self.spared: dict[int, Any] = {}  # by block: which tokens its MLP takes
        self.windows = {site.name: window_of(patch.model, site.name) for site in wanted}
        self.blocks = {r.site.name: r.block for r in patch.runtimes if r.block is not None}

    def __call__(self, site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        block = self.blocks.get(site.name)
        if block is not None and inputs.token_state is not None:
            self.streams.setdefault(block, inputs.token_state)
        if site.name in self.wanted and site.name not in self.calls:
            self.calls[site.name] = Call(inputs, planner, self.windows[site.name])

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks for what no attention call tells; gone when the block is left."""
        hooks = []
        for window in filter(None, self.windows.values()):
            hooks.append(window.module.register_forward_pre_hook(window.note, with_kwargs=True))
        for runtime in self.patch.blocks:
            if runtime.place == "bypass" and runtime.block.tail is not None:
                entry = self.patch.model.get_submodule(runtime.block.tail.entry)
                hooks.append(entry.register_forward_pre_hook(self._note_spared(runtime.index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_spared(self, index: int) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, args: Any) -> None:
            self.spared[index] = THREAD.spared

        return note


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
    """What a patched model attends to in one image: which keys each query keeps, how much of exact
    attention that is, and which tokens are dropped or merged.

    model: a patched model; it runs once and is left as it was. image: a path, a PIL image, or a
    normalised float tensor ``[C, H, W]`` or ``[1, C, H, W]``; files are resized and cropped as the
    model's data config says. layers: indices among the patched sites (from 0, negative from the
    end), names or globs of them; all if None. heads: indices; all if None. queries: ``(row,
    column)`` of patches, counted on the grid of the first site shown; if None all of them, or,
    where that would be more than 6 million attention values, every second, third ... of each row
    and column. image_size: pixels, where the model does not say. progress: called with 1 and the
    number of sites after each site.

    Attention is computed anew from the queries and keys that reach each site, so it may run fused.
    In that run attention is dense everywhere: every site is shown on exact inputs, and what is
    shown is what the pattern would do to them. Token strategies reduce as they always do.

    Returns a `AttentionView`: tensors by site, `AttentionView.save` for ``.png``, ``.svg`` and ``.html``. Raises
    `InvalidOption` for a model that is not patched.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> patch = sparsiattn.patch(model, "topk", k=0.25)
    >>> shown = sparsiattn.show(model, tiny_images(1))
    >>> site = shown["blocks.1.attn"]
    >>> site.exact.shape, site.grid, site.keys_kept(4, 2).shape  # of head 2: keys by patch
    (torch.Size([3, 65, 65]), (8, 8), torch.Size([3, 8, 8]))
    >>> bool((site.mass > site.density).all())  # better than chance
    True
    """
    patch = _live(model)
    wanted = _layers(layers, patch)
    tensor, look = photo(patch, image, image_size)
    recorder = Recorder(patch, wanted)
    with torch.no_grad(), _untouched(patch), recorder.listening(), patch.observing(recorder):
        patch.model(tensor)
        tokens = _tokens(recorder)
    calls = {site: recorder.calls[site.name] for site in wanted if site.name in recorder.calls}
    if not calls:
        raise InvalidOption(
            f"none of {[site.name for site in wanted]} was observed on this image: show() cannot "
            "run inside Patch.disabled()"
        )
    points = _points(queries, calls)
    step = 1 if queries is not None else _step(calls, heads)
    sites, count = [], len(calls)
    with torch.no_grad():
        for site in list(calls):
            sites.append(_shown(patch, site, calls.pop(site), heads, points, queries, step))
            if progress is not None:
                progress(1, count)
    return AttentionView(
        model=type(patch.model).__name__, strategy=patch.strategy.to_dict(), pixels=look,
        sites=tuple(sites), tokens=tokens, points=points, step=step,
    )  # fmt: skip


def _live(model: nn.Module) -> Patch:
    patch = patch_of(model)
    if patch is None:
        raise InvalidOption(
            f"show() needs a patched model, and this {type(unwrap(model)).__name__} has no patch: "
            "call sparsiattn.patch(model, ...) first ('dense' shows plain attention)"
        )
    if not patch.runtimes:
        raise ModelChanged("show() found no patched site: unpatch() and patch the model again")
    patch._require_active("show")
    return patch


def _layers(layers: Any, patch: Patch) -> list[Site]:
    sites = [runtime.site for runtime in patch.runtimes]
    if layers is None:
        return sites
    wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
    found = {name for one in wanted for name in _matching(one, [site.name for site in sites])}
    return [site for site in sites if site.name in found]


def _matching(one: object, names: list[str]) -> list[str]:
    if isinstance(one, int) and not isinstance(one, bool):
        if not -len(names) <= one < len(names):
            raise InvalidOption(f"layers has {one}, but {len(names)} sites are patched")
        return [names[one]]
    if not isinstance(one, str):
        raise InvalidType(f"layers must hold indices or names of sites, got {one!r}")
    found = [name for name in names if fnmatchcase(name, one)]
    if not found:
        raise unknown("site", one, names)
    return found


@contextmanager
def _untouched(patch: Patch) -> Iterator[None]:
    """The model in eval mode; its modes, and the patch's record of the last forward pass, as they
    were before."""
    image, carried, seen = patch.image, patch.carried, THREAD.image
    try:
        with eval_mode(patch.model):
            yield
    finally:
        patch.image, patch.carried, THREAD.image = image, carried, seen


def _points(queries: Any, calls: dict[Site, Call]) -> tuple[Point, ...]:
    """Where in the image pictures look, as shares of its height and width."""
    if queries is None:
        return tuple(Point(*at) for at in POINTS)
    places = (call.place.queries for call in calls.values())
    grid = next((tuple(place.shape) for place in places if place is not None), None)
    if grid is None:
        raise InvalidOption("queries= needs a site whose tokens have a known place in the image")
    points = []
    for query in queries:
        if not isinstance(query, (tuple, list)) or len(query) != 2:
            raise InvalidType(f"queries must be (row, column) of patches, got {query!r}")
        row, column = query
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise InvalidOption(f"query {(row, column)} is not on the grid {grid[0]} x {grid[1]}")
        points.append(Point((row + 0.5) / grid[0], (column + 0.5) / grid[1]))
    if not points:
        raise InvalidOption("queries is empty: give at least one (row, column), or None for all")
    return tuple(points)


def _step(calls: dict[Site, Call], heads: Any) -> int:
    """Every how many patches of a row and of a column there is a query, so that it is not too
    much."""
    total = 0
    for call in calls.values():
        if call.place.queries is not None:
            count = len(_heads(heads, call.inputs.q.shape[1]))
            total += count * call.place.queries.numel() * call.inputs.n_keys
    return max(1, math.ceil(math.sqrt(total / MOST)))


def _heads(heads: Any, count: int) -> list[int]:
    if heads is None:
        return list(range(count))
    wanted = [heads] if isinstance(heads, int) else list(heads)
    bad = [head for head in wanted if type(head) is not int or not 0 <= head < count]
    if bad or not wanted:
        raise InvalidOption(f"heads must be indices in 0..{count - 1}, got {heads!r}")
    return sorted(set(wanted))


def _sample(call: Call, points: Sequence[Point], explicit: bool, step: int) -> Tensor:
    """Numbers of the query tokens whose attention is kept, ``[Q]``: prefix tokens first."""
    prefix = torch.arange(call.inputs.prefix)
    place = call.place.queries
    if place is None:
        return prefix
    if explicit:
        patches = torch.stack([place[point.on(place.shape)] for point in points])
    else:
        patches = place[step // 2 :: step, step // 2 :: step].flatten()
    return torch.cat([prefix, patches[patches >= 0].unique()])


def _shown(
    patch: Patch, site: Site, call: Call, heads: Any, points: Sequence[Point], queries: Any,
    step: int,
) -> SiteShown:  # fmt: skip
    """One site: its pattern is planned here, so that no two sites' are in memory together."""
    inputs = call.inputs
    runtime = next(r for r in patch.runtimes if r.site is site)
    pattern = Dense(inputs.n_queries, inputs.n_keys) if runtime.idle(inputs.n_keys) else None
    finished = pattern or runtime.finish(call.planner(inputs), inputs)
    bias = inputs.bias
    if bias is not None and bias.is_floating_point():
        bias = bias.float()
    full = inputs.replace(q=inputs.q.float(), k=inputs.k.float(), bias=bias)
    chosen = _heads(heads, inputs.q.shape[1])
    sample = _sample(call, points, queries is not None, step)
    return _summed(full, finished, sample, chosen, call.place, runtime.block)


def _summed(
    inputs: AttentionInputs, pattern: Any, sample: Tensor, heads: list[int], place: TokenPlaces,
    block: int | None,
) -> SiteShown:  # fmt: skip
    """Attention of the sampled queries, means over all patch queries, a few rows at a time."""
    n, pick = inputs.n_queries, torch.tensor(heads)
    window, row = sample // n, sample % n
    shape = (len(heads), len(sample))
    kept = torch.zeros(*shape, inputs.n_keys, dtype=torch.bool)
    exact, weights = torch.zeros(*shape, inputs.n_keys), torch.zeros(*shape, inputs.n_keys)
    background = torch.zeros(shape)
    totals = torch.zeros(3, len(heads))
    for rows in attention.chunks(inputs):
        part = attention.compute(inputs, pattern, rows)
        totals += _totals(part, inputs, rows)[:, pick]
        here = (row >= rows[0].item()) & (row <= rows[-1].item())
        at = (window[here], row[here] - rows[0].item())
        for out, values in ((exact, part.exact), (kept, part.kept), (weights, part.pattern)):
            out[:, here] = values.cpu()[at[0], :, at[1]].transpose(0, 1)[pick]
        background[:, here] = part.background.cpu()[at[0], :, at[1]].T[pick]
    count = max(1, inputs.q.shape[0] * (n - inputs.prefix))
    return SiteShown(
        name=inputs.site.name, index=inputs.site.index, heads=tuple(heads), tokens=n,
        keys=inputs.n_keys, windows=inputs.q.shape[0], prefix=inputs.prefix, block=block,
        place=place.queries, key_place=place.keys, why=place.why, queries=sample, exact=exact,
        kept=kept, pattern=weights, background=background, mass=totals[0] / count,
        density=totals[1] / totals[2].clamp_min(1.0), dense=isinstance(pattern, Dense),
        fused=place.fused,
    )  # fmt: skip


def _totals(part: attention.Rows, inputs: AttentionInputs, rows: Tensor) -> Tensor:
    """``[3, H]`` over the patch queries of a chunk: kept mass, pairs kept, pairs that the host
    allows."""
    real = rows >= inputs.prefix
    allowed = inputs.allowed()
    pairs = torch.full_like(part.mass, float(inputs.n_keys))
    if allowed is not None:
        allowed = allowed if allowed.shape[-2] == 1 else allowed.index_select(-2, rows)
        allowed = allowed.expand(*allowed.shape[:-1], inputs.n_keys)
        pairs = allowed.sum(-1).expand(part.mass.shape).float()
    values = (part.mass, part.kept.sum(-1).float(), pairs)
    return torch.stack([value[..., real].sum((0, 2)).cpu() for value in values])


def _tokens(recorder: Recorder) -> tuple[BlockTokens, ...]:
    """What every block from the first reduction on leaves of the tokens."""
    blocks = {runtime.index: runtime.block.name for runtime in recorder.patch.blocks}
    if recorder.spared:
        streams = {i: s for i, s in recorder.spared.items() if s is not None}
        return tuple(_block(blocks[i], i, token_state, True) for i, token_state in sorted(streams.items()))
    carried = recorder.patch.carried
    if carried is None or not recorder.streams:
        return ()
    last = getattr(carried[0], "streams", (carried[0],))[0]
    places = {runtime.index: runtime.place for runtime in recorder.patch.blocks}
    seen, found = recorder.streams, []
    for index in sorted(seen):
        # what attention sees is what a block leaves, unless it reduces after its attention
        leaves = seen.get(index + 1, last) if places[index] in ("middle", "exit") else seen[index]
        found.append(_block(blocks[index], index, leaves, False))
    return tuple(found)


def _block(name: str, index: int, token_state: Any, bypass: bool) -> BlockTokens:
    place = stream_place(token_state)
    count = token_state.whole if token_state.ids is None else token_state.ids.shape[1]
    return BlockTokens(name, index, count, place, fused_tokens(token_state), bypass)
