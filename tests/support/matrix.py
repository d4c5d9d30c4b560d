"""The cells of the support matrix: a small model of a family, patched with every strategy and
computed by every kernel."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import sparsiattn
from sparsiattn import SparsiattnError
from tests.support import census, small

FEW_PAIRS = 200_000
# column of the matrix -> strategy, its options at a smaller budget, and at the full one
COLUMNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("dense", {}, {}),
    "topk": ("topk", {"k": 0.25}, {"k": 1.0}),
    "random": ("random", {"k": 0.25}, {"k": 1.0}),
    "local": ("local", {"k": 0.25}, {"k": 1.0}),
    "connectivity": ("connectivity", {"k": 0.25}, {"k": 1.0}),
    "token_drop": ("token_drop", {"keep": 0.5}, {"keep": 1.0}),
    "token_drop (norm)": (
        "token_drop", {"keep": 0.5, "score": "norm"}, {"keep": 1.0, "score": "norm"}
    ),
    "token_merge": ("token_merge", {"r": 4}, {"r": 0}),
    "hybrid": ("hybrid", {"k": 0.25, "keep": 0.5}, {"k": 1.0, "keep": 1.0}),
}  # fmt: skip
SUMMARISE = {"local", "connectivity", "hybrid"}  # dropped keys, by default in four cells
COMPILES = {"flex"}  # for half a minute a shape: not run here
WHATEVER = {"dense", "token_drop", "token_merge"}  # attention is the host's own by every kernel
WORKS = "works"
NOISE = 2e-6  # of equal sums in another order; some branches are damped to little more
# keys are chosen by scores, where rounding in one layer may choose others in the next
BY_SCORE = {"topk", "connectivity", "hybrid"}


@dataclass
class Subject:
    """A small model with values, what it takes, and what it gives unpatched."""

    specimen: census.Specimen
    model: nn.Module
    images: Tensor
    dense: Tensor

    def forward(self) -> Tensor:
        torch.manual_seed(4)
        with torch.no_grad():
            return census.flat(self.specimen.entry.call(self.model, self.images))

    def example(self) -> Any:
        """What `sparsiattn.patch` is told about the input: its shape, or where the model takes
        something else than an image, that."""
        inputs = self.specimen.entry.inputs
        return self.specimen.shape if inputs is None else inputs(self.images)

    def patch(self, strategy: str, options: dict[str, Any], kernel: str) -> sparsiattn.Patch:
        extra: dict[str, Any] = {"only_if_faster": False} if strategy == "hybrid" else {}
        if strategy in SUMMARISE and self.specimen.fewest_keys < census.FEW_KEYS:
            extra["background"] = None  # of a few keys, the summaries are the keys themselves
        with warnings.catch_warnings():
            # the report names a guess, and nothing here depends on it
            warnings.simplefilter("ignore", sparsiattn.GuessedStructure)
            return sparsiattn.patch(
                self.model, strategy, kernel=kernel, input=self.example(), **{**options, **extra}
            )


def subject(entry: census.Entry) -> Subject:
    """With values among which attention matters."""
    specimen = census.prepare(entry, FEW_PAIRS)
    if not any(isinstance(m, _BatchNorm) for m in specimen.model.modules()):
        return made(specimen, small.materialise(specimen.model))
    # batch norms keep nothing in bounds in a model that never trained: its library's values do
    own = made(specimen, specimen.as_made())
    return own if _attends(own) else made(specimen, small.materialise(specimen.model))


def made(specimen: census.Specimen, model: nn.Module, batch: int = 2) -> Subject:
    small.redraw_small(model)
    size = (batch, *specimen.shape[1:])
    images = torch.randn(size, generator=torch.Generator().manual_seed(2))
    subject = Subject(specimen, model, images, torch.empty(0))
    subject.dense = subject.forward()
    return subject


def _attends(subject: Subject) -> bool:
    """Whether fewer keys change the output; True as well where that cannot be tried."""
    try:
        with subject.patch("topk", {"k": 0.25}, "reference"):
            return not _same(subject.forward(), subject.dense)
    except SparsiattnError:
        return True


def kernels() -> dict[str, str]:
    """Kernels that run in the cells, ``""``, and those that do not, with the reason."""
    found = {
        name: "" if info.usable else f"refused: {'; '.join(info.reasons)}"
        for name, info in sparsiattn.list_kernels().items()
    }
    for name in COMPILES & set(found):
        found[name] = found[name] or "not run here: it compiles each shape for half a minute"
    return found


def cells(subject: Subject, column: str, names: Sequence[str]) -> dict[str, str]:
    """Outcome by kernel, ``"auto"`` first: ``"works"``, ``"refused: ..."`` with the library's own
    words, or ``"fails: ..."``, which no cell should say."""
    outcome = {"auto": _auto(subject, column)}
    if outcome["auto"] != WORKS or COLUMNS[column][0] in WHATEVER:
        return outcome
    exact, bound = None, 0.1 if COLUMNS[column][0] in BY_SCORE else 1e-4
    for name in names:
        found, out = _by_kernel(subject, column, name)
        if name == "reference":
            exact = out
        if out is not None and exact is not None and not census.relative(out, exact) <= bound:
            found = f"fails: {census.relative(out, exact):.1e} from the reference kernel"
        outcome[name] = found
    return outcome


def _auto(subject: Subject, column: str) -> str:
    try:
        return _laws(subject, column)
    except SparsiattnError as error:
        return f"refused: {error}"
    except Exception as error:
        sparsiattn.unpatch(subject.model)
        return f"fails: {type(error).__name__}: {error}"


def _laws(subject: Subject, column: str) -> str:
    strategy, budget, full = COLUMNS[column]
    exact = not sparsiattn.list_strategies()[strategy].inexact_reason
    with subject.patch(strategy, full, "auto"):
        change = census.relative(subject.forward(), subject.dense)
    if exact and not change <= 1e-5:
        return f"fails: relative error {change:.1e} at full budget"
    with subject.patch(strategy, budget, "auto"):
        out = subject.forward()
    if out.shape != subject.dense.shape or not out.isfinite().all():
        return "fails: the output has another shape, or is not finite"
    if column in SUMMARISE and _same(out, subject.dense):
        # summary keys can stand for what was dropped to the last digits
        with subject.patch(strategy, {**budget, "background": None}, "auto"):
            out = subject.forward()
    if strategy != "dense" and _same(out, subject.dense):
        return "fails: no change at a smaller budget"
    if not torch.equal(subject.forward(), subject.dense):
        return "fails: unpatched output differs"
    return WORKS


def _same(out: Tensor, dense: Tensor) -> bool:
    return out.shape == dense.shape and not census.relative(out, dense) > NOISE


def _by_kernel(subject: Subject, column: str, kernel: str) -> tuple[str, Tensor | None]:
    strategy, budget, _ = COLUMNS[column]
    try:
        with subject.patch(strategy, budget, kernel):
            return WORKS, subject.forward()
    except SparsiattnError as error:
        return f"refused: {error}", None
    except Exception as error:
        sparsiattn.unpatch(subject.model)
        return f"fails: {type(error).__name__}: {error}", None
