"""The first minute on a GPU: versions, and every kernel once against the reference.

``python benchmarks/gpu_smoke.py``, or ``--device cpu``. Prints a row for each check as it ends, and
appends it to ``DIR/smoke.jsonl``; a check that fails does not stop the others. Exits 1 if any
failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gpu_device import Rows, arguments, session
from torch._subclasses.fake_tensor import FakeTensor

from sparsiattn import AttentionInputs, Pattern
from sparsiattn.attention import Lengths
from sparsiattn.kernels import Kernel, Reference, refusals
from sparsiattn.registry import REGISTRY
from sparsiattn.runtime import timing
from sparsiattn.strategies import finish
from sparsiattn.testing import random_inputs

SHAPES: dict[str, dict[str, Any]] = {
    "uneven": {"grid": (9, 7), "tile": (4, 4), "block": (2, 2), "dim": 64},
    "few queries": {"grid": (8, 8), "tile": (4, 4), "block": (4, 4), "dim": 32},
    "realistic": {"grid": (32, 32), "tile": (8, 8), "block": (8, 8), "dim": 64},
}
KERNELS = ("triton", "gather", "flex", "xformers")
RAGGED_KERNELS = ("varlen", "xformers", "sdpa")
MOST_ERROR = 2e-2
"""Largest mean error, relative to the mean size of the exact values, in half precision."""


def call(device: str, **options: Any) -> tuple[AttentionInputs, Pattern]:
    """A call in bfloat16 that keeps a fifth of the keys."""
    inputs = random_inputs(**options, dtype=torch.bfloat16)
    q, k, v = (x.to(device) for x in (inputs.q, inputs.k, inputs.v))
    scores = torch.randn(1, 1, inputs.n_keys, inputs.n_keys, device=device)
    inputs = inputs.replace(q=q, k=k, v=v)
    return inputs, finish(Pattern.top(scores, 0.2), inputs, background=2)


def packed_call(device: str) -> tuple[AttentionInputs, Pattern]:
    """A call in bfloat16 with images of different lengths in one row."""
    inputs = random_inputs((16, 16), dim=64, prefix=0, dtype=torch.bfloat16)
    q, k, v = (x.to(device) for x in (inputs.q, inputs.k, inputs.v))
    return inputs.replace(q=q, k=k, v=v), Lengths(256, 256, (100, 17, 139))


def outputs(kernel: Kernel, inputs: AttentionInputs, pattern: Pattern) -> list[torch.Tensor]:
    """The result of a kernel, and the gradients of q, k and v if it has a backward pass here."""
    operands = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    training = inputs.replace(**dict(zip("qkv", operands, strict=True)))
    if refusals(kernel, training, pattern):
        with torch.no_grad():
            return [kernel(inputs, pattern)]
    out = kernel(training, pattern)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), operands)]


def compare(kernel: Kernel, make: Callable[[], tuple[AttentionInputs, Pattern]]) -> dict[str, Any]:
    """Errors of the result and of the gradients, or why the kernel refuses the call.

    Tensors without values only show how many results there are.
    """
    inputs, pattern = make()
    with torch.no_grad():
        reasons = refusals(kernel, inputs, pattern)
    if reasons:
        return {"refused": reasons}
    wide = inputs.replace(q=inputs.q.float(), k=inputs.k.float(), v=inputs.v.float())
    pairs = zip(outputs(kernel, inputs, pattern), outputs(Reference(), wide, pattern))  # noqa: B905 - without gradients there is one pair
    measured = [relative_error(a, b) for a, b in pairs]
    if any(isinstance(error, FakeTensor) for error in measured):
        return {"results": len(measured)}
    errors = [error.item() for error in measured]
    if not max(errors) < MOST_ERROR:
        raise ValueError(f"differs from the reference: {errors}")
    return {"errors": [round(error, 5) for error in errors]}


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Mean error relative to the mean size of the exact values."""
    return (found.float() - exact).abs().mean() / exact.abs().mean()


def backends() -> dict[str, Any]:
    """Which backends torch's own attention may use, and the version of cuDNN."""
    names = ("flash", "mem_efficient", "cudnn", "math")
    enabled = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names}
    return {"enabled": enabled, "cudnn": torch.backends.cudnn.version()}


def checks(device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names of all checks, and what runs each."""
    yield "machine", timing.machine
    yield "attention of torch", backends
    for name in KERNELS:
        for shape, options in SHAPES.items():
            kernel = REGISTRY.get("kernels", name)
            yield f"{name}, {shape}", partial(compare, kernel, partial(call, device, **options))
    for name in RAGGED_KERNELS:
        kernel = REGISTRY.get("kernels", name)
        yield f"{name}, ragged", partial(compare, kernel, partial(packed_call, device))


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(given)
    torch.manual_seed(0)
    rows = Rows(options.out / "smoke.jsonl", fake=options.fake, resume=options.resume)
    with session(options.fake), torch.enable_grad():
        for name, check in checks(options.device):
            rows.add(name, check)
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
