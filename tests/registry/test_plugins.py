"""Plug-ins: found through entry points, kept apart from each other's faults."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsiattn
from sparsiattn import AttentionInputs, Pattern, PluginError, Strategy
from sparsiattn.registry import hookspecs, listing
from sparsiattn.registry.registry import PluginInfo, Registry
from sparsiattn.testing import StrategySuite
from sparsiattn.testing.hosts import tiny_images, tiny_vit
from sparsiattn.testing.plugin import temporary_plugin
from tests.support import plugins
from tests.support.plugins import (
    HEAD,
    MAKES,
    STRATEGIES,
    Install,
    assert_the_rest_works,
    fault,
    source,
    working,
)

install = plugins.install
TAKEN = {
    "sparsiattn_strategies": "topk",
    "sparsiattn_kernels": "gather",
    "sparsiattn_backbones": "timm_vit",
}


def kind_of(hook: str) -> str:
    return hook.removeprefix("sparsiattn_")


def test_every_hook_has_its_tests() -> None:
    """Tests below run over `MAKES`: a new hook must be added to it."""
    hooks = {name for name, thing in vars(hookspecs).items() if hasattr(thing, "sparsiattn_spec")}
    assert hooks == set(MAKES) == set(TAKEN)


def broken(registry: Registry) -> list[str]:
    return [info.name for info in registry.plugins() if info.broken]


@pytest.mark.parametrize("hook", MAKES)
class TestEveryHook:
    def test_good(self, install: Install, hook: str) -> None:
        install("fine-dist", fine=source(hook, "mine"))
        registry = Registry()
        thing = registry.get(kind_of(hook), "mine")
        assert thing is sys.modules["fake_fine_dist_fine"].mine
        # the generic backbone takes every model, so others are asked before the built-ins
        place = 0 if kind_of(hook) == "backbones" else -1
        assert list(registry.all(kind_of(hook)))[place] == "mine"
        assert working(registry, "fine") == PluginInfo("fine", "fine-dist", ("mine",))
        assert registry.plugin_of(kind_of(hook), "mine") == "fine"
        assert broken(registry) == []

    def test_hook_raises(self, install: Install, hook: str) -> None:
        install("bad-dist", bad=source(hook, "mine", "1 / 0"))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert isinstance(fault(registry, "bad"), ZeroDivisionError)
        assert "mine" not in registry.all(kind_of(hook))
        assert_the_rest_works(registry)

    @pytest.mark.parametrize(
        "result",
        ["3", "'mine'", "[3]", "['mine']", "mine", "[None]", "[object]", "{'mine': mine}"],
    )  # fmt: skip
    def test_wrong_type(self, install: Install, hook: str, result: str) -> None:
        install("bad-dist", bad=source(hook, "mine", result))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert isinstance(fault(registry, "bad"), (PluginError, TypeError))
        assert "mine" not in registry.all(kind_of(hook))
        assert_the_rest_works(registry)

    def test_forgotten_return(self, install: Install, hook: str) -> None:
        """Law 10; pluggy drops None on its own, so nobody would notice."""
        install("bad-dist", bad=source(hook, "mine", "None"))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert hook in str(fault(registry, "bad"))
        assert_the_rest_works(registry)

    def test_without_a_name(self, install: Install, hook: str) -> None:
        install("bad-dist", bad=source(hook, ""))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert "with a name" in str(fault(registry, "bad"))
        assert_the_rest_works(registry)

    def test_name_taken_by_a_builtin(self, install: Install, hook: str) -> None:
        name = TAKEN[hook]
        builtin = Registry().get(kind_of(hook), name)
        install("bad-dist", bad=source(hook, name))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert type(registry.get(kind_of(hook), name)) is type(builtin)
        assert "sparsiattn" in registry.plugin_of(kind_of(hook), name)
        for part in (repr(name), "bad-dist", "(sparsiattn)", "choose another name"):
            assert part in str(fault(registry, "bad"))
        assert_the_rest_works(registry)

    def test_two_plugins_with_one_name(self, install: Install, hook: str) -> None:
        install("first-dist", aaa=source(hook, "mine"))
        install("second-dist", bbb=source(hook, "mine"))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        thing = registry.get(kind_of(hook), "mine")
        assert thing is sys.modules["fake_first_dist_aaa"].mine
        assert working(registry, "aaa").provides == ("mine",)
        for part in ("'mine'", "second-dist", "first-dist", "'aaa'", "'bbb'"):
            assert part in str(fault(registry, "bbb", "second-dist"))
        assert_the_rest_works(registry)

    def test_broken_one_is_listed_once(self, install: Install, hook: str) -> None:
        """Also if one of its things works: not as fine and as broken side by side."""
        install("half-dist", half=source(hook, "mine", "[mine, 3]"))
        registry = Registry()
        assert isinstance(fault(registry, "half", "half-dist"), PluginError)
        (info,) = [info for info in registry.plugins() if info.name == "half"]
        assert ("mine" in info.provides) == ("mine" in registry.all(kind_of(hook)))

    def test_temporary(self, hook: str) -> None:
        thing = _made(hook, "passing")
        kind = kind_of(hook)
        before = sparsiattn.list_plugins()
        with temporary_plugin(**{kind: [thing]}, name="passer"):
            assert getattr(sparsiattn, f"list_{kind}")()["passing"].plugin == "passer"
            assert "reference" in sparsiattn.list_kernels()
            assert "topk" in sparsiattn.list_strategies()
            assert "generic" in sparsiattn.list_backbones()
            assert [info.name for info in sparsiattn.list_plugins().values() if info.broken] == []
        assert "passing" not in getattr(sparsiattn, f"list_{kind}")()
        assert sparsiattn.list_plugins() == before


def _made(hook: str, name: str) -> object:
    scope: dict[str, object] = {"__name__": __name__}
    exec(HEAD + MAKES[hook].replace("NAME", name), scope)
    return scope["mine"]


class TestImport:
    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("raise RuntimeError('on purpose')", RuntimeError),
            ("import no_such_module_anywhere", ModuleNotFoundError),
            ("from sparsiattn import NoSuchName", ImportError),
            ("def (:", SyntaxError),
            ("raise SystemExit('leaving')", SystemExit),
        ],
        ids=["raises", "missing module", "missing name", "syntax", "exits"],
    )
    def test_fault(self, install: Install, text: str, error: type[BaseException]) -> None:
        install("bad-dist", bad=text)
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert isinstance(fault(registry, "bad"), error)

    def test_missing_attribute(self, install: Install) -> None:
        install("bad-dist", bad="", value=":plugin")
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert isinstance(fault(registry, "bad"), AttributeError)

    def test_missing_module_file(self, install: Install, tmp_path: Path) -> None:
        install("bad-dist", bad="")
        (tmp_path / "bad-dist" / "fake_bad_dist_bad.py").unlink()
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert isinstance(fault(registry, "bad"), ModuleNotFoundError)

    def test_nothing_is_imported_before_the_first_look_up(self, install: Install) -> None:
        install("fine-dist", fine=source(STRATEGIES, "mine"))
        registry = Registry()
        assert "fake_fine_dist_fine" not in sys.modules
        registry.all("kernels")
        assert "fake_fine_dist_fine" in sys.modules

    def test_a_fault_is_not_tried_again(self, install: Install) -> None:
        install("bad-dist", bad="import sys\nsys.tries = getattr(sys, 'tries', 0) + 1\n1 / 0")
        registry = Registry()
        try:
            for _ in range(3):
                registry.all("kernels")
                assert isinstance(fault(registry, "bad"), ZeroDivisionError)
            assert sys.tries == 1  # type: ignore[attr-defined]
        finally:
            del sys.tries  # type: ignore[attr-defined]

    @pytest.mark.parametrize("made", ["SimpleNamespace", "Fields"])
    def test_plugin_object_that_cannot_be_hashed(self, install: Install, made: str) -> None:
        """An entry point may name an object, and those with __eq__ alone are unhashable."""
        text = source(STRATEGIES, "mine") + (
            "from types import SimpleNamespace\n"
            "@dataclass\nclass Fields:\n    sparsiattn_strategies: object\n"
            f"plugin = {made}(sparsiattn_strategies=sparsiattn_strategies)\n"
        )
        install("fine-dist", fine=text, value=":plugin")
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert broken(registry) == []
        assert "mine" in registry.all("strategies")


class TestHookNames:
    @pytest.mark.parametrize("name", ["sparsiattn_strategy", "sparsiattn_kernel", "sparsiattn_x"])
    def test_misspelt(self, install: Install, name: str) -> None:
        install("bad-dist", bad=f"{HEAD}\n@hookimpl\ndef {name}():\n    return []\n")
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert name in str(fault(registry, "bad"))

    def test_misspelt_beside_a_right_one(self, install: Install) -> None:
        wrong = "\n@hookimpl\ndef sparsiattn_kernel():\n    return []\n"
        install("bad-dist", bad=source(STRATEGIES, "mine") + wrong)
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert "sparsiattn_kernel" in str(fault(registry, "bad"))
        assert "mine" not in registry.all("strategies")

    def test_argument_that_no_hook_has(self, install: Install) -> None:
        wrong = source(STRATEGIES, "mine").replace("strategies():", "strategies(config):")
        install("bad-dist", bad=wrong)
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert "config" in str(fault(registry, "bad"))
        assert "mine" not in registry.all("strategies")

    def test_forgotten_hookimpl_is_not_silent(self, install: Install) -> None:
        """Law 10: a plug-in without a single hook must not pass for a working one."""
        install("bad-dist", bad=source(STRATEGIES, "mine").replace("@hookimpl", ""))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert "hookimpl" in str(fault(registry, "bad"))


class TestStrategyClasses:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("@dataclass(frozen=True)", "@dataclass"),
            ("@dataclass(frozen=True)", ""),
            ("(Strategy)", ""),
            ("mine = Mine", "mine = Mine()"),
            ('name = "mine"', "name = 3"),
        ],
        ids=["not frozen", "not a dataclass", "not a Strategy", "an instance", "name is no text"],
    )
    def test_refused(self, install: Install, old: str, new: str) -> None:
        text = source(STRATEGIES, "mine")
        assert old in text
        install("bad-dist", bad=text.replace(old, new))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert "frozen dataclass" in str(fault(registry, "bad"))
        assert "mine" not in registry.all("strategies")


class TestEntryPointNames:
    def test_two_distributions_with_one_entry_point_name(
        self, install: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install("one-dist", same=source(STRATEGIES, "mine"))
        install("two-dist", same=source(STRATEGIES, "other"))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        both = [info for info in registry.plugins() if info.name == "same"]
        assert [info.broken for info in both] == [False, True]
        assert {info.distribution for info in both} == {"one-dist", "two-dist"}
        for part in ("'same'", "one-dist", "two-dist"):
            assert part in str(both[1].error)
        assert len({"mine", "other"} & set(registry.all("strategies"))) == 1
        monkeypatch.setattr(listing, "REGISTRY", registry)
        assert {"same", f"same ({both[1].distribution})"} <= set(listing.list_plugins())

    def test_entry_point_named_like_a_builtin(self, install: Install, tmp_path: Path) -> None:
        install("bad-dist", bad=source(STRATEGIES, "mine"))
        points = tmp_path / "bad-dist" / "bad_dist-1.0.dist-info" / "entry_points.txt"
        points.write_text("[sparsiattn]\nsparsiattn.kernels = fake_bad_dist_bad\n")
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        assert_the_rest_works(registry)
        assert "sparsiattn.kernels" in str(fault(registry, "sparsiattn.kernels"))
        assert "mine" not in registry.all("strategies")

    def test_one_distribution_with_two_entry_points(self, install: Install) -> None:
        entries = {name: source(STRATEGIES, name) for name in ("good", "better")}
        install("good-dist", **entries)
        registry = Registry()
        assert_the_rest_works(registry)
        assert working(registry, "better").distribution == "good-dist"


class TestFilter:
    @pytest.mark.parametrize(
        ("value", "there"),
        [
            (None, "abc"),
            ("", ""),
            ("  ", ""),
            (",", ""),
            ("a", "a"),
            ("a,b", "ab"),
            (" b , a ,", "ab"),
            ("-a", "bc"),
            ("-a,-c", "b"),
            ("nobody", ""),
            ("-nobody", "abc"),
        ],
    )
    def test_value(
        self, install: Install, monkeypatch: pytest.MonkeyPatch, value: str | None, there: str
    ) -> None:
        install("abc-dist", **{name: source(STRATEGIES, f"mine-{name}") for name in "abc"})
        if value is not None:
            monkeypatch.setenv("SPARSIATTN_PLUGINS", value)
        registry = Registry()
        found = [name for name in registry.all("strategies") if name.startswith("mine-")]
        assert found == [f"mine-{name}" for name in there]
        listing = [info for info in registry.plugins() if info.distribution == "abc-dist"]
        assert [info.name for info in listing] == list(there)
        assert "topk" in registry.all("strategies")
        loaded = [name for name in "abc" if f"fake_abc_dist_{name}" in sys.modules]
        assert loaded == list(there), "a plug-in that is filtered out is not even imported"

    def test_a_broken_plugin_can_be_left_out(
        self, install: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install("bad-dist", bad="1 / 0")
        install("good-dist", good=source(STRATEGIES, "good"))
        monkeypatch.setenv("SPARSIATTN_PLUGINS", "-bad")
        registry = Registry()
        assert_the_rest_works(registry)
        assert broken(registry) == []


@dataclass(frozen=True)
class Nearest(Strategy):
    """Each query attends to its k nearest keys by cosine."""

    name = "nearest"
    k: float = 0.1

    def plan(self, inputs: AttentionInputs) -> Pattern:
        scores = normalize(inputs.q, dim=-1) @ normalize(inputs.k, dim=-1).mT
        return Pattern.top(scores, self.k)


@pytest.fixture
def nearest() -> Iterator[None]:
    with temporary_plugin(strategies=[Nearest]):
        yield


@pytest.mark.usefixtures("nearest")
class TestNearest(StrategySuite):
    """The plug-in of design section 8, complete."""

    strategy = Nearest(k=0.2)


@pytest.mark.usefixtures("nearest")
class TestNearestTilesBackground(StrategySuite):
    strategy = Nearest(k=0.2, tile=(2, 2), background=2)


@pytest.mark.usefixtures("nearest")
class TestNearestByName:
    def test_patch(self) -> None:
        model, x = tiny_vit(), tiny_images()
        with torch.no_grad():
            dense = model(x)
            with sparsiattn.patch(model, "nearest", k=0.2, tile=(2, 2), background=2) as live:
                assert live.strategy == Nearest(k=0.2, tile=(2, 2), background=2)
                assert not torch.equal(model(x), dense)
                assert "nearest" in str(live.report())
            assert torch.equal(model(x), dense)

    def test_listed(self) -> None:
        info = sparsiattn.list_strategies()["nearest"]
        assert info.summary == "Each query attends to its k nearest keys by cosine."
        assert info.plugin == "temporary"
        assert info.usable

    def test_tiles_and_background_are_the_core_s_work(self) -> None:
        """The same keys for a whole tile, CLS column always kept, budget exact."""
        model, x = tiny_vit(), tiny_images()
        seen: list[Tensor] = []

        def look(site: sparsiattn.Site, planner: object, inputs: AttentionInputs) -> None:
            runtime = live.runtimes[site.index]
            assert callable(planner)
            pattern = runtime.finish(
                planner(inputs.replace(tile=(2, 2))), inputs.replace(tile=(2, 2))
            )
            assert pattern.summary is not None
            assert pattern.summary.count == 4
            seen.append(pattern.to_mask()[:, :, 1:])

        with torch.no_grad(), sparsiattn.patch(
            model, "nearest", k=0.2, tile=(2, 2), background=2
        ) as live, live.observing(look):  # fmt: skip
            model(x)
        assert len(seen) == 2
        for mask in seen:
            assert mask[..., 0].all()
            assert (mask.sum(-1) == 13).all()  # ceil(0.2 * 65)
            square = mask.unflatten(2, (4, 2, 4, 2))
            assert torch.equal(square, square[:, :, :, :1, :, :1].expand_as(square))

    def test_save_and_load(self, tmp_path: Path) -> None:
        model, twin, x = tiny_vit(), tiny_vit(), tiny_images()
        with torch.no_grad(), sparsiattn.patch(model, "nearest", k=0.2, tile=(2, 2)) as live:
            sparse = model(x)
            sparsiattn.load(twin, live.save(tmp_path))
            assert torch.equal(twin(x), sparse)


def test_saved_patch_of_a_plugin_that_is_gone(tmp_path: Path) -> None:
    model = tiny_vit()
    with temporary_plugin(strategies=[Nearest]), sparsiattn.patch(model, "nearest") as live:
        live.save(tmp_path)
    with pytest.raises(sparsiattn.UnknownName, match="'nearest'"):
        sparsiattn.load(model, tmp_path)
    assert sparsiattn.patch_of(model) is None
