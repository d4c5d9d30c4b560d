"""Half precision up to the ends of its range: finite wherever the dense model is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparsiattn
from reliability.drawn import names
from reliability.hosts import DTYPES, Host, build
from sparsiattn import SparsiattnError

GAINS = {"fp16": (1, 300, 3_000), "bf16": (1e17,)}
"""By how much queries and keys are scaled: logits from usual ones to the largest that exist."""


def run(strategies: Sequence[str] = (), kernels: Sequence[str] = ("auto",)) -> dict[str, Any]:
    """Strategies (all, if none is named) on hosts of every gain: the largest logit, how many were
    checked, and what is not finite though the dense model is."""
    rows, wrong = {}, []
    for dtype, gains in GAINS.items():
        for gain in gains:
            host = loud(dtype, gain)
            largest, checked = largest_logit(host, dtype), 0
            for name in strategies or names():
                for kernel in kernels:
                    found = _check(copy.deepcopy(host), name, kernel, dtype)
                    checked += found is not None
                    wrong += [f"{name}, {kernel}, {dtype}, gain {gain}"] if found is False else []
            rows[f"{dtype} gain {gain:g}"] = {"largest_logit": largest, "checked": checked}
    return {"rows": rows, "wrong": len(wrong), "wrong_cases": wrong}


def loud(dtype: str, gain: float) -> nn.Module:
    """A host whose queries and keys are ``gain`` times as large as usual."""
    host = copy.deepcopy(build(Host(), dtype))
    module: Any
    for module in host.modules():
        if hasattr(module, "qkv"):
            width = module.qkv.weight.shape[0] // 3
            module.qkv.weight.data[: 2 * width].mul_(gain)
            module.qkv.bias.data[: 2 * width].mul_(gain)
    return host


def _images(dtype: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 16, 16, generator=generator).to(DTYPES[dtype])


def largest_logit(host: nn.Module, dtype: str) -> str:
    """Of the dense model, computed in double precision."""
    found: list[float] = []

    def observe(site: Any, planner: Any, inputs: Any) -> None:
        q, k = inputs.q.double(), inputs.k.double()
        found.append(float((q @ k.mT * inputs.scale).abs().max()))

    with torch.no_grad(), sparsiattn.patch(host, "dense") as live, live.observing(observe):
        host(_images(dtype))
    return f"{max(found):.2g}"


def _check(host: nn.Module, name: str, kernel: str, dtype: str) -> bool | None:
    """Whether images are finite where the dense model's are; None where the strategy refuses."""
    x = _images(dtype)
    with torch.no_grad():
        dense = host(x)
        try:
            with sparsiattn.patch(host, name, kernel=kernel, only_if_faster=False):
                out = host(x)
        except SparsiattnError:
            return None
    fine = dense.isfinite().all(1)
    return bool(out[fine].isfinite().all())
