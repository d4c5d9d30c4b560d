"""Semantic versioning: the public interface is what was written down."""

from __future__ import annotations

import json
from typing import Any

from tests.project.api_snapshot import FILE, snapshot

ADVICE = (
    "if that is meant, run `python tests/project/api_snapshot.py` and say it in CHANGELOG.md: what "
    "is gone or changed needs a new major version (before 1.0 a minor one), what is new a minor one"
)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, list) and isinstance(now, list):
        before, now = (dict.fromkeys(items, "") for items in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        gone = [f"gone: {name}{key}" for key in before if key not in now]
        new = [f"new: {name}{key}" for key in now if key not in before]
        pairs = [(before[key], now[key], f"{name}{key}.") for key in before if key in now]
        return gone + new + [line for pair in pairs for line in differences(*pair)]
    return [] if before == now else [f"changed: {name[:-1]} from {before!r} to {now!r}"]


def test_the_public_interface_is_the_one_written_down() -> None:
    found = differences(json.loads(FILE.read_text(encoding="utf-8")), snapshot())
    assert not found, "\n".join([*found, ADVICE])


def test_differences_are_seen() -> None:
    before = {"names": {"patch": "(model, k=None)", "old": "()"}, "hooks": ["a", "b"]}
    now = {"names": {"patch": "(model, k=0.5)", "new": "()"}, "hooks": ["a"]}
    assert differences(before, now) == [
        "gone: names.old", "new: names.new",
        "changed: names.patch from '(model, k=None)' to '(model, k=0.5)'", "gone: hooks.b",
    ]  # fmt: skip
