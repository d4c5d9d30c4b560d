"""Patches saved and loaded again, whole or damaged."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import sparsiattn
from reliability.answers import untouched
from reliability.drawn import names, options
from reliability.hosts import Host, build, same
from reliability.outcomes import Tally, Wrong

DAMAGE = ("none", "none", "none", "flip", "cut", "delete", "append", "other host", "other class")


@dataclass(frozen=True)
class Trip:
    """A patch to save, and what happens to it on the disk: to which file, and where in it."""

    strategy: str
    options: tuple[tuple[str, Any], ...]
    whole: bool
    damage: str
    file: int
    place: float


@st.composite
def trips(draw: Any) -> Trip:
    name = draw(st.sampled_from(names()))
    return Trip(
        name, draw(options(name)), draw(st.booleans()), draw(st.sampled_from(DAMAGE)),
        draw(st.integers(0, 2)), draw(st.floats(0, 0.999)),
    )  # fmt: skip


def judge(trip: Trip, tally: Tally) -> str:
    """The outcome of one trip; raises where it is wrong."""
    model, host = build(Host()), Host()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        try:
            live = sparsiattn.patch(model, trip.strategy, **dict(trip.options))
        except Exception as error:
            return tally.documented(error)
        with live:
            wanted = model(x)
            live.save(folder, include_model=True) if trip.whole else live.save(folder)
        saved = json.loads((Path(folder) / "sparsiattn.json").read_text())["strategy"]
        _damage(Path(folder), trip)
        other = {"other host": Host(depth=1), "other class": Host(family="swin")}
        twin = build(other.get(trip.damage, host))
        try:
            again = sparsiattn.load(twin, folder)
        except Exception as error:
            if trip.damage == "none":
                raise
            return untouched(twin, f"damaged, {tally.documented(error)}")
        with again:
            return _found(trip, twin, x, wanted, _plain(again.strategy) == saved)


def _plain(strategy: Any) -> Any:
    return json.loads(json.dumps(strategy.to_dict()))


def _damage(folder: Path, trip: Trip) -> None:
    files = sorted(folder.iterdir())
    file = files[trip.file % len(files)]
    content = bytearray(file.read_bytes())
    place = int(trip.place * len(content))
    if trip.damage == "flip":
        content[place] ^= 1 << (place % 8)
    elif trip.damage == "cut":
        del content[place:]
    elif trip.damage == "append":
        content += b"\0"
    if trip.damage == "delete":
        file.unlink()
    elif bytes(content) != file.read_bytes():
        file.write_bytes(content)


def _found(trip: Trip, twin: nn.Module, x: Any, wanted: Any, equal: bool) -> str:
    if trip.damage not in ("none", "flip", "append") or not equal:
        raise Wrong(f"loaded in spite of {trip.damage}, the strategies equal: {equal}")
    if not same(twin(x), wanted):
        raise Wrong("loaded, and it computes something else")
    return "same bits" if trip.damage == "none" else "damaged where it does not matter: same bits"
