"""Sparse attention by hand: a dense model runs while every softmax of attention is cut down to the
keys that a rule allows.

Nothing here is the library's. A first pass of the patched model, with the kernel that calls torch's
own attention under a mask, shows which keys were kept. A second pass of the model without a patch
keeps just these in its own softmax, and asks the rule whether they are the best by scores that are
computed here, from the host's own operands and the true places of its tokens. Equal scores may fall
either way, which is why the kept keys are looked at and not chosen a second time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.softmaxes import PRODUCT, WEIGHTS, Watch, _names

FORBIDDEN = -1e30  # a mask of logits this low forbids a key
TOLERANCE = 1e-4  # of scores whose sums are taken in another order


@dataclass(frozen=True)
class Places:
    """Where the tokens of one call lie, as the test knows its host. prefix, suffix: tokens without
    a place before and after the patches; queries and keys: row and column of each patch, in units
    of the keys' grid; grid: of the keys."""

    prefix: int
    queries: Tensor
    keys: Tensor
    grid: tuple[int, int]
    suffix: int = 0

    def patches(self, x: Tensor, dim: int = -2) -> Tensor:
        """Patch rows of ``[..., N, D]``, or along another axis."""
        return x.narrow(dim, self.prefix, x.shape[dim] - self.prefix - self.suffix)


@dataclass(frozen=True)
class Operands:
    """What a rule scores keys by, ``[X, N, D]`` and ``[X, M, D]``; logits: the softmax's argument,
    biases and masks of the host included, ``[X, N, M]``."""

    q: Tensor
    k: Tensor
    scale: float
    logits: Tensor


Rule = Callable[[Operands, Places], Tensor]
"""Scores of all patch keys for each patch query, ``[X|1, n, m]``; more is better."""


def largest(call: Operands, places: Places) -> Tensor:
    """Top-k attention: the logits themselves."""
    return places.patches(places.patches(call.logits), -1)


def nearest(call: Operands, places: Places) -> Tensor:
    """A neighbourhood: Euclidean distance between patch centres."""
    return -torch.cdist(places.queries, places.keys)[None]


def connected(call: Operands, places: Places) -> Tensor:
    """Sparsifiner, section 3: softmax(Q (W_down K)^T) W_up, where W_down averages over cells of
    two by two patches and W_up interpolates between their centres."""
    rows, columns = (math.ceil(side / 2) for side in places.grid)
    at = places.keys.floor().long()
    cell = at * torch.tensor([rows, columns]) // torch.tensor(places.grid)
    down = F.one_hot(cell[:, 0] * columns + cell[:, 1], rows * columns).float()
    down = down / down.sum(0)
    corners = torch.eye(rows * columns).view(-1, 1, rows, columns)
    image = F.interpolate(corners, places.grid, mode="bilinear", align_corners=False)
    up = image[:, 0, at[:, 0], at[:, 1]]
    pooled = down.T @ places.patches(call.k)
    return (places.patches(call.q) @ pooled.mT * call.scale).softmax(-1) @ up


def faults(
    kept: Tensor, scores: Tensor, allowed: Tensor, places: Places, budget: int
) -> Iterator[str]:
    """What is wrong with the kept keys, ``[X, N, M]``, of one call."""
    prefix = places.prefix
    if not (kept | ~allowed)[:, :prefix].all():
        yield "rows of prefix tokens are not dense"
    rows, can = places.patches(kept & allowed), places.patches(allowed)
    if not rows[..., :prefix].sum(-1).eq(min(prefix, budget)).all():
        yield "columns of prefix tokens are dropped"
    special = rows.sum(-1) - places.patches(rows, -1).sum(-1)
    rows, can = places.patches(rows, -1), places.patches(can, -1)
    counts, expected = rows.sum(-1), can.sum(-1).minimum(budget - special)
    if not torch.equal(counts, expected):
        yield f"{counts.unique().tolist()} patch keys are kept, not {expected.unique().tolist()}"
    scores = scores.expand(rows.shape)
    worst = scores.masked_fill(~rows, math.inf).amin(-1)
    best = scores.masked_fill(rows | ~can, -math.inf).amax(-1)
    gap = TOLERANCE * scores.abs().amax().clamp_min(1e-6)
    if (best > worst + gap).any():
        share = float((best > worst + gap).float().mean())
        yield f"better keys are dropped in {share:.0%} of the rows"


