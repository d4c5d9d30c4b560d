"""Plug-ins as text, put on the path as distributions, and what the registry makes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsiattn.registry import PluginInfo, Registry
from sparsiattn.strategies import TopK

HEAD = """
from dataclasses import dataclass
from sparsiattn import Backbone, Kernel, Pattern, Strategy, hookimpl
"""

# One thing of every kind; `NAME` is put in.
MAKES = {
    "sparsiattn_strategies": """
@dataclass(frozen=True)
class Mine(Strategy):
    name = "NAME"
    k: float = 0.1
mine = Mine
""",
    "sparsiattn_kernels": """
class Mine(Kernel):
    name = "NAME"
mine = Mine()
""",
    "sparsiattn_backbones": """
class Mine(Backbone):
    name = "NAME"
    def why_not(self, model):
        return ["never fits"]
mine = Mine()
""",
}
STRATEGIES = "sparsiattn_strategies"
Install = Callable[..., None]


def source(hook: str, name: str, result: str = "[mine]") -> str:
    """A plug-in that implements one hook."""
    made = MAKES[hook].replace("NAME", name)
    return f"{HEAD}{made}\n@hookimpl\ndef {hook}():\n    return {result}\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install("dist", entry="source of its module")`` puts a distribution on the path."""
    monkeypatch.delenv("SPARSIATTN_PLUGINS", raising=False)
    modules: list[str] = []

    def make(distribution: str, *, value: str = "", **entries: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        lines = ["[sparsiattn]"]
        for entry, text in entries.items():
            module = f"fake_{distribution.replace('-', '_')}_{entry}"
            (site / f"{module}.py").write_text(text)
            modules.append(module)
            lines.append(f"{entry} = {module}{value}")
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(site))

    yield make
    for module in modules:
        sys.modules.pop(module, None)


def kind_of(hook: str) -> str:
    return hook.removeprefix("sparsiattn_")


def broken(registry: Registry) -> list[str]:
    return [info.name for info in registry.plugins() if info.broken]


def working(registry: Registry, name: str) -> PluginInfo:
    (info,) = [info for info in registry.plugins() if info.name == name]
    assert not info.broken, info
    return info


def fault(registry: Registry, name: str, distribution: str = "bad-dist") -> BaseException:
    """The error that broke a plug-in."""
    (info,) = [info for info in registry.plugins() if info.name == name and info.broken]
    assert info.distribution == distribution
    assert info.error is not None
    return info.error


def assert_the_rest_works(registry: Registry) -> None:
    """Built-ins and the plug-in ``good`` are there whatever the others do."""
    for kind, names in (
        ("strategies", ["dense", "topk", "random", "local", "connectivity"]),
        ("kernels", ["reference", "sdpa", "gather"]),
        ("backbones", ["timm_vit", "generic"]),
    ):
        assert set(names) <= set(registry.all(kind))
    assert registry.get("strategies", "good") is not TopK
    assert registry.get("strategies", "topk") is TopK
    assert working(registry, "good") == PluginInfo("good", "good-dist", ("good",))
