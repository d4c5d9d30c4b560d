"""Is what a patched model answers right? Held against the dense model, the reference kernel, and
the same images in other company."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

import sparsiattn
from reliability.calls import checked
from reliability.drawn import Case, Given
from reliability.hosts import build, hooks_on
from reliability.images import finite_images, make
from reliability.outcomes import Tally, Wrong
from sparsiattn import SparsiattnError
from sparsiattn.patching import Patch
from sparsiattn.registry import REGISTRY

TOLERANCE = {"fp64": 1e-9, "fp32": 2e-4, "bf16": 0.1, "fp16": 0.02}
"""Of a whole model, relative to its largest output."""


def run(case: Case, tally: Tally) -> None:
    """Patch, judge every input, undo."""
    model, about = build(case.host, case.dtype), (case.strategy, case.dtype, case.kernel)
    try:
        live = patched(model, case)
    except Exception as error:
        refused = error
        tally.run(lambda _: untouched(model, tally.documented(refused)), case, *about)
        return
    for given in case.inputs:
        tally.run(lambda one: judge(live, case, one, tally), given, *about)
        if tally.wrong and tally.wrong[-1].startswith("Given"):
            tally.wrong[-1] = f"{case!r}\n{tally.wrong[-1]}"
    live.unpatch()
    try:
        untouched(model, "")
    except Wrong as error:
        tally.wrong.append(f"{case!r}\n{error}")


def patched(model: nn.Module, case: Case) -> Patch:
    return sparsiattn.patch(
        model, case.strategy, sites=case.sites, kernel=case.kernel, only_if_faster=False,
        **dict(case.options),
    )  # fmt: skip


def untouched(model: nn.Module, outcome: str) -> str:
    if hooks_on(model) or sparsiattn.patch_of(model) is not None:
        raise Wrong("something of the patch is left on the model")
    if any(".sparsiattn." in name for name in model.state_dict()):
        raise Wrong("planners are left in the model")
    return outcome


def judge(live: Patch, case: Case, given: Given, tally: Tally) -> str:
    """The outcome for one input; raises where it is wrong."""
    x = make(given, case.host, case.dtype)
    with torch.no_grad(), live.disabled():
        dense = attempt(live.model, x, given.features)
    with torch.no_grad(), checked():
        out = attempt(live.model, x, given.features)
    if isinstance(dense, Exception):
        return _as_dense(dense, out, tally)
    if isinstance(out, Exception):
        return tally.documented(out)
    if out.dtype != dense.dtype or (out.shape != dense.shape and not _short(live, given)):
        raise Wrong(f"{tuple(out.shape)} {out.dtype}, dense {tuple(dense.shape)} {dense.dtype}")
    clean = finite_images(x)
    alone = clean & (dense.isfinite().flatten(1).all(1))
    if not bool(out[alone].isfinite().all()):
        raise Wrong("an image without NaN gets NaN or infinity, where the dense model has none")
    if is_full(case) and bool(alone.any()):
        close(out[alone], dense[alone], case.dtype, "the dense model at full budget")
        return "dense model's answer at full budget"
    with torch.no_grad():
        return company(live, case, given, x, out)


def attempt(model: Any, x: Tensor, features: bool) -> Tensor | Exception:
    try:
        out: Tensor = model.forward_features(x) if features else model(x)
    except Wrong:
        raise
    except Exception as error:
        return error
    return out


def _as_dense(dense: Exception, out: Tensor | Exception, tally: Tally) -> str:
    if not isinstance(out, Exception):
        raise Wrong(f"an answer where the dense model raises {type(dense).__name__}: {dense}")
    if isinstance(out, SparsiattnError):
        return tally.documented(out)
    if type(out) is not type(dense):
        raise Wrong(f"{type(out).__name__}: {out}; the dense model {type(dense).__name__}: {dense}")
    return "the dense model's error"


def _short(live: Patch, given: Given) -> bool:
    """Whether features may be fewer: only where the patch was told never to put tokens back."""
    return given.features and live.tokens is not None and live.tokens.restore is None


def is_full(case: Case) -> bool:
    """Whether every budget of the case keeps all, so that the dense model is the right answer."""
    given, kind = dict(case.options), REGISTRY.get("strategies", case.strategy)
    if not kind.exact_at_full or case.strategy == "hybrid":
        return case.strategy == "hybrid" and _full_hybrid(given)
    if case.strategy == "token_merge":
        return given["r"] == 0 and given.get("ratio") is None
    if case.strategy == "dense":
        return True
    name = {"attention": "k", "tokens": "keep"}[kind.kind]
    return type(given.get(name)) is float and given[name] == 1.0 and name in kind.option_names()


def _full_hybrid(given: dict[str, Any]) -> bool:
    plain = given.get("tokens", "token_drop") == "token_drop"
    return plain and given["k"] == given["keep"] == 1.0 and float in (type(given["k"]),)


def company(live: Patch, case: Case, given: Given, x: Tensor, out: Tensor) -> str:
    """One clean image must get the same answer alone, and beside images that are all finite."""
    clean = finite_images(x)
    if not bool(clean.any()):
        return "right: nothing finite to answer" if len(x) else "right: an empty batch"
    i = int(clean.nonzero()[given.seed % int(clean.sum())])
    others = torch.where(clean[:, None, None, None], x, 0.0)
    for what, one in (("alone", x[i : i + 1]), ("among finite images", others)):
        again = attempt(live.model, one, given.features)
        if isinstance(again, Exception):
            raise Wrong(f"{what}, an image raises {again!r}")
        row = again[:1] if what == "alone" else again[i : i + 1]
        if not _near(out[i : i + 1], row, case.dtype):
            if case.dtype != "fp64" and _tied(case, given, i):
                return "right but for a choice between keys or tokens within rounding"
            close(out[i : i + 1], row, case.dtype, f"itself {what}")
    return f"right: {given.special if given.special != 'none' else 'plain'} input"


def _tied(case: Case, given: Given, i: int) -> bool:
    """Whether the same case agrees in double precision: then rounding tipped a choice."""
    model = build(case.host, "fp64")
    x = make(given, case.host, case.dtype).double()
    with patched(model, case) as live:
        out = live.model(x[finite_images(x)])
        for j, row in enumerate(out):
            close(row[None], live.model(x[finite_images(x)][j : j + 1]), "fp64", "itself alone")
    return True


def _near(a: Tensor, b: Tensor, dtype: str) -> bool:
    with suppress(Wrong):
        close(a, b, dtype, "")
        return True
    return False


def close(a: Tensor, b: Tensor, dtype: str, what: str) -> None:
    """Equal within the dtype's tolerance; where both are not finite, equally so."""
    if a.shape != b.shape:
        raise Wrong(f"{tuple(a.shape)}, {what} has {tuple(b.shape)}")
    both = a.isfinite() & b.isfinite()
    if not bool((a.isfinite() == b.isfinite()).all()):
        raise Wrong(f"NaN or infinity, unlike {what}")
    if bool(both.any()):
        off = (a[both].double() - b[both].double()).abs().max()
        size = b[both].abs().max().double().clamp_min(1.0)
        if off > TOLERANCE[dtype] * size:
            raise Wrong(f"off by {off:.2e} of {size:.2e} from {what}")
