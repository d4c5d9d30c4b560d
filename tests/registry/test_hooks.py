"""Every hook: what plug-ins return through it, well and wrongly."""

from __future__ import annotations

import sys

import pytest

import sparsiattn
from sparsiattn import PluginError
from sparsiattn.registry import PluginInfo, Registry, hookspecs
from sparsiattn.testing import temporary_plugin
from tests.support import plugins
from tests.support.plugins import (
    HEAD,
    MAKES,
    STRATEGIES,
    Install,
    assert_the_rest_works,
    broken,
    fault,
    kind_of,
    source,
    working,
)

install = plugins.install


TAKEN = {
    "sparsiattn_strategies": "topk",
    "sparsiattn_kernels": "gather",
    "sparsiattn_backbones": "timm_vit",
}


def test_every_hook_has_its_tests() -> None:
    """Tests below run over `MAKES`: a new hook must be added to it."""
    hooks = {name for name, thing in vars(hookspecs).items() if hasattr(thing, "sparsiattn_spec")}
    assert hooks == set(MAKES) == set(TAKEN)


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
