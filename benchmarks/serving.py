"""`examples/serve.py` under load on loopback: right answers, memory, throughput dense and patched.

``python benchmarks/serving.py``: starts the service with the dense and with the patched model in
turn,
asks for ``--requests`` predictions over ``--clients`` connections, compares every answer with what
the model says to that image alone, and notes the memory of the process as it goes.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from common import write
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURES, TOLERANCE = 32, 1e-4


def pictures() -> list[bytes]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(PICTURES):
        pixels = torch.randint(0, 256, (96, 128, 3), generator=generator, dtype=torch.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG")
        found.append(file.getvalue())
    return found


@contextmanager
def service(model: str, strategy: str, keep: float, port: int) -> Iterator[tuple[str, int]]:
    """Its address and process."""
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--model", model]
    command += ["--strategy", strategy, "--keep", str(keep), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as program:
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address)
            yield address, program.pid
        finally:
            program.terminate()
            program.wait(60)


def _wait(address: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError(f"{address} does not answer")


def resident(pid: int) -> float:
    """Memory of a process that is in RAM, MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


async def load(address: str, pid: int, requests: int, clients: int) -> dict[str, Any]:
    """Every client sends one request after the other."""
    sent = pictures()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:

        async def ask(data: bytes) -> httpx.Response:
            return await client.post(f"{address}/predict", content=data)

        alone = [(await ask(data)).json()["classes"] for data in sent]
        left = iter(range(requests))
        wrong, refused, times, memory = 0, 0, [], [resident(pid)]

        async def run() -> None:
            nonlocal wrong, refused
            for i in left:
                begun = time.perf_counter()
                answer = await ask(sent[i % PICTURES])
                times.append(time.perf_counter() - begun)
                if answer.status_code != 200:
                    refused += 1
                elif not same(answer.json()["classes"], alone[i % PICTURES]):
                    wrong += 1
                if i % max(1, requests // 20) == 0:
                    memory.append(resident(pid))

        begun = time.perf_counter()
        await asyncio.gather(*(run() for _ in range(clients)))
        took = time.perf_counter() - begun
    ordered = sorted(times)
    return {
        "requests": requests, "wrong": wrong, "refused": refused,
        "per_second": round(requests / took, 1), "median_ms": round(1e3 * median(times), 1),
        "p99_ms": round(1e3 * ordered[int(0.99 * len(ordered))], 1),
        "memory_mb": [round(value, 1) for value in memory],
    }  # fmt: skip


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whether two answers agree; classes whose shares are equal to rounding may change places."""
    shares = {one["class"]: one["p"] for one in found}
    return all(
        abs(shares.get(one["class"], found[-1]["p"]) - one["p"]) < TOLERANCE for one in expected
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--strategy", default="token_drop")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2, help="dense and patched, each so often")
    given = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {"dense": [], "patched": []}
    for turn in range(given.turns):
        for i, (name, strategy) in enumerate((("dense", "none"), ("patched", given.strategy))):
            port = 8100 + 2 * turn + i
            with service(given.model, strategy, given.keep, port) as (address, pid):
                share = given.requests // given.turns
                rows[name].append(asyncio.run(load(address, pid, share, given.clients)))
            print(name, json.dumps(rows[name][-1]), flush=True)
    speeds = {name: median(row["per_second"] for row in found) for name, found in rows.items()}
    settings = {name: getattr(given, name) for name in ("model", "strategy", "keep", "clients")}
    write("serving-cpu", {**settings, "ratio": round(speeds["patched"] / speeds["dense"], 3),
                          "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
