"""Timing on a GPU and rows on disk, for the programs that `gpu_run.py` starts.

With ``--fake``, a program walks the same lines without a GPU: tensors only claim to be on one, what
torch and Triton would do there is left out, and rows say how many kernels would be launched instead
of how long they took.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
MS_WARMUP, MS_MEASURED = 20, 60


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all of these programs share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-run", help="folder for rows")
    parser.add_argument("--resume", action="store_true", help="keep rows, make what is missing")
    parser.add_argument("--fake", action="store_true", help="walk all lines without a GPU")
    return parser


class Rows:
    """Rows of one program, appended to a file as they are made.

    Args:
        path: The file, a line of JSON for each row.
        fake: Whether no GPU is used, which every row says.
        resume: Whether to keep the rows that are there; rows that failed are made again.
    """

    def __init__(self, path: Path, *, fake: bool = False, resume: bool = False) -> None:
        self.path, self.fake, self.failed = path, fake, 0
        self.done = finished(path, fake) if resume else set()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.write_text("")

    def add(self, name: str, make: Callable[[], Mapping[str, Any]]) -> None:
        """Make a row and write it, or why it could not be made; does nothing if it is there."""
        if name in self.done:
            return
        start = time.perf_counter()
        try:
            row = dict(make())
        except Exception as error:  # the other rows still say something
            row, self.failed = {"failed": message(error)}, self.failed + 1
            self._free()
        mark = {"fake": True} if self.fake else {}
        row = {"row": name, **mark, **row, "took": round(time.perf_counter() - start, 1)}
        line = json.dumps(row, default=str)
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def _free(self) -> None:
        gc.collect()
        with suppress(Exception):  # a broken device has no memory to give back
            torch.cuda.empty_cache()


def finished(path: Path, fake: bool) -> set[str]:
    """Names of the rows in a file that did not fail, of the same kind of run."""
    rows = read(path)
    return {row["row"] for row in rows if "failed" not in row and row.get("fake", False) == fake}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, the last one of each name; a line that was cut short is left out."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            row = json.loads(line)
            rows[row["row"]] = row
    return list(rows.values())


def message(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def milliseconds(call: Callable[[], Any]) -> float | None:
    """Median time of a call on the GPU; None where it was not measured."""
    from triton.testing import do_bench

    took = do_bench(call, warmup=MS_WARMUP, rep=MS_MEASURED, return_mode="median")
    return None if math.isnan(took) else round(took, 4)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a call that was captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills caches
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measured(call: Callable[[], Any], *, graph: bool = True) -> dict[str, Any]:
    """Times of a call launched from Python and replayed from a graph, or why there is no graph."""
    row: dict[str, Any] = {"ms": milliseconds(call)}
    if _counted is not None:
        row["launches"] = _counted(call)
    if graph:
        try:
            row["graph_ms"] = milliseconds(captured(call))
        except Exception as error:
            row["no_graph"] = message(error)
    return row


def peak_megabytes(call: Callable[[], Any]) -> float:
    """Memory that a call takes beside what is there, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def placed(module: nn.Module) -> nn.Module:
    """A module with its weights on the GPU, in bfloat16; without a GPU in their own dtype."""
    return module.to("cuda", torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers on the GPU."""
    return torch.randn(shape, dtype=dtype, device="cuda")


# -- without a GPU --------------------------------------------------------------------------------

_counted: Callable[[Callable[[], Any]], int] | None = None
"""Counts the kernels that a call launches, in a run without a GPU."""


def session(fake: bool) -> Any:
    """The context in which calls run: empty on a GPU, else one that pretends there is one."""
    return pretended() if fake else nullcontext()


def _helpers() -> Any:
    """The helpers of the tests for tensors that only claim to be on a GPU."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module("tests.support.launches")


def _count(call: Callable[[], Any]) -> int:
    with _helpers().counted() as launches:
        call()
    return len(launches.names)


def _once(call: Callable[[], Any], **_: Any) -> float:
    """Stands for `do_bench`."""
    with _helpers().counted():
        call()
    return math.nan


def _fused(q: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for torch's attention: one launch, and a result of the right shape."""
    return q * 1.0


@contextmanager
def pretended() -> Iterator[None]:
    """Tensors are fake, and everything that would reach the driver does nothing."""
    import triton.testing

    from sparsiattn.kernels import flex_compile, xformers

    quiet: dict[str, Any] = {
        "Stream": mock.MagicMock,
        "current_stream": mock.MagicMock,
        "stream": lambda *_: nullcontext(),
        "CUDAGraph": mock.MagicMock,
        "graph": lambda *_: nullcontext(),
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "NVIDIA H200 (pretended)",
        "get_device_capability": lambda *_: (9, 0),
        **dict.fromkeys(("synchronize", "reset_peak_memory_stats", "empty_cache"), _nothing),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda *_: 0),
    }
    untried = xformers.Operators(None, "is not tried without a GPU")
    stand_ins = (
        *((torch.cuda, name, answer) for name, answer in quiet.items()),
        (nn.Module, "to", lambda module, *_: _helpers().on_gpu(module)),
        (triton.testing, "do_bench", _once),
        (F, "scaled_dot_product_attention", _fused),
        (torch.autograd, "grad", lambda out, leaves, *_: [torch.zeros_like(x) for x in leaves]),
        (torch, "compile", lambda model, **_: model),
        (flex_compile, "run", lambda key, call: call.q.new_empty(*call.q.shape[:-1], key.dims[1])),
        # these ask the driver
        (xformers, "probe", lambda: untried),
        (torch.backends.cudnn, "version", lambda: 91900),
    )
    with ExitStack() as stack:
        for owner, name, answer in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, answer))
        stack.enter_context(mock.patch.dict(globals(), _counted=_count))
        stack.enter_context(_helpers().fake_gpu())
        yield


def _nothing(*_: Any) -> None:
    return None
