"""Whole models on a GPU in bfloat16: launched from Python, replayed from a CUDA graph, compiled.

    python benchmarks/gpu_models.py [--out DIR]

A model is patched once for all of its rows. Each row has the median time of
`triton.testing.do_bench` and the memory that a forward pass takes beside the weights.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from gpu_device import Rows, arguments, measured, milliseconds, peak_megabytes, placed, random
from gpu_device import session as device_session
from torch import nn

import sparsiattn


@dataclass(frozen=True)
class Model:
    """A model, its image size, and the batch sizes to run."""

    name: str
    size: int
    batches: tuple[int, ...]
    compiles: bool = False


MODELS = (
    Model("vit_small_patch16_224", 1024, (8, 1), compiles=True),
    Model("deit_small_patch16_224", 224, (1, 8, 32)),
    Model("vit_base_patch16_224", 2048, (1,)),
)
LINES: dict[str, dict[str, Any]] = {
    "dense": {},
    "connectivity k=0.1": {"strategy": "connectivity", "k": 0.1},
    "connectivity k=0.25": {"strategy": "connectivity", "k": 0.25},
    "hybrid k=0.1 keep=0.5": {"strategy": "hybrid", "k": 0.1, "keep": 0.5},
    "token_merge": {"strategy": "token_merge"},
}
COMPILED = ("dense", "connectivity k=0.1")
FAKE_DEPTH = 2
"""Blocks of a model in a run without a GPU."""


def build(model: Model, line: str, *, fake: bool) -> nn.Module:
    """The model with a line's patch, on the CPU, where its shapes are planned."""
    torch.manual_seed(0)
    depth = {"depth": FAKE_DEPTH} if fake else {}
    built: nn.Module = timm.create_model(model.name, img_size=model.size, **depth)
    built = built.eval().to(torch.bfloat16)
    if LINES[line]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sparsiattn.SlowerThanDense)
            sparsiattn.patch(built, **LINES[line])
    return built


def forward(model: nn.Module, batch: int, size: int) -> dict[str, Any]:
    """Time from Python and from a graph, and memory."""
    x = random(batch, 3, size, size)
    model(x)  # tables are made, kernels compiled
    row = {**measured(lambda: model(x)), "peak_mb": peak_megabytes(lambda: model(x))}
    patch = sparsiattn.patch_of(model)
    if patch is not None:
        used = {str(r.last_choice.kernel.name) for r in patch.runtimes if r.last_choice}
        row["kernels"] = sorted(used)
    return row


def compiled(model: nn.Module, batch: int, size: int, mode: str) -> dict[str, Any]:
    """Time of the model compiled by torch."""
    x = random(batch, 3, size, size)
    program = torch.compile(model, mode=mode)
    program(x)
    return {"ms": milliseconds(lambda: program(x))}


def run(model: Model, line: str, rows: Rows) -> None:
    """All rows of one model with one patch."""
    built: list[nn.Module] = []

    def there() -> nn.Module:
        """The model, built for the first row that needs it."""
        if not built:
            raise RuntimeError("the model could not be built")
        return built[0]

    def make() -> dict[str, Any]:
        built.append(build(model, line, fake=rows.fake))
        return {"params": sum(weight.numel() for weight in built[0].parameters())}

    head = f"{model.name} {model.size} px | {line}"
    rows.done.discard(f"{head} | built")  # a process of its own needs the model again
    rows.add(f"{head} | built", make)
    with device_session(rows.fake), torch.no_grad():
        if built:
            placed(built[0])
        for batch in model.batches:
            name = f"{head} | B={batch}"
            rows.add(name, lambda b=batch: forward(there(), b, model.size))  # type: ignore[misc]
        if model.compiles and line in COMPILED:
            for mode in ("default", "reduce-overhead"):
                batch = model.batches[0]
                name = f"{head} | B={batch} | compile, {mode}"
                rows.add(name, partial(_compiled_row, there, batch, model.size, mode))


def _compiled_row(there: Any, batch: int, size: int, mode: str) -> dict[str, Any]:
    return compiled(there(), batch, size, mode)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(__doc__).parse_args(given)
    rows = Rows(options.out / "models.jsonl", fake=options.fake, resume=options.resume)
    for model in MODELS:
        for line in LINES:
            run(model, line, rows)
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
