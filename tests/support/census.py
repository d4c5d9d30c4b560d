"""Every model by name: does it compute softmax attention between tokens, does it patch, and do the
laws hold there? ``python benchmarks/support.py`` runs it and keeps the rows."""

from __future__ import annotations

import copy
import gc
import json
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import AttentionInputs, NothingToPatch, Pattern, SparsiattnError, Strategy
from sparsiattn.patching.discovery.meta_model import meta_copy
from sparsiattn.registry import REGISTRY
from tests.support import small
from tests.support.softmaxes import NOT_TOKENS, Found, attention_of

MOST_PAIRS = 2_500_000  # elements of an attention matrix beyond which the image is made smaller
FEW_KEYS = 16  # in smaller windows than these, summaries of dropped keys are the keys themselves
SIZES = (64, 112, 128, 192, 224, 256, 384, 448, 512)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Everything(Strategy):
    """All keys, but as a pattern: computed by this library's kernels, from its own view of the
    host's operands, where ``k=1`` would let the host's attention run."""

    name = "everything"

    def plan(self, inputs: AttentionInputs) -> Pattern:
        size = (1, 1, inputs.n_queries, inputs.n_keys)
        return Pattern.mask(torch.ones(size, dtype=torch.bool, device=inputs.q.device))


@dataclass(frozen=True)
class Entry:
    """A model to examine: ``make(**options)`` builds it without downloads, and takes ``img_size``
    where ``resizes``. shape: of one image, None where the model says it. inputs: what the model
    takes instead of an image, made of one."""

    name: str
    family: str
    make: Callable[..., nn.Module]
    shape: Shape | None = None
    resizes: bool = False
    inputs: Callable[[Tensor], dict[str, Any]] | None = None

    def call(self, model: nn.Module, image: Tensor) -> Any:
        """The model's output for one image, however the model wants it."""
        return model(image) if self.inputs is None else model(**self.inputs(image))


def timm_entries() -> Iterator[Entry]:
    import timm

    for name in timm.list_models():
        family = timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
        yield Entry(name, family, lambda name=name, **o: timm.create_model(name, **o), None, True)


def torchvision_entries() -> Iterator[Entry]:
    from torchvision import models

    for module, shape in ((models, (1, 3, 224, 224)), (models.video, (1, 3, 16, 224, 224))):
        for name in models.list_models(module=module):
            family = models.get_model_builder(name).__module__.split("models.", 1)[-1]
            yield Entry(name, family, lambda name=name: models.get_model(name), shape)


def transformers_entries() -> Iterator[Entry]:
    from tests.support import hosts_transformers

    for name, make, shape in hosts_transformers.entries():
        yield Entry(name, name, make, shape, inputs=hosts_transformers.INPUTS.get(name))


LISTS: dict[str, Callable[[], Iterator[Entry]]] = {
    "timm": timm_entries,
    "torchvision": torchvision_entries,
    "transformers": transformers_entries,
}


def shape_of(model: nn.Module, entry: Entry) -> Shape:
    if entry.shape is not None:
        return entry.shape
    card = getattr(model, "pretrained_cfg", None) or {}
    return (1, *card.get("input_size", (3, 224, 224)))


@dataclass
class Specimen:
    """A model without data in its parameters, and what a run of it showed."""

    entry: Entry
    make: Callable[[], nn.Module]
    model: nn.Module
    shape: Shape
    found: list[Found]
    shortened: bool = False

    def as_made(self) -> nn.Module:
        """The same model with the values its own library draws."""
        model = self.make().eval()
        if self.shortened:
            small.shorten(model)
        return model

    @property
    def fewest_keys(self) -> int:
        return min((f.keys for f in self.found if f.keys and f.between_tokens), default=0)

    @property
    def pairs(self) -> int:
        return max((f.pairs or 0 for f in self.found), default=0)


def look(entry: Entry, model: nn.Module, shape: Shape) -> list[Found]:
    """The attention calls of a model for one image: without data, or where the model reads values
    of its tensors, with some."""
    meta_model = meta_copy(model)
    image = torch.empty(shape, device="meta")
    try:
        return attention_of(meta_model, lambda: entry.call(meta_model, image))
    except Exception:
        with suppress(Exception), torch.device("meta"):  # makes tensors on the default device
            return attention_of(meta_model, lambda: entry.call(meta_model, image))
    real = small.materialise(copy.deepcopy(model))
    return attention_of(real, lambda: entry.call(real, torch.randn(shape)))


