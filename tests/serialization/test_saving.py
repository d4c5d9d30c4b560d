"""A patch on disk comes back with the same bits, or is refused with the model as it was."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import (
    AttentionInputs,
    MismatchedPatch,
    Patch,
    Pattern,
    SparsiattnError,
    load,
    patch,
)
from sparsiattn.attention import KeyIndex
from sparsiattn.kernels import Gather, cost
from sparsiattn.registry import REGISTRY
from sparsiattn.serialization.files import checksum, with_checksum
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


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model and a saved patch of it, for tests to copy."""
    model = zoo.build("vit")
    with patch(model, "connectivity", k=0.2) as live:
        return model, live.save(tmp_path_factory.mktemp("template"))


@pytest.fixture
def model(template: tuple[nn.Module, Path]) -> nn.Module:
    return copy.deepcopy(template[0])


@pytest.fixture
def saved(template: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(template[1], tmp_path / "saved"))


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
    found = REGISTRY.get("strategies", name)
    away = {"tile": (3, 5), "background": 4, "prefix_keys": False}
    if not getattr(
        found, "selects_keys", True
    ):  # it drops no keys that a background would stand for
        away = {}
    for options in ({}, away if found.kind == "attention" else {"layers": [1], "restore": None}):
        config = found.build(options)
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
    live = patch(model, "connectivity", k=0.25)
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


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    image = zoo.images(model)
    with torch.no_grad():
        output, state = model(image), copy.deepcopy(model.state_dict())
        traces = _traces(model)
        yield
        assert sparsiattn.patch_of(model) is None
        assert _traces(model) == traces
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
        assert torch.equal(model(image), output)


def _traces(model: nn.Module) -> list[Any]:
    """Everything that a patch could leave behind, but its tensors."""
    return [
        (
            id(m),
            sorted(vars(m)),
            list(m._modules),
            *map(len, (m._forward_hooks, m._forward_pre_hooks)),
        )
        for m in model.modules()
    ]


