"""The version of the plug-in API, and faults that a plug-in may show after it was loaded."""

from __future__ import annotations

import pytest
import torch

import sparsiattn
from sparsiattn import Kernel, Pattern, PluginError
from sparsiattn.kernels import Reference, choose
from sparsiattn.registry import Registry
from sparsiattn.testing import random_inputs, temporary_plugin, tiny_images, tiny_vit
from tests.support import ROOT, plugins
from tests.support.plugins import HEAD, STRATEGIES, Install, source

install = plugins.install

LATER = "\n@hookimpl\ndef sparsiattn_recipes():\n    return []\n"
MAJOR, MINOR = sparsiattn.PLUGIN_API


def states(api: object) -> str:
    return source(STRATEGIES, "mine") + f"\nSPARSIATTN_API = {api!r}\n"


class TestVersion:
    @pytest.mark.parametrize("api", [(MAJOR, MINOR), [MAJOR, MINOR]])
    def test_accepted(self, install: Install, api: object) -> None:
        install("fine-dist", fine=states(api))
        assert plugins.working(Registry(), "fine").provides == ("mine",)

    @pytest.mark.parametrize(
        "api", [(MAJOR, MINOR + 1), (MAJOR + 1, 0), (MAJOR - 1, 9), "1.0", 1, (1,), (1, 0, 0), None]
    )
    def test_another_version_is_refused(self, install: Install, api: object) -> None:
        """Also where it implements a hook that does not exist yet: that is not a misspelt one."""
        install("bad-dist", bad=states(api) + LATER)
        install("good-dist", good=source(STRATEGIES, "good"))
        registry = Registry()
        plugins.assert_the_rest_works(registry)
        message = str(plugins.fault(registry, "bad"))
        assert f"needs plug-in API {api!r} (SPARSIATTN_API)" in message
        assert f"this sparsiattn has {sparsiattn.PLUGIN_API}: upgrade" in message
        assert "mine" not in registry.all("strategies")

    def test_later_hook_may_be_optional(self, install: Install) -> None:
        """How one plug-in serves this version and one with more hooks."""
        optional = LATER.replace("@hookimpl", "@hookimpl(optionalhook=True)")
        install("fine-dist", fine=source(STRATEGIES, "mine") + optional)
        assert plugins.working(Registry(), "fine").provides == ("mine",)


def test_policy_is_written_down() -> None:
    page = ROOT / "docs" / "tutorials" / "plugin.md"
    for word in ("SPARSIATTN_API", "PLUGIN_API", "deprecat"):
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


class Faulty(Kernel):
    """Raises whatever it is asked."""

    name = "faulty"

    def why_unavailable(self) -> list[str]:
        raise OSError("libnothing.so")


class TestFaultyKernel:
    def test_is_listed_with_its_fault(self) -> None:
        with temporary_plugin(kernels=[Faulty()]):
            info = sparsiattn.list_kernels()["faulty"]
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