def prepare(entry: Entry, most_pairs: int = MOST_PAIRS) -> Specimen:
    """The model with runs of equal blocks cut and a small image, as far as it still runs."""
    model = small.build_light(entry.make)
    shape = shape_of(model, entry)
    specimen = _shortened(entry, entry.make, model, shape)
    if specimen.pairs <= most_pairs:
        return specimen
    for side in SIZES:
        if side >= max(shape[-2:]):
            break
        with suppress(Exception):
            smaller = _resized(entry, specimen, side)
            fits = smaller.fewest_keys >= min(FEW_KEYS, specimen.fewest_keys)
            fits = fits and 0 < smaller.pairs <= most_pairs and _alike(smaller, specimen)
            if fits and _runs(smaller):
                return smaller
    return specimen


def _runs(specimen: Specimen) -> bool:
    """With data, which is where indices are checked: raises otherwise."""
    model = small.materialise(copy.deepcopy(specimen.model))
    with torch.no_grad():
        specimen.entry.call(model, torch.zeros(specimen.shape))
    return True


def _alike(one: Specimen, other: Specimen) -> bool:
    def kinds(specimen: Specimen) -> Counter[tuple[str, str]]:
        return Counter((f.owner, f.kind) for f in specimen.found)

    return kinds(one) == kinds(other)


def _resized(entry: Entry, specimen: Specimen, side: int) -> Specimen:
    shape = (*specimen.shape[:-2], side, side)
    if entry.resizes:
        with suppress(TypeError):  # an architecture without the option takes images of any size
            make = partial(entry.make, img_size=side)
            return _shortened(entry, make, small.build_light(make), shape)
    return replace(specimen, shape=shape, found=look(entry, specimen.model, shape))


def _shortened(
    entry: Entry, make: Callable[[], nn.Module], model: nn.Module, shape: Shape
) -> Specimen:
    before = small.shorten(model)
    if before:
        with suppress(Exception):
            return Specimen(entry, make, model, shape, look(entry, model, shape), True)
        small.restore(before)
    return Specimen(entry, make, model, shape, look(entry, model, shape))


def examine(entry: Entry, *, values: bool = True) -> dict[str, Any]:
    """One row of the census. ``status``: ``none`` (no softmax attention between tokens),
    ``refused`` (by the library, with its reason), ``patched``, or ``failed`` with its faults.
    Without ``values`` nothing is computed: only what patching finds is told."""
    specimen = prepare(entry)
    between = [f for f in specimen.found if f.between_tokens]
    row: dict[str, Any] = {"status": "none", "attention": len(between), "input": specimen.shape[1:]}
    row["queries"] = max((f.queries or 2 for f in between), default=0)
    row["shortened"] = specimen.shortened
    row["kinds"] = sorted({f"{f.owner} {f.kind}" for f in between})
    row["not_tokens"] = sorted(
        {f"{f.owner}: {NOT_TOKENS.get(f.owner, 'softmax that is not over a product of q and k')}"
         for f in specimen.found if not f.between_tokens}
    )  # fmt: skip
    try:
        live, sites = _patched(specimen, between)
    except SparsiattnError as error:
        if between:
            row |= {"status": "refused", "reason": f"{type(error).__name__}: {error}"}
        return row
    row |= {"status": "patched", "named": sites != "*"}
    row |= _found(live, between)
    live.unpatch()
    row["faults"] = []
    if not between:
        row |= {"status": "failed", "faults": ["sites where the census saw no attention"]}
        return row
    if values:
        row |= _laws(specimen, small.materialise(specimen.model), row["faults"], sites)
        if row["faults"]:  # our values may grow without end in a model with nothing but batch norms
            row |= {"values": "the library's own", "faults": []}
            row |= _laws(specimen, specimen.as_made(), row["faults"], sites)
    if row["faults"]:
        row["status"] = "failed"
    return row


def _patched(specimen: Specimen, between: list[Found]) -> tuple[sparsiattn.Patch, Any]:
    """The patch, and the sites that had to be named: where a model attends from one query alone."""
    model, shape = specimen.model, specimen.shape
    try:
        return sparsiattn.patch(model, "topk", k=0.25, input=shape), "*"
    except NothingToPatch:
        names = [found.module for found in between if found.queries == 1]
        if not names:
            raise
    try:
        return sparsiattn.patch(model, "topk", k=0.25, input=shape, sites=names), names
    except SparsiattnError:  # the reason to list is the one without names
        return sparsiattn.patch(model, "topk", k=0.25, input=shape), "*"


