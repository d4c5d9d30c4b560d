"""Two ways to weigh merged tokens by size (ToMe, eq. 1): its logarithm as a mask of torch's fused
attention, or as one more channel of queries and keys. Time over that of attention without either.
``python benchmarks/proportional.py``"""

from __future__ import annotations

import argparse

import torch
from common import paired, write
from torch import Tensor
from torch.nn import functional as F


def by_channel(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor) -> Tensor:
    """Queries carry a one, keys their log size over the scale, values a zero."""
    scale = q.shape[-1] ** -0.5
    one = q.new_ones(1).expand(*q.shape[:-1], 1)
    extra = (log_size / scale).transpose(-1, -2).expand(*k.shape[:-1], 1)
    q, k = torch.cat([q, one], -1), torch.cat([k, extra], -1)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 1)), scale=scale)[..., :-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for batch in (8, 1):
            for n in (184, 119, 67):
                qkv = torch.randn(
                    batch, n, 3, 6, 64, device=options.device, dtype=getattr(torch, options.dtype)
                )
                q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
                log = torch.rand(batch, 1, 1, n, device=q.device, dtype=q.dtype)
                masked = F.scaled_dot_product_attention(q, k, v, log)
                torch.testing.assert_close(by_channel(q, k, v, log), masked, rtol=1e-2, atol=1e-2)
                row = {"batch": batch, "tokens": n}
                for name, call in (
                    ("mask", lambda: F.scaled_dot_product_attention(q, k, v, log)),  # noqa: B023
                    ("channel", lambda: by_channel(q, k, v, log)),  # noqa: B023
                ):
                    plain = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: B023, E731
                    row[name] = paired(plain, call, options.rounds)["ratio"]
                rows.append(row)
                print(row, flush=True)
    kind = "cpu" if options.device == "cpu" else "cuda"
    write(f"proportional-{kind}", {"time_over_plain_attention": rows})


if __name__ == "__main__":
    main()
