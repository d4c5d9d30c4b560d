"""What patching itself costs: a model patched with `dense` against the same model unpatched, and
how long `patch` takes. ``python benchmarks/overhead.py``"""

from __future__ import annotations

import argparse
import time
from statistics import median

import timm
import torch
from common import paired, write

import sparsiattn


def forward_overhead(name: str, rounds: int) -> dict[str, float]:
    """Two models of the same weights, so that neither is switched during the runs."""
    plain = timm.create_model(name).eval()
    patched = timm.create_model(name).eval()
    patched.load_state_dict(plain.state_dict())
    sparsiattn.patch(patched, "dense")
    x = torch.randn(1, *plain.pretrained_cfg["input_size"])
    with torch.inference_mode():
        assert torch.equal(plain(x), patched(x))
        return paired(lambda: plain(x), lambda: patched(x), rounds)


def patch_seconds(name: str, repeats: int = 5) -> float:
    model = timm.create_model(name).eval()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        live = sparsiattn.patch(model, strategy="connectivity", k=0.1)
        times.append(time.perf_counter() - start)
        live.unpatch()
    return round(median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    forward = {n: forward_overhead(n, options.rounds) for n in ("deit_tiny_patch16_224",)}
    seconds = {n: patch_seconds(n) for n in ("deit_tiny_patch16_224", "vit_large_patch16_224")}
    print(forward, seconds)
    write("overhead-cpu", {"dense_patched_over_unpatched": forward, "patch_seconds": seconds})


if __name__ == "__main__":
    main()
