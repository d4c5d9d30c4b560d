"""A patch on disk comes back with the same bits."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import AttentionInputs, Patch, Pattern, load, patch
from sparsiattn.attention import KeyIndex
from sparsiattn.kernels import Gather, cost
from sparsiattn.registry import REGISTRY
from tests.support import zoo

CONFIG, WEIGHTS = "sparsiattn.json", "planners.safetensors"
SITE = "blocks.0.attn"


# name of the case -> arguments of `patch` on the small ViT
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{name}, defaults": {"strategy": name} for name in sparsiattn.list_strategies()},
    "k per site": {"strategy": "topk", "k": [0.5, 3]},
    "k per site, learned": {"strategy": "connectivity", "k": [0.1, 0.4]},
    "k callable": {"strategy": "random", "k": lambda site: 0.1 * (site.index + 1)},
    "k full at one site": {"strategy": "topk", "k": [1.0, 0.1]},
    "tile": {"strategy": "topk", "k": 0.2, "tile": (2, 4)},
    "tile 1 as a pair": {"strategy": "topk", "k": 0.2, "tile": (1, 1)},
    "background": {"strategy": "topk", "k": 0.2, "background": 3},
    "no background": {"strategy": "local", "k": 0.2, "background": None},
    "free prefix": {"strategy": "topk", "k": 0.05, "prefix_keys": False},
    "own options": {
        "strategy": "connectivity", "k": 0.2, "channels": 8, "basis": 5, "basis_coef_topk": 2,
        "basis_threshold": 0.01, "head_scale": True, "tokens_per_basis": 4,
    },
    "seed": {"strategy": "random", "k": 0.2, "seed": 11},
    "some sites": {"strategy": "connectivity", "k": 0.2, "sites": "blocks.1.*"},
    "kernel": {"strategy": "topk", "k": 0.2, "kernel": "reference"},
    "schedule": {"strategy": "topk", "schedule": {"k": {SITE: 0.05}}},
}  # fmt: skip


def x() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def shake(live: Patch) -> None:
    """Weights that no initialisation would give, so that loading them shows."""
    generator = torch.Generator().manual_seed(9)
    for runtime in live.runtimes:
        if isinstance(runtime.planner, nn.Module):
            for weight in runtime.planner.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.data.add_(0.2 * noise)


@pytest.fixture
def model() -> nn.Module:
    return zoo.build("vit")


def features(model: Any) -> Tensor:
    """All tokens: logits come from the CLS token, whose row is dense at the last site."""
    return model.forward_features(x())  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_gives_the_same_bits(model: nn.Module, tmp_path: Path, variant: str) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad(), patch(model, **VARIANTS[variant]) as live:
        shake(live)
        sparse = features(model)
        again = load(twin, live.save(tmp_path))
        assert torch.equal(features(twin), sparse)
        assert [r.strategy for r in again.runtimes] == [r.strategy for r in live.runtimes]
        assert [r.dense for r in again.runtimes] == [r.dense for r in live.runtimes]
        assert (again.kernel, again.sites) == (live.kernel, live.sites)
        assert torch.equal(features(again.unpatch()), features(live.unpatch()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_changes_something(model: nn.Module, variant: str) -> None:
    """A round trip of a patch that changes nothing would prove nothing."""
    arguments = VARIANTS[variant]
    if arguments["strategy"] == "dense":
        return
    with torch.no_grad():
        dense = features(model)
        with patch(model, **arguments):
            assert not torch.equal(features(model), dense)


SOME = ["connectivity, defaults", "k per site, learned", "some sites", "kernel"]


@pytest.mark.parametrize("variant", SOME)
def test_saving_what_was_loaded_writes_the_same_bytes(
    model: nn.Module, tmp_path: Path, variant: str
) -> None:
    twin = copy.deepcopy(model)
    with patch(model, **VARIANTS[variant]) as live:
        shake(live)
        first = live.save(tmp_path / "new" / "folder")
        again = load(twin, str(first))
        assert str(again.report()) == str(live.report())
    second = again.save(str(tmp_path / "second"))
    for name in (CONFIG, WEIGHTS):
        assert (second / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.parametrize("name", sparsiattn.list_strategies())
def test_nothing_but_json_and_safetensors(
    model: nn.Module, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = copy.deepcopy(model)
    for module, function in (
        (pickle, "Pickler"), (pickle, "Unpickler"), (pickle, "dump"), (pickle, "load"),
        (torch, "save"), (torch, "load"),
    ):  # fmt: skip
        monkeypatch.setattr(module, function, _forbidden)
    with patch(model, name) as live:
        own = sum(len(_weights(runtime.planner)) for runtime in live.runtimes)
        folder = live.save(tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS, CONFIG]
    assert len(safetensors.torch.load_file(folder / WEIGHTS)) == own
    json.loads((folder / CONFIG).read_text(), parse_constant=_forbidden)
    load(twin, folder)


def _forbidden(*_: object, **__: object) -> Any:
    raise AssertionError("neither pickle nor numbers that JSON does not have")


def _weights(planner: object) -> dict[str, Tensor]:
    return planner.state_dict() if isinstance(planner, nn.Module) else {}


def _few_keys_win(self: Gather, inputs: AttentionInputs, pattern: Pattern) -> float:
    return 2.0 if isinstance(pattern, KeyIndex) and pattern.index.shape[-1] < 10 else 0.5


@pytest.mark.parametrize("strategy", ["connectivity", "topk"])
def test_sites_left_dense_stay_dense(
    model: nn.Module, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice was made where the patch was saved; another machine's speeds do not matter."""
    twin = copy.deepcopy(model)
    with monkeypatch.context() as context, torch.no_grad():
        context.setattr(Gather, "speed", _few_keys_win)
        context.setattr(cost.Planning, "share", lambda *_: 0.0)
        context.setattr(cost, "SITE_SECONDS", 0.0)
        live = patch(model, strategy, k=[0.1, 0.9], only_if_faster=True)
        assert [runtime.dense for runtime in live.runtimes] == [False, True]
        sparse = features(model)
        live.save(tmp_path)
    cost.reload()  # choices made by other speeds are not kept
    again = load(twin, tmp_path)
    assert [runtime.dense for runtime in again.runtimes] == [False, True]
    with torch.no_grad():
        assert torch.equal(features(twin), features(model))
        assert not torch.equal(features(again.unpatch()), sparse)


