"""A `Profile` in words and tables."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace

from sparsiattn.analysis.profiling.result import Parts, Profile, SiteProfile
from sparsiattn.patching.report import aligned, macs_text, not_faster

SMALL = 0.15
"""Share of attention in a model below which choosing keys is hardly worth its while."""
PADDED = 1.1
"""How much more than the kept pairs a kernel may compute before it is worth a line."""

NAMES = {
    "mhsa": "MHSA (QK^T, AV)",
    "predictor": "predictor",
    "projections": "projections",
    "mlp": "MLP",
    "rest": "rest",
}
Cells = list[tuple[str, ...]]


def text(found: Profile) -> str:
    """All of it, as plain lines."""
    tables = [aligned(parts_table(found)), aligned(site_table(found)) if found.sites else []]
    lines = [head(found), *tables[0], "", *tables[1], *tail(found)]
    return "\n".join(line.rstrip() for line in lines)


def head(found: Profile) -> str:
    shape = "x".join(map(str, found.input_shape))
    what = found.strategy or "unpatched"
    return (
        f"{found.model} ({found.backbone}), {what}, {len(found.sites)} sites, input {shape}: MACs "
        f"for one image (FLOPs are twice that), {macs_text(found.macs_dense)} -> "
        f"{macs_text(found.macs)} by the accounting {found.accounting!r}"
    )


def parts_table(found: Profile) -> Cells:
    """MACs by part, dense and by each accounting, a heading first."""
    columns = {"dense": found.dense}
    if found.strategy:
        columns |= {"own": found.own, "computed": found.computed}
        if found.accounting == "paper":
            columns["paper"] = found.paper
    rows: Cells = [("MACs", *columns)]
    for field in fields(Parts):
        macs = (getattr(parts, field.name) for parts in columns.values())
        rows.append((NAMES[field.name], *map(macs_text, macs)))
    if found.accounting == "paper":
        both = (parts.mhsa + parts.predictor for parts in columns.values())
        rows.append(("MHSA with predictor", *map(macs_text, both)))
    return [*rows, ("all", *(macs_text(parts.total) for parts in columns.values()))]


def site_table(found: Profile) -> Cells:
    """Sites in cells, a heading first; columns that would say nothing are left out."""
    heading = ("site", "tokens", "MHSA", "kernel", "density", "kept", "computed", "predictor")
    rows = [_site_row(site) for site in found.sites]
    if not found.strategy:
        return [heading[:3], *(row[:3] for row in rows)]
    speeds = [
        (_speed(site.expected), _speed(site.measured)) if site.speed else ("-", "-")
        for site in found.sites
    ]
    full = [(*heading, "expected", "measured")]
    return full + [(*row, *speed) for row, speed in zip(rows, speeds, strict=True)]


def _site_row(site: SiteProfile) -> tuple[str, ...]:
    macs = (site.own.mhsa, site.computed.mhsa, site.own.predictor)
    return (
        site.name, str(site.tokens), macs_text(site.dense.mhsa), site.kernel,
        f"{site.density:.3f}", *map(macs_text, macs),
    )  # fmt: skip


def _speed(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def tail(found: Profile) -> list[str]:
    """Lines below the tables: time, memory, and what to know about the savings."""
    lines = []
    if found.latency is not None:
        took = found.latency
        lines.append(f"one forward pass: dense {took.dense_ms:.2f} ms")
        if took.ms is not None:
            lines[-1] += (
                f", patched {took.ms:.2f} ms, {took.ratio:.2f}x (median of {took.rounds} rounds)"
            )
    if found.memory is not None:
        peaks = f"dense {found.memory.dense / 1e6:.1f} MB"
        patched = f", patched {found.memory.patched / 1e6:.1f} MB" if found.strategy else ""
        lines.append(f"peak memory of a forward pass, weights apart: {peaks}{patched}")
    return lines + list(found.notes)


def notes(found: Profile) -> Profile:
    """The profile with its notes: where a saving in MACs is none in time."""
    sparse = [site for site in found.sites if site.expected is not None]
    lines = [*_scope(found, sparse), *_kernels(sparse), *_planning(sparse)]
    slow = sum(site.speed is not None and site.speed < 1 for site in sparse)
    if slow:
        lines.append(not_faster(slow))
    left = sum(site.left_dense for site in found.sites)
    if left:
        lines.append(
            f"{_count(left)} left dense, where the sparse kernel should lose: "
            "only_if_faster=False forces (and counts) the pattern everywhere"
        )
    lines += _total(found)
    if found.latency is not None and found.latency.ratio is not None:
        lines += _time(found, found.latency.ratio)
    return replace(found, notes=tuple(lines))


def _scope(found: Profile, sparse: list[SiteProfile]) -> list[str]:
    share = found.dense.mhsa / max(1, found.macs_dense)
    if not sparse or share >= SMALL:
        return []
    return [
        f"QK^T and AV are {100 * share:.1f} % of this model's MACs at this size: choosing keys can "
        "save no more than that, here or on the clock; fewer tokens (token_drop, token_merge, "
        "hybrid) save in every part, and larger images raise the share"
    ]


def _kernels(sparse: list[SiteProfile]) -> list[str]:
    """Kernels that work out more pairs than the pattern keeps."""
    groups: defaultdict[tuple[str, bool], list[SiteProfile]] = defaultdict(list)
    for site in sparse:
        if site.computed.mhsa > PADDED * site.own.mhsa:
            every = site.computed.mhsa >= _at_its_tokens(site)
            groups[site.kernel, every].append(site)
    lines = []
    for (kernel, every), sites in groups.items():
        kept, ran = sum(s.own.mhsa for s in sites), sum(s.computed.mhsa for s in sites)
        what = "computes more than the pattern keeps (padding)"
        if every:
            what = "computes no less than dense attention, and masks: fewer pairs, but no less time"
        lines.append(
            f"kernel {kernel} on {_count(len(sites))} {what}: {macs_text(kept)} kept, "
            f"{macs_text(ran)} computed"
        )
    return lines


def _planning(sparse: list[SiteProfile]) -> list[str]:
    """Sites at which choosing keys costs more than it spares."""
    vain = [s for s in sparse if s.own.mhsa + s.own.predictor >= _at_its_tokens(s)]
    if not vain:
        return []
    planned, saved = (
        sum(s.own.predictor for s in vain),
        sum(_at_its_tokens(s) - s.own.mhsa for s in vain),
    )
    return [
        f"{_count(len(vain))}: choosing keys costs {macs_text(planned)}, more than the "
        f"{macs_text(max(0, saved))} it spares; a smaller k or larger tile= changes that"
    ]


def _at_its_tokens(site: SiteProfile) -> int:
    """Dense QK^T and AV at the tokens that reach a site; merged and dropped ones are gone from
    queries and keys alike."""
    return round(site.dense.mhsa * (site.tokens / max(1, site.tokens_dense)) ** 2)


def _total(found: Profile) -> list[str]:
    if not found.strategy or found.own.total < found.macs_dense:
        return []
    return [
        f"in all nothing is saved: {macs_text(found.own.total)} against "
        f"{macs_text(found.macs_dense)} dense"
    ]


def _time(found: Profile, ratio: float) -> list[str]:
    fewer = found.macs_dense / max(1, found.own.total)
    if ratio >= 1 and ratio >= 0.9 * fewer:
        return []
    what = "is slower" if ratio < 1 else "gains less in time than in MACs"
    return [f"measured: the patched model {what}: {fewer:.2f}x fewer MACs, {ratio:.2f}x the speed"]


def _count(sites: int) -> str:
    return "1 site" if sites == 1 else f"{sites} sites"
