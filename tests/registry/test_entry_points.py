"""Entry points: imports that fail, names that clash, plug-ins that are left out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparsiattn.registry import Registry, listing
from tests.support import plugins
from tests.support.plugins import (
    STRATEGIES,
    Install,
    assert_the_rest_works,
    broken,
    fault,
    source,
    working,
)

install = plugins.install


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