@pytest.mark.parametrize("name", sparsiattn.list_strategies())
def test_config_survives_json(name: str) -> None:
    """Law 8, with every option away from its default where that is known."""
    strategy = REGISTRY.get("strategies", name)
    away = {"tile": (3, 5), "background": 4, "prefix_keys": False}
    if not getattr(strategy, "selects_keys", True):  # it drops no keys that background stands for
        away = {}
    for options in ({}, away if strategy.kind == "attention" else {"layers": [1], "restore": None}):
        config = strategy.build(options)
        saved = json.loads(json.dumps(config.to_dict(), allow_nan=False))
        assert saved["name"] == name
        again = REGISTRY.get("strategies", saved["name"]).build(saved["options"])
        assert again == config
        assert again.to_dict() == config.to_dict()
        assert hash(again) == hash(config)


@pytest.mark.parametrize("family", ["swin", "hiera", "vit_unfused"])
def test_other_families(tmp_path: Path, family: str) -> None:
    model, twin = zoo.build(family), zoo.build(family)
    image = zoo.images(model)
    with torch.no_grad(), patch(model, k=0.25) as live:
        shake(live)
        sparse = model(image)
        load(twin, live.save(tmp_path))
        assert torch.equal(twin(image), sparse)


def test_compiled_wrapper_is_seen_through(model: nn.Module, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)
    with patch(model, k=0.25) as live:
        live.save(tmp_path)
    wrapped = torch.compile(twin, backend="eager")
    assert load(wrapped, tmp_path) is sparsiattn.patch_of(twin)


def test_half_precision_model(model: nn.Module, tmp_path: Path) -> None:
    model = model.to(torch.bfloat16)
    twin = copy.deepcopy(model)
    with torch.no_grad(), patch(model, k=0.25) as live:
        shake(live)
        sparse = model(x().bfloat16())
        load(twin, live.save(tmp_path))
        assert torch.equal(twin(x().bfloat16()), sparse)


def test_calibrated_weights_come_back(model: nn.Module, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        dense = features(model)
    live = patch(model, "connectivity", k=0.25, scores="predictor")
    before = _all_weights(live)
    losses = sparsiattn.calibrate(model, [x() for _ in range(3)], lr=0.05)
    assert len(losses) == 3
    after = _all_weights(live)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    again = load(twin, live.save(tmp_path))
    for name, weight in _all_weights(again).items():
        assert torch.equal(weight, after[name]), name
    assert not any(p.requires_grad for r in again.runtimes for p in r.planner.parameters())
    with torch.no_grad():
        assert torch.equal(features(twin), features(model))
        assert torch.equal(features(again.unpatch()), dense)


def _all_weights(live: Patch) -> dict[str, Tensor]:
    return {
        f"{runtime.site.name}.{name}": weight.detach().clone()
        for runtime in live.runtimes
        for name, weight in _weights(runtime.planner).items()
    }
