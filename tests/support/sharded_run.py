"""What each process of a sharded training does; started by torchrun from test_training_sharded.

Arguments: a folder, and ``kill`` or ``resume``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from sparsiattn import InvalidOption, TrainingDiverged
from sparsiattn.training import losses as losses_module
from sparsiattn.training import sharding, train
from sparsiattn.training.processes import leave
from tests.support.pictures import Pictures
from tests.support.training_help import (
    DISTIL,
    changed,
    losses,
    one_stage,
    patched,
    state,
    two_stages,
)

PLAN = two_stages(batch_size=8, checkpoint_steps=1).changed({"clip": 0.1})
WARMDOWN = one_stage(epochs=3, keep_epochs=(0, 2), lr=1e-3, **DISTIL).changed({"batch_size": 8})
LEARNED = {"keep": 0.5, "score": "learned", "layers": [0, 1]}
SCORES = one_stage(
    trainable="both", keep_ratio=2.0, backbone_lr_scale=0.1, epochs=3, keep_epochs=(0, 2), **DISTIL
).changed({"batch_size": 8, "accumulation": 2})


def data() -> Pictures:
    return Pictures(16)


def kill(row: dict[str, Any]) -> None:
    if row["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)


def whole(folder: Path) -> None:
    """A run that nobody stops; says what its weights were cut into."""
    kinds: set[str] = set()
    real = sharding.prepare

    def prepare(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        kinds.update(type(weight).__name__ for weight in found[0].parameters())
        kinds.update(type(module).__name__ for module in found[0].modules())
        return found

    sharding.prepare = prepare  # type: ignore[assignment]
    model = patched()
    train(model, data(), recipe=PLAN, out=folder / "whole", eval_data=Pictures(6))
    sharding.prepare = real
    assert {"DTensor", "FSDPBlock", "FSDPObjective"} <= kinds, kinds
    for weight in model.parameters():  # whole, and the same everywhere
        other = weight.detach().clone()
        distributed.broadcast(other, 0)
        assert torch.equal(weight, other)


def variants() -> dict[str, list[float]]:
    found = {}
    dropped = patched("token_drop", keep=0.5)
    found["warmdown"] = losses(train(dropped, data(), recipe=WARMDOWN))
    half = PLAN.changed({"mixed_precision": "bf16", "grad_checkpointing": True})
    found["bf16"] = losses(train(patched(), data(), recipe=half))
    scores = patched("token_drop", **LEARNED)
    found["scores"] = losses(train(scores, data(), recipe=SCORES))
    alone = one_stage(trainable="planners", kl=0.5, keep_ratio=2.0).changed({"batch_size": 8})
    rests = patched("token_drop", **LEARNED)
    before = state(rests)
    found["own_teacher"] = losses(train(rests, data(), recipe=alone))
    assert changed(rests, before) == {"planners"}
    return found


def diverged() -> None:
    """The model has the weights of the step before."""
    real, calls = losses_module.kl_loss, []

    def kl_loss(*args: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 2 else 1.0)

    models = patched(), patched()
    recipe = one_stage(lr=1e-2, kl=1.0).changed({"batch_size": 8})
    train(models[0], data(), recipe=recipe, steps=1)
    losses_module.kl_loss = kl_loss
    with pytest.raises(TrainingDiverged, match="step 2"):
        train(models[1], data(), recipe=recipe)
    losses_module.kl_loss = real
    assert not changed(models[1], state(models[0]))
    assert changed(models[1], state(patched())) == {"backbone"}


def refused() -> None:
    os.environ["FSDP_VERSION"] = "1"
    with pytest.raises(InvalidOption, match="FSDP_VERSION=2"):
        train(patched(), data(), recipe=PLAN)
    os.environ["FSDP_VERSION"] = "2"
    dropped = patched("token_drop", keep=0.5)
    with pytest.raises(InvalidOption, match="remove grad_checkpointing"):
        train(dropped, data(), recipe=WARMDOWN, grad_checkpointing=True)


def main(folder: Path, how: str) -> None:
    if how == "kill":
        whole(folder)
        found = variants()
        diverged()
        refused()
        if distributed.get_rank() == 0:
            (folder / "variants.json").write_text(json.dumps(found))
        train(patched(), data(), recipe=PLAN, out=folder / "killed", eval_data=Pictures(6),
              on_log=kill)  # fmt: skip
    else:
        train(patched(), data(), recipe=PLAN, out=folder / "killed", eval_data=Pictures(6),
              resume=True)  # fmt: skip
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
