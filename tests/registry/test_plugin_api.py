"""The version of the plug-in API, and faults that a plug-in may show after it was loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsiattn
from sparsiattn import Kernel, Pattern, PluginError
from sparsiattn.cli.list import contents
from sparsiattn.kernels.base import choose
from sparsiattn.kernels.reference import Reference
from sparsiattn.registry import plugin_api
from sparsiattn.registry.registry import Registry
from sparsiattn.testing import temporary_plugin
from sparsiattn.testing.hosts import random_inputs, tiny_images, tiny_vit
from tests.support import ROOT, plugins
from tests.support.plugins import HEAD, STRATEGIES, Install, source

install = plugins.install

LATER = "\n@hookimpl\ndef sparsiattn_recipes():\n    return []\n"
MAJOR, MINOR = sparsiattn.PLUGIN_API


def states(api: object) -> str:
    return source(STRATEGIES, "mine") + f"\nSPARSIATTN_API = {api!r}\n"


class TestVersion:
    @pytest.mark.parametrize("api", [(MAJOR, MINOR), [MAJOR, MINOR], plugin_api.OLDEST])
    def test_accepted(self, install: Install, api: object) -> None:
        install("fine-dist", fine=states(api))
        info = plugins.working(Registry(), "fine")
        assert info.api == tuple(api)  # type: ignore[arg-type]
        assert info.provides == ("mine",)
        assert info.deprecation == ""

    def test_none_is_the_oldest(self, install: Install) -> None:
        install("fine-dist", fine=source(STRATEGIES, "mine"))
        assert plugins.working(Registry(), "fine").api == plugin_api.OLDEST

    @pytest.mark.parametrize("api", [(MAJOR, MINOR + 1), (MAJOR + 1, 0)])
    def test_newer_is_refused_and_says_what_to_upgrade(
        self, install: Install, api: tuple[int, int]
    ) -> None:
        """Also where it implements a hook that does not exist yet: that is not a misspelt one."""
        install("bad-dist", bad=states(api) + LATER)
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        plugins.assert_the_rest_works(registry)
        said = str(plugins.fault(registry, "bad"))
        assert f"needs plug-in API {api[0]}.{api[1]}" in said
        assert "upgrade sparsiattn" in said
        assert "mine" not in registry.all("strategies")

    def test_older_than_the_oldest_is_refused(self, install: Install) -> None:
        install("bad-dist", bad=states((0, 9)))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        plugins.assert_the_rest_works(registry)
        assert "upgrade the plug-in" in str(plugins.fault(registry, "bad"))

    @pytest.mark.parametrize("api", ["1.0", 1, (1,), (1, 0, 0), (True, 0), None, (1.0, 0)])
    def test_garbage_is_refused(self, install: Install, api: object) -> None:
        install("bad-dist", bad=states(api))
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        plugins.assert_the_rest_works(registry)
        assert "pair of ints" in str(plugins.fault(registry, "bad"))

    def test_earlier_major_version_works_and_is_told(
        self, install: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plugin_api, "deprecation", lambda api: f"{api} goes")
        install("fine-dist", fine=states((1, 0)))
        registry = Registry()
        assert plugins.working(registry, "fine").deprecation == "(1, 0) goes"
        monkeypatch.setattr("sparsiattn.registry.listing.REGISTRY", registry)
        (row,) = [row for row in contents()["plugins"] if row["name"] == "fine"]
        assert row["status"] == "working; (1, 0) goes"

    def test_later_hook_may_be_optional(self, install: Install) -> None:
        """How one plug-in serves this version and one with more hooks."""
        optional = LATER.replace("@hookimpl", "@hookimpl(optionalhook=True)")
        install("fine-dist", fine=source(STRATEGIES, "mine") + optional)
        assert plugins.working(Registry(), "fine").provides == ("mine",)


def test_policy_is_written_down() -> None:
    page = ROOT / "docs" / "extend.md"
    for word in (plugin_api.ATTRIBUTE, "PLUGIN_API", "deprecat"):
        assert word in page.read_text()


class TestHooksThatLeave:
    @pytest.mark.parametrize("hook", plugins.MAKES)
    def test_hook_exits(self, install: Install, hook: str) -> None:
        body = source(hook, "mine").replace("return [mine]", "raise SystemExit(3)")
        install("bad-dist", bad=body)
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        plugins.assert_the_rest_works(registry)
        assert isinstance(plugins.fault(registry, "bad"), SystemExit)

    def test_thing_that_cannot_be_shown(self, install: Install) -> None:
        shy = "class Shy:\n    def __repr__(self):\n        raise ValueError('no')\n"
        hook = "@hookimpl\ndef sparsiattn_kernels():\n    return [Shy()]\n"
        install("bad-dist", bad=HEAD + shy + hook)
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        plugins.assert_the_rest_works(registry)
        assert plugins.fault(registry, "bad") is not None


def test_unreadable_entry_points_hide_no_others(install: Install, tmp_path: Path) -> None:
    install("bad-dist", bad=source(STRATEGIES, "mine"))
    (tmp_path / "bad-dist" / "bad_dist-1.0.dist-info" / "entry_points.txt").write_text(
        "[console_scripts]\nno equals sign\n"
    )
    install("good-dist", good=source(STRATEGIES, "good"))
    with pytest.warns(RuntimeWarning, match="bad-dist cannot be read"):
        plugins.assert_the_rest_works(Registry())


class Faulty(Kernel):
    """Raises whatever it is asked."""

    name = "faulty"

    def why_unavailable(self) -> list[str]:
        raise OSError("libnothing.so")


class TestFaultyKernel:
    def test_is_listed_with_its_fault(self) -> None:
        with temporary_plugin(kernels=[Faulty()]):
            info = sparsiattn.kernels()["faulty"]
            assert not info.usable
            assert "libnothing.so" in info.reasons[0]

    def test_auto_passes_it_over(self) -> None:
        model, x = tiny_vit(), tiny_images()
        with torch.no_grad():
            with sparsiattn.patch(model, "topk", k=0.25):
                exact = model(x)
            with temporary_plugin(kernels=[Faulty()]), sparsiattn.patch(model, "topk", k=0.25):
                assert torch.equal(model(x), exact)

    def test_by_name_its_fault_is_the_answer(self) -> None:
        inputs, pattern = random_inputs(), Pattern.dense(17, 17)
        with pytest.raises(OSError, match="libnothing"):
            choose([Faulty()], inputs, pattern, explicit=True)
        chosen = choose([Faulty(), Reference()], inputs, pattern, explicit=False)
        assert chosen.kernel.name == "reference"
        assert "libnothing" in str(chosen.refusals)


def test_temporary_plugin_does_not_hide_its_fault() -> None:
    class Other(Kernel):
        name = "reference"

    with pytest.raises(PluginError, match="is taken by"), temporary_plugin(kernels=[Other()]):
        pytest.fail("the block must not run")
    assert isinstance(sparsiattn.registry.registry.REGISTRY.get("kernels", "reference"), Reference)
