"""Bad input to token strategies: one clear error each at patch time, and the model as it was.
Saved patches, schedules and third-party token strategies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import sparsiattn
from sparsiattn import InvalidOption, SparsiattnError
from sparsiattn.strategies import Hybrid, TokenDrop, TokenMerge
from tests.support import zoo
from tests.support.refusals import untouched


def refused(model: nn.Module, *says: str, **arguments: Any) -> SparsiattnError:
    with untouched(model, zoo.images(model)), pytest.raises(SparsiattnError) as caught:
        sparsiattn.patch(model, **arguments)
    for part in says:
        assert part in str(caught.value), str(caught.value)
    return caught.value


def bad(*says: str, **options: Any) -> Any:
    return pytest.param(options, says, id=",".join(f"{k}={v}" for k, v in options.items())[:60])


NAN = float("nan")
LAYERS = [[2], [0, 7], [1, 0], [0, 0], [], [-1], [True], [0.0], "0", 0, ["0"], {0: 1}]
KEEP = [0, -1, 0.0, -0.5, 1.5, NAN, True, False, "0.5", "all", float("inf"), [0.5, 0], (0.5, True)]
R = [-1, 8.0, True, "8", 0.5, NAN, [8, -1], [8, "8"], (8, NAN), [8, True], [0.5, 8]]


class TestLayers:
    @pytest.mark.parametrize("name", ["token_drop", "token_merge", "hybrid"])
    @pytest.mark.parametrize("layers", LAYERS, ids=str)
    def test_are_ascending_block_indices(self, name: str, layers: Any) -> None:
        refused(zoo.build("vit"), "layers must", strategy=name, layers=layers)

    def test_out_of_range_says_the_range_and_what_was_given(self) -> None:
        refused(zoo.build("vit"), "0..1", "[5]", strategy="token_drop", layers=[1, 5])


class TestDropOptions:
    @pytest.mark.parametrize("name", ["token_drop", "hybrid"])
    @pytest.mark.parametrize("keep", KEEP, ids=str)
    def test_keep_is_a_share_or_a_count(self, name: str, keep: Any) -> None:
        one = keep[1] if isinstance(keep, (list, tuple)) else keep
        refused(zoo.build("vit"), "keep", repr(one), strategy=name, keep=keep, layers=[0, 1])

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            bad("keep=65", "64 patch tokens", keep=65),
            bad("keep=1000", "64", keep=1000, layers=[1]),
            bad("keep=21", "20", keep=[20, 21], layers=[0, 1]),
            bad("one value per", "2", "3", keep=[0.5, 0.5, 0.5], layers=[0, 1]),
            bad("one value per", keep=[], layers=[0]),
            bad("score must be one of", "'mean_query'", "'attention'", score="attention"),
            bad("score", score=None),
            bad("score", score=["cls"]),
            bad("fuse must be True or False", "'yes'", fuse="yes"),
            bad("fuse", fuse=1),
            bad("fuse=True", "'norm'", fuse=True, score="norm"),
            bad("restore must be one of", "'pad'", restore="pad"),
            bad("restore", restore=True),
            bad("restore", restore=["auto"]),
            bad("mass", "keep='adaptive'", mass=0.9),
            bad("threshold", "keep='adaptive'", keep=0.5, threshold=1.0),
            bad("mass or threshold", keep="adaptive", mass=0.5, threshold=0.5),
            bad("mass must be", "0", keep="adaptive", mass=0),
            bad("mass must be", "1.1", keep="adaptive", mass=1.1),
            bad("mass must be", "nan", keep="adaptive", mass=NAN),
            bad("mass must be", "True", keep="adaptive", mass=True),
            bad("mass must be", "'0.9'", keep="adaptive", mass="0.9"),
            bad("threshold must be", "-1", keep="adaptive", threshold=-1),
            bad("threshold must be", "nan", keep="adaptive", threshold=NAN),
            bad("threshold must be", "True", keep="adaptive", threshold=True),
            bad("adaptive", keep=["adaptive", 0.5], layers=[0, 1]),
            bad("seed", seed="x", score="random"),
            bad("seed", seed=None, score="random"),
            bad("'no_such'", "keep", no_such=1),
        ],
    )
    def test_each_fault_is_named(self, options: dict[str, Any], says: tuple[str, ...]) -> None:
        refused(zoo.build("vit"), *says, strategy="token_drop", **options)

    @pytest.mark.parametrize("value", [0, 1.5, True, "half", None, 65])
    def test_callables_are_checked(self, value: Any) -> None:
        refused(zoo.build("vit"), "keep", strategy="token_drop", keep=lambda site: value)


class TestMergeOptions:
    @pytest.mark.parametrize("r", R, ids=str)
    def test_r_is_a_count(self, r: Any) -> None:
        refused(zoo.build("vit"), "r", strategy="token_merge", r=r)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            bad("r=33", "64 patch tokens", "half", r=33),
            bad("r=64", r=64),
            bad("one value per", "2", "3", r=[1, 2, 3]),
            bad("one value per", r=[]),
            bad("method must be one of", "'tome'", "'dpc'", method="dpc"),
            bad("method", method=None),
            bad("proportional must be True or False", proportional="no"),
            bad("only one of r and ratio", r=4, ratio=0.9),
            bad("ratio must be", "0.3", ratio=0.3),
            bad("ratio must be", ratio=1.5),
            bad("ratio must be", ratio=NAN),
            bad("ratio must be", ratio=True),
            bad("bsm must be", "'middle'", bsm="middle"),
            bad("restore must be", restore="pad"),
        ],
    )
    def test_each_fault_is_named(self, options: dict[str, Any], says: tuple[str, ...]) -> None:
        refused(zoo.build("vit"), *says, strategy="token_merge", **options)

    @pytest.mark.parametrize("value", [-1, 1.5, True, "8", None, 40])
    def test_callables_are_checked(self, value: Any) -> None:
        refused(zoo.build("vit"), "r", strategy="token_merge", r=lambda site: value)


class TestArguments:
    @pytest.mark.parametrize("name", ["token_drop", "token_merge"])
    def test_sites_and_k_belong_to_attention(self, name: str) -> None:
        refused(zoo.build("vit"), "layers", "blocks.0.*", strategy=name, sites="blocks.0.*")
        refused(zoo.build("vit"), "'k'", strategy=name, k=0.5)

    @pytest.mark.parametrize("config", [TokenDrop(), TokenMerge(), Hybrid()])
    def test_options_beside_an_object(self, config: Any) -> None:
        refused(zoo.build("vit"), "layers", "object", strategy=config, layers=[0])

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            bad("tokens must be", "'topk'", tokens="topk"),
            bad("attention must be", "'token_drop'", attention="token_drop"),
            bad("no_such", tokens="no_such"),
            bad("tokens", tokens=3),
            bad("token_merge", "keep", tokens="token_merge", keep=0.5),
            bad("k", k=0),
            bad("k", k=True),
        ],
    )
    def test_hybrid_parts(self, options: dict[str, Any], says: tuple[str, ...]) -> None:
        refused(zoo.build("vit"), *says, strategy="hybrid", **options)


class TestFamilies:
    @pytest.mark.parametrize("family", ["swin", "hiera", "samvit"])
    @pytest.mark.parametrize(
        "options",
        [
            {"strategy": "token_drop"},
            {"strategy": "token_drop", "score": "mean_query"},
            {"strategy": "token_drop", "score": "learned", "keep": "adaptive"},
            {"strategy": "token_merge"},
            {"strategy": "token_merge", "method": "pitome", "ratio": 0.9},
            {"strategy": "hybrid"},
        ],
        ids=str,
    )
    def test_hierarchies_name_the_alternative(self, family: str, options: dict[str, Any]) -> None:
        model = zoo.build(family)
        refused(model, type(model).__name__, "norm", "connectivity", **options)

    @pytest.mark.parametrize("family", ["eva_rope", "dinov3"])
    def test_adaptive_counts_need_blocks_without_rope(self, family: str) -> None:
        refused(
            zoo.build(family),
            "differ between images",
            "keep=0.7",
            strategy="token_drop",
            keep="adaptive",
        )


def _dense_host(kind: str) -> nn.Module:
    options: dict[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}
    if kind == "features_only":
        return timm.create_model("deit_tiny_patch16_224", features_only=True, **options).eval()
    name = {"eva": "eva02_tiny_patch14_224", "beit": "beit_base_patch16_224"}.get(
        kind, "deit_tiny_patch16_224"
    )
    if kind == "eva":
        options["img_size"] = 56
    return timm.create_model(name, num_classes=0, global_pool="", **options).eval()


DENSE = ["features_only", "no_pool", "eva", "beit"]
REDUCING = [
    ("token_drop", {"keep": 0.5, "layers": [0]}),
    ("token_merge", {"r": 3}),
    ("token_merge", {"method": "pitome", "ratio": 0.8}),
    ("hybrid", {"keep": 0.5, "layers": [0], "only_if_faster": False}),
]


@pytest.mark.parametrize(("name", "options"), REDUCING)
class TestDenseConsumers:
    @pytest.mark.parametrize("kind", DENSE)
    def test_restore_none_is_refused_at_patch_time(
        self, kind: str, name: str, options: dict[str, Any]
    ) -> None:
        model = _dense_host(kind)
        side = 56 if kind == "eva" else 64
        with pytest.raises(SparsiattnError, match="restore"):
            sparsiattn.patch(model, name, restore=None, input=(1, 3, side, side), **options)
        assert sparsiattn.patch_of(model) is None

    @pytest.mark.parametrize("kind", DENSE)
    def test_auto_gives_every_position_back(
        self, kind: str, name: str, options: dict[str, Any]
    ) -> None:
        model = _dense_host(kind)
        side = 56 if kind == "eva" else 64
        x = torch.randn(2, 3, side, side)
        with torch.no_grad():
            dense = tree_leaves(model(x))
            with sparsiattn.patch(model, name, input=(1, 3, side, side), **options):
                sparse = tree_leaves(model(x))
        assert [s.shape for s in sparse] == [d.shape for d in dense]
        assert any(not torch.equal(s, d) for s, d in zip(sparse, dense, strict=True))

    @pytest.mark.parametrize("method", ["forward_features", "forward_intermediates"])
    def test_methods_that_return_features(
        self, method: str, name: str, options: dict[str, Any]
    ) -> None:
        model = zoo.build("deit_distilled")
        x = zoo.images(model)
        with torch.no_grad():
            dense = model.forward_features(x)
            with sparsiattn.patch(model, name, restore=None, **options) as live:
                with pytest.raises(InvalidOption, match="restore='auto'"):
                    getattr(model, method)(x)
                with live.disabled():
                    assert torch.equal(model.forward_features(x), dense)
                logits = model(x)
                assert logits.shape == (2, 5)
            with sparsiattn.patch(model, name, **options):
                torch.testing.assert_close(model(x), logits)
                assert model.forward_features(x).shape == dense.shape
                maps = model.forward_intermediates(x, intermediates_only=True)
        assert [m.shape for m in maps] == [(2, 48, 8, 8)] * 2


SCHEDULES: dict[str, Any] = {
    "empty": {},
    "list": [1],
    "flat": {"blocks.0": 0.5},
    "kind": {"depth": {"0": 0.5}},
    "attention": {"k": {"blocks.0.attn": 0.5}},
    "not_a_mapping": {"keep": [0.5]},
    "unknown_block": {"keep": {"blocks.7": 0.5}},
    "index": {"keep": {"7": 0.5}},
    "site_not_block": {"keep": {"blocks.0.attn": 0.5}},
    "zero": {"keep": {"0": 0}},
    "text": {"keep": {"0": "0.5"}},
    "true": {"keep": {"0": True}},
    "none": {"keep": {"0": None}},
    "list_value": {"keep": {"0": [0.5]}},
    "nothing_in_it": {"keep": {}},
    "too_many": {"keep": {"0": 65}},
    "twice": {"keep": {"0": 0.5, "blocks.0": 0.4}},
}


class TestSchedules:
    @pytest.mark.parametrize("kind", SCHEDULES)
    @pytest.mark.parametrize("in_file", [False, True])
    def test_bad_ones(self, kind: str, in_file: bool, tmp_path: Path) -> None:
        schedule = SCHEDULES[kind]
        if in_file:
            (tmp_path / "s.json").write_text(json.dumps(schedule))
            schedule = tmp_path / "s.json"
        refused(zoo.build("vit"), strategy="token_drop", schedule=schedule)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3"])
    def test_files_that_hold_no_schedule(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "s.json").write_bytes(content)
        refused(zoo.build("vit"), "schedule", strategy="token_drop", schedule=tmp_path / "s.json")
        refused(zoo.build("vit"), "schedule", strategy="token_drop", schedule=tmp_path / "none")

    @pytest.mark.parametrize(
        ("name", "schedule"),
        [
            ("token_drop", {"keep": {"blocks.0": 0.5, "1": 10}}),
            ("token_merge", {"r": {"1": 5}}),
            ("hybrid", {"keep": {"1": 0.5}, "k": {"blocks.0.attn": 0.2}}),
        ],
    )
    def test_good_ones_resolve_into_the_saved_file(
        self, name: str, schedule: dict[str, Any], tmp_path: Path
    ) -> None:
        model = zoo.build("vit")
        x = zoo.images(model)
        (tmp_path / "s.json").write_text(json.dumps(schedule))
        with torch.no_grad():
            with sparsiattn.patch(model, name, schedule=tmp_path / "s.json") as live:
                sparse = model(x)
                live.save(tmp_path / "saved")
            text = (tmp_path / "saved" / "sparsiattn.json").read_text()
            assert '"layers": ' in text
            with sparsiattn.load(model, tmp_path / "saved") as again:
                assert torch.equal(model(x), sparse)
                again.save(tmp_path / "twice")
        assert (tmp_path / "twice" / "sparsiattn.json").read_text() == text


@pytest.mark.parametrize("strategy", ["token_drop", "token_merge", "hybrid"])
def test_images_that_share_a_sequence_keep_their_tokens(strategy: str) -> None:
    hosts_transformers = pytest.importorskip("tests.support.hosts_transformers")
    pytest.importorskip("transformers")
    model = next(make for name, make, _ in hosts_transformers.entries() if name == "pixtral")()
    with pytest.raises(InvalidOption, match="into one sequence"):
        sparsiattn.patch(model, strategy, input=(1, 3, 32, 32))
    assert sparsiattn.patch_of(model) is None
