"""What a search chooses beside shares, what it compares, and what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

import sparsiattn
from sparsiattn.analysis.schedule_search import plan
from sparsiattn.analysis.schedule_search.settings import default_grid, patch_options, settings_of
from sparsiattn.strategies import Connectivity, Hybrid, Local, TokenDrop, TokenMerge


def host(**options: Any) -> Any:
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        **{"num_classes": 7, **options},
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return model.eval()


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def test_options_of_the_whole_model_are_chosen() -> None:
    """Tiles plan for many queries at once, so that only they keep to so small a budget."""
    model = host()
    result = sparsiattn.search(
        model, images(), {"macs": 0.915}, strategy="connectivity", keys=(0.05,), trials=8,
        options_grid={"tile": [1, (4, 4)], "background": [None]}, progress=False,
    )  # fmt: skip
    assert result.options == {"tile": (4, 4), "background": None}
    assert result.trials <= 8
    assert json.loads(json.dumps(result.to_dict()))["options"]["tile"] == [4, 4]


def test_the_line_it_prints_patches_as_was_found() -> None:
    model = host()
    result = sparsiattn.search(
        model, images(), {"macs": 0.85}, strategy="hybrid", keys=(0.1,), tokens=(0.5,), trials=8,
        attention="local", options_grid={"tile": [(2, 2)]}, progress=False,
    )  # fmt: skip
    line = str(result).splitlines()[-1]
    assert line == result.call
    with eval(line, {"sparsiattn": sparsiattn, "model": model, "Local": Local}) as live:
        assert live.report().macs == result.found.macs
        assert live.runtimes[0].strategy.tile == (2, 2)


def test_a_grid_is_every_combination_of_what_it_lists() -> None:
    grid = {"tile": ["auto", (2, 2)], "background": [2, 2, None]}
    found = [setting.options for setting in settings_of(Local(), grid)]
    assert found == [
        {"tile": tile, "background": g} for tile in ("auto", (2, 2)) for g in (2, None)
    ]
    assert settings_of(Local(), {})[0].strategy == Local()


def test_the_default_grid_has_the_strategys_own_options_first() -> None:
    assert settings_of(Local(), default_grid(Local()))[0].strategy == Local()
    assert default_grid(Local())["background"] == [2, None]
    assert default_grid(TokenDrop()) == {}


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (Local(k=0.1), {}),
        (Local(tile=(2, 2), background=None), {"tile": (2, 2), "background": None}),
        (Connectivity(channels=8), {"channels": 8}),
        (TokenMerge(ratio=0.9, method="pitome"), {"method": "pitome"}),
        (Hybrid(k=0.1, keep=0.5, tile=(2, 2)), {"tile": (2, 2)}),
        (Hybrid(attention=Connectivity(channels=8)), {"attention": Connectivity(channels=8)}),
        (Hybrid(tokens="token_merge"), {"tokens": TokenMerge(), "tile": 1}),
    ],
)
def test_what_to_pass_beside_the_schedule(strategy: Any, options: dict[str, Any]) -> None:
    assert patch_options(strategy) == options


def test_merged_tokens_are_searched_as_shares() -> None:
    """A uniform share is what ``ratio`` does, and a schedule has it as numbers of tokens."""
    model, x = host(), images()
    result = sparsiattn.search(
        model, x, {"macs": 0.85}, strategy="token_merge", tokens=(0.8,), ratio=0.9, trials=5,
        progress=False,
    )  # fmt: skip
    assert result.uniform is not None
    assert result.uniform_shares == {"ratio": 0.8}
    assert set(result.schedule) == {"r"}
    with sparsiattn.patch(model, "token_merge", ratio=0.8) as live, torch.no_grad():
        assert live.report().macs == result.uniform.macs
        by_ratio = model(x)
    with sparsiattn.patch(model, "token_merge", schedule=result.uniform_schedule), torch.no_grad():
        assert torch.equal(model(x), by_ratio)


def test_layers_limit_the_blocks() -> None:
    result = sparsiattn.search(
        host(), images(), {"macs": 0.95}, strategy="token_drop", layers=[1], trials=9,
        progress=False,
    )  # fmt: skip
    assert set(result.schedule["keep"]) == {"blocks.1"}
    assert result.trials == 5  # five shares at one block: all that there is


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_of_a_model_without_a_head(pool: str) -> None:
    model, x = host(num_classes=0, global_pool=pool), images()
    result = sparsiattn.search(
        model, x, {"agreement": 0.5}, strategy="local", keys=(0.1,), options_grid={}, trials=4,
        progress=False,
    )  # fmt: skip
    assert result.measure == "features"
    assert "mean cosine" in str(result)
    with torch.no_grad():
        dense = model.forward_features(x)
        with eval(result.call, {"sparsiattn": sparsiattn, "model": model}):
            patched = model.forward_features(x)
    wanted = F.cosine_similarity(dense, patched, dim=-1).mean().item()
    assert result.found.agreement == pytest.approx(wanted, abs=1e-5)
    assert result.found.divergence == pytest.approx(1 - wanted, abs=1e-5)


def test_a_measure_of_the_users() -> None:
    def nearness(dense: torch.Tensor, patched: torch.Tensor) -> torch.Tensor:
        return 1 - (dense - patched).abs().amax(-1)

    result = sparsiattn.search(
        host(), images(), {"macs": 0.95}, strategy="token_drop", tokens=(0.5,), trials=3,
        metric=nearness, progress=False,
    )  # fmt: skip
    assert result.measure == "callable"
    assert result.found.divergence == pytest.approx(1 - result.found.agreement)


def test_it_says_beforehand_how_much_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: dict[str, Any] = {"strategy": "token_drop", "tokens": (0.5,), "trials": 3}
    result = sparsiattn.search(host(), images(6), {"macs": 0.9}, **arguments)
    out, err = capsys.readouterr()
    assert out == ""
    said = re.search(r"up to (\d+) trials .* x 6 images = (\d+) forward passes; about (.*),", err)
    assert said is not None
    assert int(said[1]) == 3 == result.trials_planned
    assert int(said[2]) == 18
    sparsiattn.search(host(), images(6), {"macs": 0.9}, progress=False, **arguments)
    assert capsys.readouterr().err == ""


def test_one_line_a_minute_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])
    with plan.shown("begins", 100, True) as show:
        for done in range(1, 101):
            now[0] += 10.0
            show(done)
            show()  # a sign of life counts nothing
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "begins"
    assert len(lines) - 1 == 16  # 1,000 seconds
    assert lines[1] == "search: 6 of up to 100 trials after 60 s"


def test_times_of_copies_are_taken_and_the_model_stays(tmp_path: Path) -> None:
    """A real clock: which is the best it may say, but not that something is left behind."""
    model, x = host(), images()
    with torch.no_grad():
        before = model(x)
    result = sparsiattn.search(
        model, x, {"latency": 1.0}, strategy="token_drop", tokens=(0.5,), trials=3, rounds=2,
        progress=False,
    )  # fmt: skip
    assert result.found.latency is not None
    assert result.found.latency <= 1.0
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert sparsiattn.patch_of(model) is None
    text = json.loads(result.save(tmp_path / "s.json").read_text())
    assert "schedule=" in text["about"]["patch"]
