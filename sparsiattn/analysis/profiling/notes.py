"""Where a saving in MACs is none in time, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from sparsiattn.analysis.profiling.result import Profile, SiteProfile
from sparsiattn.patching.report_lines import not_faster
from sparsiattn.patching.text import macs_text, percent

SMALL_SHARE = 0.15
"""Share of attention in a model below which choosing keys is hardly worth its while."""
PADDED = 1.1
"""How much more than the kept pairs a kernel may compute before it is worth a line."""


def notes(profile: Profile) -> tuple[str, ...]:
    """What to know about the savings of a profile, a line each."""
    sparse = [site for site in profile.sites if site.expected is not None]
    return (
        *_small_share(profile, sparse),
        *_kernels(sparse),
        *_planning(sparse),
        *_speed(profile, sparse),
        *_whole_model(profile),
    )


def _small_share(profile: Profile, sparse: list[SiteProfile]) -> Iterator[str]:
    share = profile.dense.mhsa / max(1, profile.macs_dense)
    if sparse and share < SMALL_SHARE:
        yield (
            f"QK^T and AV are {percent(share)} of this model's MACs at this size: choosing keys "
            "can save no more than that, here or on the clock; fewer tokens (token_drop, "
            "token_merge, hybrid) save in every part, and larger images raise the share"
        )


def _kernels(sparse: list[SiteProfile]) -> Iterator[str]:
    """Kernels that work out more pairs than the pattern keeps."""
    groups: defaultdict[tuple[str, bool], list[SiteProfile]] = defaultdict(list)
    for site in sparse:
        if site.computed.mhsa > PADDED * site.pattern.mhsa:
            groups[site.kernel, site.computed.mhsa >= _dense_mhsa(site)].append(site)
    for (kernel, computes_all), sites in groups.items():
        kept, computed = (sum(s.pattern.mhsa for s in sites), sum(s.computed.mhsa for s in sites))
        what = "computes more than the pattern keeps (padding)"
        if computes_all:
            what = "computes no less than dense attention, and masks: fewer pairs, but no less time"
        yield (
            f"kernel {kernel} on {_count(len(sites))} {what}: {macs_text(kept)} kept, "
            f"{macs_text(computed)} computed"
        )


def _planning(sparse: list[SiteProfile]) -> Iterator[str]:
    """Sites at which choosing keys costs more than it saves."""
    vain = [s for s in sparse if s.pattern.mhsa + s.pattern.predictor >= _dense_mhsa(s)]
    if vain:
        planned = sum(site.pattern.predictor for site in vain)
        saved = sum(_dense_mhsa(site) - site.pattern.mhsa for site in vain)
        yield (
            f"{_count(len(vain))}: choosing keys costs {macs_text(planned)}, more than the "
            f"{macs_text(max(0, saved))} it spares; a smaller k or larger tile= changes that"
        )


def _speed(profile: Profile, sparse: list[SiteProfile]) -> Iterator[str]:
    """Sites that do not gain time, or stay dense because they would not."""
    slow = sum(site.speed is not None and site.speed < 1 for site in sparse)
    if slow:
        yield not_faster(slow)
    left_dense = sum(site.left_dense for site in profile.sites)
    if left_dense:
        yield (
            f"{_count(left_dense)} left dense, where the sparse kernel should lose: "
            "only_if_faster=False forces (and counts) the pattern everywhere"
        )


def _whole_model(profile: Profile) -> Iterator[str]:
    """What the whole model gains in MACs and in time, where that is little."""
    dense, sparse = profile.macs_dense, profile.pattern.total
    if profile.strategy and sparse >= dense:
        yield f"in all nothing is saved: {macs_text(sparse)} against {macs_text(dense)} dense"
    speed = None if profile.latency is None else profile.latency.ratio
    fewer = dense / max(1, sparse)
    if speed is not None and (speed < 1 or speed < 0.9 * fewer):
        what = "is slower" if speed < 1 else "gains less in time than in MACs"
        yield f"measured: the patched model {what}: {fewer:.2f}x fewer MACs, {speed:.2f}x the speed"


def _dense_mhsa(site: SiteProfile) -> int:
    """Dense QK^T and AV at the tokens that reach a site; merged and dropped ones are gone from
    queries and keys alike."""
    return round(site.dense.mhsa * (site.tokens / max(1, site.tokens_dense)) ** 2)


def _count(sites: int) -> str:
    return "1 site" if sites == 1 else f"{sites} sites"