@dataclass(frozen=True)
class Recorded:
    """One call of torch's attention."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float

    def kept(self) -> Tensor:
        """Which keys the mask lets through, ``[..., N, M]``."""
        assert self.mask is not None
        mask = self.mask if self.mask.dtype == torch.bool else self.mask > FORBIDDEN
        return mask.expand(*self.q.shape[:-1], self.k.shape[-2])


class Kept:
    """Notes what torch's own attention is called with inside the sites of a patched model."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.sites: Collection[str] = ()
        self.calls: dict[str, list[Recorded]] = defaultdict(list)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Patch the model inside: what stands in place of torch's attention before that is what
        kernels call."""
        before = F.scaled_dot_product_attention

        def noted(*args: Any, **kwargs: Any) -> Tensor:
            site = site_of(self.stack, self.sites)
            if site is not None:
                self.calls[site].append(recorded(*args, **kwargs))
            return before(*args, **kwargs)

        F.scaled_dot_product_attention = noted
        try:
            with _names(model, self.stack):
                yield
        finally:
            F.scaled_dot_product_attention = before


def site_of(stack: list[Any], sites: Collection[str]) -> str | None:
    return next((running.name for running in reversed(stack) if running.name in sites), None)


def recorded(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **_: Any,
) -> Recorded:  # fmt: skip
    """A call by the arguments of ``F.scaled_dot_product_attention``."""
    return Recorded(q, k, attn_mask, q.shape[-1] ** -0.5 if scale is None else scale)


def logits_of(call: Recorded) -> Tensor:
    """The softmax's argument by hand, ``[..., N, M]``."""
    logits = call.q @ _heads_of(call.k, call.q).mT * call.scale
    if call.mask is None:
        return logits
    if call.mask.dtype == torch.bool:
        return logits.masked_fill(~call.mask, -math.inf)
    return logits + call.mask


def flat(x: Tensor) -> Tensor:
    """``[..., N, M]`` as ``[X, N, M]``."""
    return x.reshape(-1, *x.shape[-2:])