def refused(model: nn.Module, folder: Path, *says: str) -> SparsiattnError:
    with untouched(model), pytest.raises(SparsiattnError) as caught:
        load(model, folder)
    assert isinstance(caught.value, (ValueError, LookupError, TypeError))
    for part in says:
        assert part in str(caught.value)
    return caught.value


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """With a checksum that fits again, so that other checks have their say."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    text = json.dumps(with_checksum(config) if "seal" in config else config)
    (folder / CONFIG).write_text(text)


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    edit(folder, lambda config: config["files"].update({WEIGHTS: checksum(folder / WEIGHTS)}))


def test_the_fixture_itself_loads(model: nn.Module, saved: Path) -> None:
    """Else every refusal below would pass for the wrong reason."""
    edit(saved, lambda config: None)
    edit_weights(saved, lambda tensors: None)
    load(model, saved).unpatch()


class TestAnotherModel:
    @pytest.mark.parametrize("family", ["swin", "hiera", "vit_registers", "deit_distilled"])
    def test_family(self, saved: Path, family: str) -> None:
        refused(zoo.build(family), saved, "another model")

    def test_class(self, model: nn.Module, saved: Path) -> None:
        model.__class__ = type("MyTransformer", (type(model),), {})
        refused(model, saved, "another model", "'VisionTransformer' there", "'MyTransformer' here")

    @pytest.mark.parametrize(
        "options", [{"depth": 3}, {"num_classes": 7}, {"embed_dim": 24}, {"img_size": 64}], ids=str
    )
    def test_shape(self, saved: Path, options: dict[str, int]) -> None:
        model = zoo.models.VisionTransformer(**{**zoo.TINY, **options}).eval()
        assert isinstance(refused(model, saved, "another model"), MismatchedPatch)

    def test_heads(self, saved: Path) -> None:
        """The weights fit, but attention would be cut into other heads."""
        model = zoo.models.VisionTransformer(
            **{**zoo.TINY, "global_pool": "avg", "num_heads": 6}
        ).eval()
        refused(model, saved, SITE, "heads")

    def test_no_attention(self, saved: Path) -> None:
        class Pixels(nn.Flatten):
            pretrained_cfg = {"input_size": (3, 64, 64)}  # noqa: RUF012

        refused(Pixels(), saved, "another model")

    @pytest.mark.parametrize("thing", [None, "vit", nn.Linear], ids=str)
    def test_not_a_module(self, saved: Path, thing: Any) -> None:
        with pytest.raises(SparsiattnError, match=r"torch\.nn\.Module") as caught:
            load(thing, saved)
        assert isinstance(caught.value, TypeError)

    def test_model_that_is_patched(self, model: nn.Module, saved: Path) -> None:
        with untouched(model), patch(model, "topk", k=0.5) as live:
            with pytest.raises(sparsiattn.AlreadyPatched):
                load(model, saved)
            assert sparsiattn.patch_of(model) is live


class TestFiles:
    def test_missing_folder(self, model: nn.Module, tmp_path: Path) -> None:
        refused(model, tmp_path / "nowhere", "no saved patch", "nowhere")

    def test_empty_folder(self, model: nn.Module, tmp_path: Path) -> None:
        refused(model, tmp_path, "no saved patch", tmp_path.name)

    def test_file_instead_of_folder(self, model: nn.Module, saved: Path) -> None:
        refused(model, saved / CONFIG, "no saved patch")

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b'"text"', b"{}"],
        ids=["empty", "open brace", "not text", "null", "list", "number", "string", "no keys"],
    )
    def test_corrupted_json(self, model: nn.Module, saved: Path, content: bytes) -> None:
        (saved / CONFIG).write_bytes(content)
        assert isinstance(refused(model, saved, CONFIG), MismatchedPatch)

    @pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
    def test_truncated_safetensors(self, model: nn.Module, saved: Path, size: int) -> None:
        content = (saved / WEIGHTS).read_bytes()
        (saved / WEIGHTS).write_bytes(content[:size])
        assert isinstance(refused(model, saved, WEIGHTS), MismatchedPatch)

    def test_missing_safetensors(self, model: nn.Module, saved: Path) -> None:
        (saved / WEIGHTS).unlink()
        refused(model, saved, WEIGHTS)

    def test_pickle_in_place_of_safetensors_is_not_run(
        self, model: nn.Module, saved: Path, tmp_path: Path
    ) -> None:
        torch.save({f"{SITE}.down": torch.zeros(1)}, saved / WEIGHTS)
        refused(model, saved, WEIGHTS)


KEYS = ["format", "host", "strategy", "kernel", "input_shape", "sites", "schedule", "files"]
SITE_KEYS = ["k", "tokens", "heads", "head_dim", "dense"]


class TestConfig:
    @pytest.mark.parametrize("key", KEYS)
    def test_missing_key(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config.pop(key))
        refused(model, saved, repr(key))

    @pytest.mark.parametrize("key", ["name", "version", "options"])
    def test_missing_key_of_strategy(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config["strategy"].pop(key))
        refused(model, saved, repr(key))

    @pytest.mark.parametrize("key", SITE_KEYS)
    def test_missing_key_of_site(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config["sites"]["blocks.1.attn"].pop(key))
        refused(model, saved, "blocks.1.attn", repr(key))

    @pytest.mark.parametrize("key", ["class", "weights", "sha256"])
    def test_missing_key_of_host(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config["host"].pop(key))
        refused(model, saved, key)

    @pytest.mark.parametrize("key", KEYS)
    @pytest.mark.parametrize("value", [None, [], "text"], ids=repr)
    def test_value_of_the_wrong_type(
        self, model: nn.Module, saved: Path, key: str, value: Any
    ) -> None:
        edit(saved, lambda config: config.update({key: value}))
        refused(model, saved)

    @pytest.mark.parametrize("value", [None, [], "text"], ids=repr)
    def test_site_of_the_wrong_type(self, model: nn.Module, saved: Path, value: Any) -> None:
        edit(saved, lambda config: config["sites"].update({SITE: value}))
        refused(model, saved)

    def test_newer_format(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config.update(format=3))
        refused(model, saved, "format 3", "update sparsiattn")

    def test_newer_format_with_other_keys(self, model: nn.Module, saved: Path) -> None:
        (saved / CONFIG).write_text(json.dumps({"format": 3, "patches": []}))
        refused(model, saved, "format 3", "update sparsiattn")

    def test_other_version_of_the_strategy(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config["strategy"].update(version=2))
        refused(model, saved, "'connectivity'", "version 2", "version 1")

    def test_unknown_strategy(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config["strategy"].update(name="conectivity"))
        error = refused(model, saved, "'conectivity'", "Did you mean 'connectivity'")
        assert isinstance(error, LookupError)

    def test_unknown_option(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config["strategy"]["options"].update(channel=2))
        refused(model, saved, "'channel'", "channels")

    def test_unknown_kernel(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config.update(kernel="gahter"))
        refused(model, saved, "'gahter'", "'gather'")

    @pytest.mark.parametrize("k", [0, 1.5, True, "0.5", [0.5]], ids=repr)
    def test_budget_of_a_site(self, model: nn.Module, saved: Path, k: Any) -> None:
        edit(saved, lambda config: config["sites"][SITE].update(k=k))
        refused(model, saved, "float in (0, 1]")

    @pytest.mark.parametrize("key", ["tokens", "heads", "head_dim"])
    def test_other_attention(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config["sites"][SITE].update({key: 7}))
        refused(model, saved, SITE, key, "7")

    def test_site_that_the_model_lacks(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda c: c["sites"].update({"blocks.9.attn": c["sites"][SITE]}))
        refused(model, saved, "blocks.9.attn")

    def test_no_site(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config["sites"].clear())
        refused(model, saved)

    @pytest.mark.parametrize("shape", [[], [1], [1, 3, 0, 32], ["a"] * 4, [1, 3, 33, 33]], ids=str)
    def test_input_shape(self, model: nn.Module, saved: Path, shape: list[Any]) -> None:
        edit(saved, lambda config: config.update(input_shape=shape))
        with untouched(model), pytest.raises(SparsiattnError):
            load(model, saved)


class TestWeights:
    def test_missing(self, model: nn.Module, saved: Path) -> None:
        edit_weights(saved, lambda tensors: tensors.pop(f"{SITE}.up"))
        refused(model, saved, "missing", f"{SITE}.up")

    def test_extra(self, model: nn.Module, saved: Path) -> None:
        edit_weights(saved, lambda tensors: tensors.update({f"{SITE}.more": torch.zeros(2)}))
        refused(model, saved, "unexpected", f"{SITE}.more")

    def test_extra_for_a_strategy_without_weights(self, model: nn.Module, saved: Path) -> None:
        with patch(model, "topk", k=0.2) as live:
            live.save(saved)
        edit_weights(saved, lambda tensors: tensors.update({f"{SITE}.down": torch.zeros(2)}))
        refused(model, saved, "unexpected", f"{SITE}.down")

    @pytest.mark.parametrize("name", ["down", "up"])
    def test_wrong_shape(self, model: nn.Module, saved: Path, name: str) -> None:
        full = f"blocks.1.attn.{name}"
        edit_weights(saved, lambda tensors: tensors.update({full: torch.zeros(3, 5)}))
        refused(model, saved, repr(full), "(3, 5)")

    def test_saving_again_leaves_no_old_weights(self, model: nn.Module, saved: Path) -> None:
        with patch(model, "topk", k=0.2) as live:
            live.save(saved)
        assert safetensors.torch.load_file(saved / WEIGHTS) == {}
        load(model, saved).unpatch()
