"""Notes of a profile that explain where fewer MACs do not save time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from sparsiattn.analysis.profiling.result import Profile, SiteProfile
from sparsiattn.patching.report_lines import not_faster
from sparsiattn.patching.text import macs_text, percent

SMALL_SHARE = 0.15
"""Share of attention in a model's MACs below which selecting keys is hardly useful."""
PADDED = 1.1
"""Ratio of computed to kept pairs above which a note is shown."""


def notes(profile: Profile) -> tuple[str, ...]:
    """Notes on the savings of a profile, one line each."""
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
            f"QK^T and AV are {percent(share)} of this model's MACs at this size: selecting keys "
            "cannot save more than that, in MACs or in time; fewer tokens (token_drop, "
            "token_merge, hybrid) save in every part, and larger images raise the share"
        )


def _kernels(sparse: list[SiteProfile]) -> Iterator[str]:
    """Notes on kernels that compute more pairs than the pattern keeps."""
    groups: defaultdict[tuple[str, bool], list[SiteProfile]] = defaultdict(list)
    for site in sparse:
        if site.computed.mhsa > PADDED * site.pattern.mhsa:
            groups[site.kernel, site.computed.mhsa >= _dense_mhsa(site)].append(site)
    for (kernel, computes_all), sites in groups.items():
        kept, computed = (sum(s.pattern.mhsa for s in sites), sum(s.computed.mhsa for s in sites))
        problem = "computes more than the pattern keeps (padding)"
        if computes_all:
            problem = "computes as much as dense attention and masks it, so it saves no time"
        yield (
            f"kernel {kernel} on {_count(len(sites))} {problem}: {macs_text(kept)} kept, "
            f"{macs_text(computed)} computed"
        )


def _planning(sparse: list[SiteProfile]) -> Iterator[str]:
    """Notes on sites at which selecting keys costs more than it saves."""
    losing = [s for s in sparse if s.pattern.mhsa + s.pattern.predictor >= _dense_mhsa(s)]
    if losing:
        planned = sum(site.pattern.predictor for site in losing)
        saved = sum(_dense_mhsa(site) - site.pattern.mhsa for site in losing)
        yield (
            f"{_count(len(losing))}: selecting keys costs {macs_text(planned)}, more than the "
            f"{macs_text(max(0, saved))} it saves; a smaller k or larger tile= changes that"
        )


def _speed(profile: Profile, sparse: list[SiteProfile]) -> Iterator[str]:
    """Notes on sites that are not faster, or stay dense because they would not be faster."""
    slow = sum(site.speed is not None and site.speed < 1 for site in sparse)
    if slow:
        yield not_faster(slow)
    left_dense = sum(site.left_dense for site in profile.sites)
    if left_dense:
        yield (
            f"{_count(left_dense)} left dense, as the sparse kernel is expected to be slower: "
            "only_if_faster=False uses (and counts) the pattern everywhere"
        )


def _whole_model(profile: Profile) -> Iterator[str]:
    """Notes on a whole model that saves little in MACs or in time."""
    dense, sparse = profile.macs_dense, profile.pattern.total
    if profile.strategy and sparse >= dense:
        yield f"the whole model saves nothing: {macs_text(sparse)}, dense {macs_text(dense)}"
    speed = None if profile.latency is None else profile.latency.ratio
    fewer = dense / max(1, sparse)
    if speed is not None and (speed < 1 or speed < 0.9 * fewer):
        result = "is slower" if speed < 1 else "saves less in time than in MACs"
        yield (
            f"measured: the patched model {result}: {fewer:.2f}x fewer MACs, {speed:.2f}x the speed"
        )


def _dense_mhsa(site: SiteProfile) -> int:
    """MACs of dense QK^T and AV for the tokens that reach a site.

    Merged and dropped tokens are removed from both queries and keys.
    """
    return round(site.dense.mhsa * (site.tokens / max(1, site.tokens_dense)) ** 2)


def _count(sites: int) -> str:
    return "1 site" if sites == 1 else f"{sites} sites"