class ByHand(Watch):
    """Runs a dense model with only the kept keys in its softmaxes, and judges these by a rule."""

    def __init__(
        self, kept: Kept, rule: Rule, places: Callable[..., Places], k: float, shared: bool = False
    ) -> None:
        super().__init__()
        self.kept, self.rule, self.places, self.k, self.shared = kept, rule, places, k, shared
        self.turn: dict[str, int] = defaultdict(int)
        self.wrong: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        site = site_of(self.stack, self.kept.sites)
        name = getattr(func, "__name__", "")
        if site is not None and name == "scaled_dot_product_attention":
            with torch._C.DisableTorchFunctionSubclass():
                return self.fused(site, *args, **(kwargs or {}))
        mark = self.mark(args[0]) if args and isinstance(args[0], Tensor) else None
        attends = name == "softmax" and mark and mark.kind in (PRODUCT, WEIGHTS)
        if site is not None and attends and self.is_used(site, args[0]):
            with torch._C.DisableTorchFunctionSubclass():
                masked = self.masked(site, args[0], None)
            masked._softmax_mark = mark  # type: ignore[attr-defined]
            args = (masked, *args[1:])
        return super().__torch_function__(func, types, args, kwargs)

    def is_used(self, site: str, logits: Tensor) -> bool:
        """Some hosts compute a softmax beside attention that nothing reads: not in its shape."""
        left = self.kept.calls[site][self.turn[site] :]
        if not left or left[0].mask is None:
            return True
        kept = left[0].kept()
        return kept.shape[-2:] == logits.shape[-2:] and kept.numel() == logits.numel()

    def fused(self, site: str, *args: Any, **kwargs: Any) -> Tensor:
        """Torch's own attention, written out."""
        call, v = recorded(*args, **kwargs), args[2]
        weights = self.masked(site, logits_of(call), call).softmax(-1)
        return weights @ _heads_of(v, call.q)

    def masked(self, site: str, logits: Tensor, call: Recorded | None) -> Tensor:
        """The logits of one call, minus infinity where a key was dropped. call: the host's own;
        its operands are those that were recorded where it wrote its product itself."""
        turn, calls = self.turn[site], self.kept.calls[site]
        self.turn[site] += 1
        budget = max(1, math.ceil(self.k * logits.shape[-1]))
        if turn >= len(calls) or calls[turn].mask is None:
            if budget < logits.shape[-1]:
                self.wrong.append(f"{site}: dense, though a budget of {budget} keys was given")
            return logits
        kept = _as_host(calls[turn].kept(), logits)
        if call is not None and self.places(site, *kept.shape[-2:]).suffix:
            order = _order(calls[turn].q, call.q)  # special tokens may be led to the front
            kept = kept[:, order][:, :, order]
        if not (self.shared and turn % 2):
            self.judge(site, kept, self.operands(calls[turn], call, logits))
        elif not torch.equal(kept, _as_host(calls[turn - 1].kept(), logits)):
            self.wrong.append(f"{site}: two calls that share their keys kept others")
        return logits.masked_fill(~kept.view(logits.shape), -math.inf)

    def operands(self, seen: Recorded, call: Recorded | None, logits: Tensor) -> Operands:
        if call is None:
            q, k = (_as_host(x, logits) for x in (seen.q, _heads_of(seen.k, seen.q)))
            return Operands(q, k, seen.scale, flat(logits))
        k = _heads_of(call.k, call.q)
        k = k.expand(*call.q.shape[:-2], *k.shape[-2:])
        return Operands(flat(call.q), flat(k), call.scale, flat(logits))

    def judge(self, site: str, kept: Tensor, call: Operands) -> None:
        places = self.places(site, *kept.shape[-2:])
        allowed = call.logits > -50.0  # hosts forbid by minus 100 as well
        budget = max(1, math.ceil(self.k * kept.shape[-1]))
        scores = self.rule(call, places)
        found = faults(kept, scores, allowed, places, budget)
        self.wrong += [f"{site}: {fault}" for fault in found]


def _order(recorded: Tensor, host: Tensor) -> Tensor:
    """Where each of the host's tokens stands in the recorded call: the row that is nearest."""
    order = torch.cdist(flat(host)[0], flat(recorded)[0]).argmin(-1)
    assert len(order.unique()) == len(order)
    return order


def _heads_of(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values that several heads share, one for each."""
    if x.dim() < 3 or x.shape[:-2] == q.shape[:-2] or x.shape[-3] == q.shape[-3]:
        return x
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)


def _as_host(x: Tensor, logits: Tensor) -> Tensor:
    """What was recorded of ``[B * W, H, N, M]`` in the order of the host's own axes, ``[X, N, M]``:
    some have heads before windows."""
    windows = {5: 2, 4: 1}.get(logits.dim())
    if (
        windows is not None
        and x.shape[:-2] != logits.shape[:-2]
        and x.shape[1] == _heads(logits, x)
    ):
        x = x.unflatten(0, (-1, logits.shape[windows])).transpose(1, 2)
    return flat(x)


def _heads(logits: Tensor, x: Tensor) -> int:
    """Heads of a host whose axes are ``[B, H, W, N, M]`` or ``[B * H, W, N, M]``."""
    if logits.dim() == 5:
        return logits.shape[1]
    return logits.shape[0] * logits.shape[1] // len(x)


@contextmanager
def running(model: nn.Module, mode: Watch) -> Iterator[None]:
    with torch.no_grad(), _names(model, mode.stack), mode:
        yield
