"""Threads that serve the same and other models at once, while one patches and unpatches."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import sparsiattn
from reliability.hosts import Host
from reliability.lanes import KINDS, Lane, fresh, lane


@dataclass
class Seen:
    """What one thread saw."""

    forwards: int = 0
    switches: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, right: bool, what: str) -> None:
        self.forwards += 1
        if not right:
            self.wrong.append(what)


def run(rounds: int, threads: int = 8, lanes: int = len(KINDS)) -> dict[str, Any]:
    """``threads`` of them, one of which patches and unpatches models of its own meanwhile. All
    serve the same models, each thread in its own order; every answer is compared bit for bit."""
    served = [lane(i) for i in range(lanes)]
    seen = [Seen() for _ in range(threads)]
    start, interval = threading.Barrier(threads), sys.getswitchinterval()
    work: list[Callable[[], None]] = [
        lambda i=i: _serve(served, seen[i], rounds, i, start)  # type: ignore[misc]
        for i in range(threads - 1)
    ]
    work.append(lambda: _switch(seen[-1], rounds, lanes, start))
    running = [threading.Thread(target=_noting(one, s)) for one, s in zip(work, seen, strict=True)]
    sys.setswitchinterval(1e-5)  # a switch wherever one is possible
    try:
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    wrong = [what for one in seen for what in one.wrong]
    for one in served:  # and afterwards, alone
        with torch.no_grad():
            wrong += [] if one.right() else [f"afterwards: {one.name}"]
    return {
        "threads": threads, "models": lanes, "rounds": rounds,
        "forwards": sum(one.forwards for one in seen),
        "patched_and_unpatched_meanwhile": sum(one.switches for one in seen),
        "wrong": len(wrong), "wrong_cases": wrong[:20],
    }  # fmt: skip


def _noting(work: Callable[[], None], seen: Seen) -> Callable[[], None]:
    def run() -> None:
        try:
            work()
        except Exception as error:
            seen.wrong.append(f"{type(error).__name__}: {error}")

    return run


def _serve(lanes: list[Lane], seen: Seen, rounds: int, start: int, go: threading.Barrier) -> None:
    go.wait()
    with torch.no_grad():
        for turn in range(rounds):
            for i in range(len(lanes)):
                one = lanes[(i * (2 * start + 1) + start + turn) % len(lanes)]
                features = (turn + i) % 4 == 0
                seen.note(one.right_features() if features else one.right(), one.name)


def _switch(seen: Seen, rounds: int, lanes: int, go: threading.Barrier) -> None:
    """Patch, answer, disable, undo, answer: each answer has to be the one of a quiet hour."""
    plain = fresh(Host())
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        dense = plain(x)
        with sparsiattn.patch(plain, "topk", k=0.3):
            sparse = plain(x)
        go.wait()
        for turn in range(rounds):
            if turn % 4 == 3:  # other ways in, too
                other = lane(turn % lanes)
                seen.note(other.right(), f"patched meanwhile: {other.name}")
                sparsiattn.unpatch(other.model)
            with sparsiattn.patch(plain, "topk", k=0.3) as live:
                seen.note(torch.equal(plain(x), sparse), "patched meanwhile")
                with live.disabled():
                    seen.note(torch.equal(plain(x), dense), "disabled meanwhile")
            seen.note(torch.equal(plain(x), dense), "unpatched meanwhile")
            seen.switches += 1
