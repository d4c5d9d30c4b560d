"""``python benchmarks/many_views/layer.py``: time and memory of one global layer over many views.

Attention alone, planning included, as ratios to dense SDPA in the same rounds: 16 heads of 64 over
views of 1,041 tokens (VGGT at 518 x 392: 28 x 37 patches, 5 special tokens), random operands. Only
some of the heads where there are many views.
``--memory`` instead measures the peak memory of one sparse call by number of views of 1,372
tokens, each in a process of its own (Linux: it reads ``VmHWM``), the operands left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import common  # noqa: E402
import torch  # noqa: E402
from memory import _status  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from sparsiattn import AttentionInputs, Site  # noqa: E402
from sparsiattn.attention.structure import Structure  # noqa: E402
from sparsiattn.registry import REGISTRY  # noqa: E402
from sparsiattn.runtime.head_groups import head_groups, heads_at_once  # noqa: E402
from sparsiattn.strategies import Connectivity, finish  # noqa: E402

DIM = 64
VGGT = Structure((28, 37), specials=(0, 1, 2, 3, 4), source="benchmark")
SQUARE = Structure((37, 37), specials=(0, 1, 2), source="benchmark")  # 1,372 tokens
# views, heads, rounds, settings: less of the longest, which take minutes
SPEEDS = ((5, 16, 7, 3), (10, 4, 5, 3), (20, 4, 5, 3), (50, 4, 3, 1), (100, 4, 3, 1))
# views, heads: 16,464 to 262,052 tokens
MEMORY = ((12, 16), (24, 16), (48, 8), (100, 4), (191, 2))
OPTIONS: tuple[dict[str, Any], ...] = ({"k": 0.1}, {"k": 0.1, "tile": (4, 4)}, {"k": 0.25})


@dataclass(frozen=True)
class Layer:
    """One global layer.

    Attributes:
        structure: Of the sequence.
        q: Queries ``[1, H, N, D]``, special tokens first.
        k: Keys.
        v: Values.
    """

    structure: Structure
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, view: Structure, views: int, heads: int) -> Layer:
        """Random operands, laid out as hosts hand them over."""
        structure = Structure(view.grid, views, specials=view.specials, source=view.source)
        packed = torch.randn(1, structure.tokens, 3, heads, DIM)
        return cls(structure, *packed.permute(2, 0, 3, 1, 4))

    def dense(self) -> Tensor:
        return F.scaled_dot_product_attention(self.q, self.k, self.v)

    def sparse(self, strategy: Connectivity) -> Tensor:
        """Plan and attend, in groups of heads as a patched model does."""
        n, kernel = self.structure.tokens, REGISTRY.get("kernels", "native")
        site = Site.of(self.q, self.k, self.v).described(self.structure)
        tile, block = strategy.tile_for(n), strategy.block_for(n)
        operands = self.q, self.k, self.v, DIM**-0.5, None, site
        inputs = AttentionInputs(*operands, tile=tile, block=block)
        planner, out = strategy.planner(site), torch.empty_like(self.q)
        for heads, group in head_groups(inputs, heads_at_once(planner, strategy, inputs)):
            background = strategy.background_for(group.key_grid, group.key_views)
            out[:, heads] = kernel(group, finish(planner(group), group, background=background))
        return out


def speed(views: int, heads: int, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    layer, strategy = Layer.of(VGGT, views, heads), Connectivity(**options)
    pair = common.paired(lambda: layer.sparse(strategy), layer.dense, rounds)
    sizes = {"views": views, "tokens": layer.structure.tokens, "heads": heads, **options}
    return {**sizes, "tile": strategy.tile_for(layer.structure.tokens), **pair}


def peak(views: int, heads: int) -> dict[str, Any]:
    """What one sparse call adds to the process, beside q, k, v and the output."""
    layer, strategy = Layer.of(SQUARE, views, heads), Connectivity(k=0.1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far
    before = _status("VmRSS")
    out = layer.sparse(strategy)
    added = _status("VmHWM") - before - out.numel() * 4
    tokens = layer.structure.tokens
    return {"views": views, "tokens": tokens, "heads": heads, "peak_mb": round(added / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument(
        "--views", type=int, nargs="+", help="only these numbers of views; of speed"
    )
    parser.add_argument("--heads", type=int, default=16, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # in a process of its own
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        if given.peak:
            print(json.dumps(peak(given.peak, given.heads)))
        elif given.memory:
            rows = [_in_process(*case) for case in MEMORY]
            common.write("many-views-memory", {"rows": rows})
        else:
            write_speeds(given.views)


def _in_process(views: int, heads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--peak", str(views), "--heads", str(heads)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    print(found.stdout.strip(), flush=True)
    row: dict[str, Any] = json.loads(found.stdout)
    return row


def write_speeds(views: list[int] | None) -> None:
    """Each case, and the file after each of them."""
    rows: list[dict[str, Any]] = []
    for count, heads, rounds, settings in SPEEDS:
        for options in OPTIONS[:settings] if views is None or count in views else ():
            rows.append(speed(count, heads, rounds, options))
            print(rows[-1], flush=True)
            common.write("many-views-layer", {"rows": rows})


if __name__ == "__main__":
    main()
