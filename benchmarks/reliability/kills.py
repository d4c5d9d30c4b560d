"""kill -9 at random moments of training and of saving: what is there afterwards?

Processes are forked from one that has imported everything, so that a kill costs no import.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sparsiattn
from reliability.hosts import Host
from reliability.lanes import fresh
from sparsiattn import MismatchedPatch
from sparsiattn.training import Recipe, Stage, train

SEED = 20_261_123


def run(training: int, saving: int) -> dict[str, Any]:
    """So many kills each, at moments drawn with `SEED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "accelerate", "reliability.kills"])
    draw = random.Random(SEED)
    return {"seed": SEED, "training": _training(context, training, draw),
            "saving": _saving(context, saving, draw)}  # fmt: skip


def recipe() -> Recipe:
    first = Stage(name="predictor", trainable="planners", epochs=1, lr=1e-2, reconstruction=1.0)
    second = Stage(name="backbone", epochs=2, lr=1e-3, ce=1.0, kl=0.5)
    return Recipe(stages=(first, second), checkpoint_steps=1)


def trained(out: str | None) -> list[Any]:
    """One run to its end, or on from where the last one was killed; its history."""
    torch.set_num_threads(1)
    model = fresh(Host())
    sparsiattn.patch(model, "connectivity", k=0.25)
    generator = torch.Generator().manual_seed(3)
    data = [
        (torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0]))
        for _ in range(3)
    ]
    return train(model, data, recipe=recipe(), out=out).history


def _train_and_tell(out: str | None, pipe: Any) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if out is not None:
        pipe.send("started")
    began = time.perf_counter()
    pipe.send((trained(out), time.perf_counter() - began))


def _training(context: Any, kills: int, draw: random.Random) -> dict[str, Any]:
    """Runs that are killed several times each, until so many kills were made; their curves are
    those of a run that nobody disturbed."""
    whole, length = _finished(context, None)
    made = runs = wrong = resumed = 0
    while made < kills:
        with tempfile.TemporaryDirectory() as out:
            for _ in range(min(4, kills - made)):
                made += _killed(context, _train_and_tell, out, draw.uniform(0, length))
                resumed += (Path(out) / "last" / "state.json").exists()
            runs += 1
            try:
                wrong += _finished(context, out)[0] != whole
            except (EOFError, OSError):
                wrong += 1
    return {"kills": made, "runs": runs, "left_a_checkpoint": resumed, "wrong": wrong}


def _finished(context: Any, out: str | None) -> Any:
    """History and seconds of a run in a process of its own; `EOFError` where it failed."""
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_train_and_tell, args=(out, theirs))
    process.start()
    theirs.close()
    try:
        found = mine.recv()
        return mine.recv() if found == "started" else found
    finally:
        process.join()
        mine.close()


def _killed(context: Any, work: Callable[..., None], folder: str, after: float) -> bool:
    """Start ``work(folder, pipe)``, kill it so many seconds after its first word; whether it was
    still running."""
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(folder, theirs))
    process.start()
    theirs.close()
    try:
        mine.recv()
        process.join(after)
        os.kill(process.pid, signal.SIGKILL) if process.is_alive() else None
        process.join()
        return bool(process.exitcode == -signal.SIGKILL)
    finally:
        mine.close()


def _save_forever(folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    live = sparsiattn.patch(fresh(Host()), "connectivity", k=0.25)
    weight = next(live.runtimes[0].planner.parameters())  # type: ignore[attr-defined]
    pipe.send("started")
    for turn in range(10**9):
        weight.data.fill_(turn)
        live.save(folder, include_model=True) if turn % 2 else live.save(folder)


def _saving(context: Any, kills: int, draw: random.Random) -> dict[str, Any]:
    """Saves over saves, killed; what is there loads, whole, or nothing was ever there."""
    made = wrong = empty = 0
    with tempfile.TemporaryDirectory() as root:
        for turn in range(kills):
            folder = f"{root}/{turn // 4}"  # three times of four over what is there
            made += _killed(context, _save_forever, folder, draw.uniform(0, 0.3))
            try:
                with sparsiattn.load(fresh(Host()), folder) as live:
                    weights = next(live.runtimes[0].planner.parameters())  # type: ignore[attr-defined]
                    wrong += not bool((weights == weights.flatten()[0]).all())
            except MismatchedPatch:
                empty += 1
                wrong += turn % 4 > 0  # there was one before
    return {"kills": made, "before_the_first_save": empty, "wrong": wrong}