def _found(live: sparsiattn.Patch, between: list[Found]) -> dict[str, Any]:
    """What the patch reached, left and missed, by class of module; and sites whose grid is off."""
    owner = {name: type(module).__name__ for name, module in live.model.named_modules()}
    sites = {site.name for site in live.sites}
    left = {f"{owner[name]}: {reason}" for name, reason in live.skipped}
    known = sites | {name for name, _ in live.skipped}
    flat = {
        owner[s.name]
        for s in live.sites
        if s.grid[0] * s.grid[1] + s.prefix_tokens != s.tokens
        or (s.raster and s.tokens > 3 and s.grid[0] == 1)
    }
    return {
        "backbone": live.backbone,
        "sites": len(sites),
        "reached": sorted({owner[name] for name in sites}),
        "left": sorted(left),
        "missed": sorted({f.owner for f in between if f.module not in known}),
        "flat_grids": sorted(flat),
    }


def _laws(specimen: Specimen, model: nn.Module, faults: list[str], sites: Any) -> dict[str, Any]:
    """Budget one is identity, a smaller one is not, and undoing leaves nothing behind."""
    small.redraw_small(model)
    image = torch.randn(specimen.shape, generator=torch.Generator().manual_seed(2))

    def forward() -> Tensor:
        torch.manual_seed(4)  # masked autoencoders draw what they leave out
        return flat(specimen.entry.call(model, image))

    keys, seen = list(model.state_dict()), {}
    with torch.no_grad():
        dense = forward()
        hooks = _hooks(model)  # some hosts add their own at the first forward
        if not dense.isfinite().all() or not dense.any():
            faults.append("the unpatched model's output is not finite, or all zero")
            return {}
        for name, strategy in _steps().items():
            with sparsiattn.patch(model, strategy, input=specimen.shape, sites=sites) as live:
                out = forward()
                seen[name] = relative(out, dense)
                faults += _patched_faults(name, seen[name], live, keys)
            if not torch.equal(forward(), dense):
                faults.append(f"{name}: unpatched output differs")
    if list(model.state_dict()) != keys:
        faults.append("unpatched: other keys in the state dict")
    if _hooks(model) != hooks:
        faults.append("unpatched: hooks are left")
    return {"change": seen}


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _steps() -> dict[str, Strategy]:
    named = {name: REGISTRY.get("strategies", name) for name in ("topk", "connectivity")}
    return {
        "topk k=1": named["topk"](k=1.0),
        "everything": Everything(),
        "topk k=.25": named["topk"](k=0.25),
        "connectivity k=.25": named["connectivity"](k=0.25, background=None),
    }


IDENTITIES = ("topk k=1", "everything")


def _patched_faults(name: str, change: float, live: sparsiattn.Patch, keys: list[str]) -> list[str]:
    faults = []
    if name in IDENTITIES and not change <= 1e-5:
        faults.append(f"{name}: relative error {change:.1e}")
    if name not in IDENTITIES and not change > 1e-5:
        faults.append(f"{name}: no real change ({change:.1e})")
    if name not in IDENTITIES and any(r.last_choice is None and _saves(r) for r in live.runtimes):
        faults.append(f"{name}: a site never ran sparsely")
    if [key for key in live.model.state_dict() if ".sparsiattn." not in key] != keys:
        faults.append(f"{name}: other keys in the state dict of the host")
    return faults


def _saves(runtime: Any) -> bool:
    return not runtime.stays_dense(runtime.site.keys)


def relative(out: Tensor, dense: Tensor) -> float:
    return float((out - dense).abs().max() / dense.abs().max())


def flat(output: Any) -> Tensor:
    """Every float tensor a model returned, in one row."""
    return torch.cat([x.flatten().float() for x in _floats(output)])


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floats(value)


def row_of(entry: Entry, *, values: bool) -> dict[str, Any]:
    """`examine`, with whatever it raises as a fault of the row."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():  # a guess that the report names is none of its faults
            warnings.simplefilter("ignore", sparsiattn.GuessedStructure)
            row = examine(entry, values=values)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        row = {"status": "failed", "faults": [f"{type(error).__name__}: {error} ({where})"]}
    seconds = round(time.perf_counter() - start, 1)
    return {"name": entry.name, "family": entry.family, **row, "seconds": seconds}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by name; the last line of a name counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def run(entries: Iterator[Entry], path: Path, *, values: bool = True) -> None:
    """Append the row of every entry that has none yet. A model that killed its run is noted before
    it is tried, and not tried again."""
    done = read(path)
    for entry in entries:
        if entry.name in done:
            continue
        _append(path, {"name": entry.name, "family": entry.family, "status": "failed",
                       "faults": ["the run was killed here"]})  # fmt: skip
        row = row_of(entry, values=values)
        _append(path, row)
        print(row["name"], row["status"], *row.get("faults", []), f"{row['seconds']} s", flush=True)
        gc.collect()


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
