"""The public interface as plain data: names, signatures, options, commands, hooks.

    python tests/project/api_snapshot.py    # writes tests/project/api.json again

`test_api.py` compares. Under semantic versioning what is gone or changed needs a new major version
(before 1.0 a new minor one) and a line in the changelog; what is new needs a new minor one.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any, get_origin

import typer

import sparsiattn
from sparsiattn.cli import app
from sparsiattn.registry import hookspecs
from sparsiattn.registry.registry import REGISTRY

FILE = Path(__file__).with_name("api.json")


def snapshot() -> dict[str, Any]:
    return {
        "names": {
            name: _described(getattr(sparsiattn, name)) for name in sorted(sparsiattn.__all__)
        },
        "strategies": {
            name: _options(REGISTRY.get("strategies", name)) for name in _ours("strategies")
        },
        "kernels": _ours("kernels"),
        "backbones": _ours("backbones"),
        "hooks": sorted(name for name in vars(hookspecs) if name.startswith("sparsiattn_")),
        "commands": _commands(),
    }


def _ours(kind: str) -> list[str]:
    """What comes along; plug-ins of others may be installed."""
    listed = getattr(sparsiattn, f"list_{kind}")()
    return sorted(name for name, info in listed.items() if info.plugin.startswith("sparsiattn"))


def _described(thing: Any) -> Any:
    if get_origin(thing) is not None:  # tuple[int, int] and the like
        return str(thing)
    if inspect.isclass(thing):
        return {"bases": _bases(thing), "init": _signature(thing), "has": _members(thing)}
    return _signature(thing) if callable(thing) else type(thing).__name__


def _bases(kind: type) -> list[str]:
    """Ancestors that users may catch or ask for."""
    return [base.__name__ for base in kind.__mro__[1:] if base.__name__ in sparsiattn.__all__]


def _members(kind: type) -> dict[str, str]:
    found = {}
    for name in sorted(n for n in dir(kind) if not n.startswith("_")):
        thing = inspect.getattr_static(kind, name)
        home = next(base for base in kind.__mro__ if name in vars(base))
        if home.__module__.startswith("sparsiattn"):
            plain = getattr(thing, "__func__", thing)
            found[name] = _signature(plain) if inspect.isfunction(plain) else "value"
    if dataclasses.is_dataclass(kind):
        found |= {one.name: "field" for one in dataclasses.fields(kind)}
    return found


def _signature(thing: Any) -> str:
    """Names, order and defaults; annotations may be said in other words."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return "callable"
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in parameters]
    text = str(inspect.Signature(bare))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _options(kind: Any) -> dict[str, str]:
    return {one.name: _default(one) for one in dataclasses.fields(kind)}


def _default(one: Any) -> str:
    if one.default is not dataclasses.MISSING:
        return repr(one.default)
    return "required" if one.default_factory is dataclasses.MISSING else repr(one.default_factory())


def _commands() -> dict[str, list[str]]:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: sorted(text for one in command.params for text in (*one.opts, *one.secondary_opts))
        for name, command in sorted(commands.items())
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(snapshot(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {FILE.name}")
