"""What a report says of tiles: which, why, and what another would bring."""

from __future__ import annotations

import re

import torch
from timm import models

import sparsiattn
from tests.support import zoo


def test_one_line_for_all_sites_with_the_ratio_of_another_tile() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, "local", k=0.25) as patch:
        report = patch.report()
    (line,) = report.tiles
    assert line in str(report)
    assert line.startswith("tile 1 (auto: 65 tokens, fewer than 1,024): one key list per query; ")
    match = re.search(r"tile=\(4, 4\), .* is expected to be (about|\d+\.\dx) as fast", line)
    assert match is not None
    with sparsiattn.patch(model, "local", k=0.25, tile=(4, 4)) as patch:
        (given,), other = patch.report().tiles, patch.report().sites[0].expected
    ratio = f"{other / report.sites[0].expected:.1f}x"
    assert match[1] == ("about" if ratio == "1.0x" else ratio)
    assert given.startswith(
        "tile 4x4 (set by the user): one key list for up to 16 queries; tile=1, "
    )


def test_many_tokens_share() -> None:
    large = models.VisionTransformer(**{**zoo.TINY, "img_size": 128})
    with sparsiattn.patch(large, "connectivity", k=[0.1, 0.2]) as patch:
        planner = patch.runtimes[0].planner
        (line,) = patch.report().tiles
        assert line.startswith("tile 8x4 (auto: 1,025 tokens, at least 1,024): one key list for up")
        with torch.no_grad():
            planner.down.mul_(1.5)  # type: ignore[attr-defined]
        (fitted,) = patch.report().tiles
    assert line.split(" is expected")[0] == fitted.split(" is expected")[0]


def test_no_line_where_no_lists_are_shared() -> None:
    for name, strategy in (("vit", "dense"), ("vit", "token_drop"), ("vit", "longformer")):
        with sparsiattn.patch(zoo.build(name), strategy) as patch:
            assert patch.report().tiles == ()
    with sparsiattn.patch(zoo.build("hiera"), "topk", k=0.25) as patch:
        assert all(
            "are not known): one key list per query" in line for line in patch.report().tiles
        )
