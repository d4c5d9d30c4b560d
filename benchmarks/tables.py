"""Writes the measured tables of the docs and the README from the JSON under ``results/``.

``python benchmarks/tables.py``; with ``--check`` it only says whether they are up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accuracy_tables
import command_line
import equal_time_tables
import export_tables
import kernel_features
import method_tables
import quality_tables
import recipe_tables
import reliability_tables
import runtime_tables
import serving_tables
import support_tables
import view_tables
from common import places

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(name: str) -> str:
    """Where a table's figures come from."""
    content = read(name)
    card = content["machine"]
    threads = "1 thread" if card["threads"] == 1 else f"{card['threads']} threads"
    command, cards = card["command"], _cards(content)
    if cards:  # the options are those of the last run alone
        command = command.partition(" --")[0]
    return (
        f"`benchmarks/results/{name}.json`: `{command}`, {places(cards or [card])}, {threads}, "
        f"torch {card['torch']}, timm {card['timm']}."
    )


def _cards(content: dict[str, Any]) -> list[dict[str, Any]]:
    """When and where each row was made, if the rows say so."""
    rows = (row for part in content.values() if isinstance(part, list) for row in part)
    return [row["made"] for row in rows if isinstance(row, dict) and "made" in row]


def models() -> str:
    """Many models as typed, by budget."""
    rows = read("models-cpu")["models"]
    by_name = {row["model"]: [r for r in rows if r["model"] == row["model"]] for row in rows}
    lines = ["k = 0.1", "k = 0.25", "k = 0.1, `only_if_faster`"]
    head = ["model", *lines[: max(map(len, by_name.values()))], "sites", "kernels"]
    return table(head, [_model(name, found, len(head) - 3) for name, found in by_name.items()])


def _model(name: str, rows: list[dict[str, Any]], lines: int) -> list[str]:
    if "refused" in rows[0]:
        return [f"`{name}`", *(["refused"] * lines), "", ""]
    ratios = [f"{row['ratio']:.2f}x" for row in rows]
    if rows[-1]["sparse_sites"] < rows[-1]["sites"]:
        ratios[-1] += f" ({rows[-1]['sparse_sites']} sparse)"
    kernels = ", ".join(f"`{kernel}`" for kernel in rows[0]["kernels"])
    ratios += [""] * (lines - len(ratios))  # measured before that line was
    return [f"`{name}`", *ratios, str(rows[0]["sites"]), kernels]


def train_step() -> str:
    """Training steps, by budget."""
    rows = read("train-step-cpu")["steps"]
    body = [
        [str(row["k"]), f"{row['ratio']:.2f}x", _quartiles(row["ratio_quartiles"])] for row in rows
    ]
    return table(["k", "speed of the whole step", "quartiles"], body)


def _quartiles(ratios: list[float]) -> str:
    return " to ".join(f"{ratio:.2f}x" for ratio in ratios)


def merging() -> str:
    """Merged tokens and a plain rewrite of their paper."""
    rows = read("merge-cpu")["speedup"]
    body = [
        [name, *(f"{row[key]:.2f}x" for key in ("rewrite", "ours", "ours_over_rewrite"))]
        for name, row in rows.items()
    ]
    return table(["", "rewrite", "`token_merge`", "`token_merge` over rewrite"], body)


def mass() -> str:
    rows = read("quality-cifar")["mass_relative_to_exact_topk"]
    return table(
        ["mask", "k = 0.1", "k = 0.25", "k = 0.5"],
        [[name, *(f"{row[k]:.3f}" for k in ("0.1", "0.25", "0.5"))] for name, row in rows.items()],
    )


def kernels() -> str:
    """`native` on two processors, first with planning, then the kernel alone."""
    places = {"Xeon": "kernels-native-cpu", "EPYC": "kernels-native-epyc"}
    parts = {"with planning": "with_planning", "kernel alone": "kernel_only"}
    head = [f"{place}: {part}" for place in places for part in parts]
    found = [read(name)["speedup"] for name in places.values()]
    body = [
        [*_call(row), *(_ratio(one[part]) for one in (row, other) for part in parts.values())]
        for row, other in zip(*found, strict=True)
    ]
    return table(["tokens", "k", "tile", *head], body)


def gather() -> str:
    """The same without compiled code."""
    parts = {"with planning": "with_planning", "kernel alone": "kernel_only"}
    rows = read("kernels-cpu")["speedup"]
    body = [[*_call(row), *(_ratio(row[part]) for part in parts.values())] for row in rows]
    return table(["tokens", "k", "tile", *parts], body)


def _call(row: dict[str, Any]) -> list[str]:
    return [f"{row['tokens']:,}", str(row["k"]), " x ".join(map(str, row["tile"]))]


def _ratio(timing: dict[str, Any]) -> str:
    return f"{timing['ratio']:.2f}x"


def overhead() -> str:
    found = read("overhead-cpu")
    kinds = {
        "dense_patched_over_unpatched": "patched with `dense`",
        "with_hooks_over_unpatched": "the same with hooks at every site, as sparse sites have",
    }
    rows = [
        [f"forward of {name}, batch 1, {kind}", f"{row['ratio']:.3f}x the time without a patch"]
        for key, kind in kinds.items()
        for name, row in found[key].items()
    ]
    seconds = found["patch_seconds"]
    rows += [[f"`patch` on {name}", f"{s['later']:.2f} s"] for name, s in seconds.items()]
    name = next(iter(seconds))  # the first model of the run, so that this call imports, too
    rows.append([f"the first `patch` of a process, on {name}", f"{seconds[name]['first']:.2f} s"])
    return table(["operation", "cost"], rows)


def tokens() -> str:
    found = read("tokens-cpu")["speedup"]
    rows = []
    for name, row in found["batch 8"].items():
        macs = "" if row["macs_ratio"] is None else f"{row['macs_ratio']:.2f}x"
        one = found["batch 1"][name]
        rows.append([name, macs, f"{row['speedup']:.2f}x", f"{one['speedup']:.2f}x"])
    return table(["setting", "MACs, dense / patched", "speed, batch 8", "speed, batch 1"], rows)


def proportional() -> str:
    rows = read("proportional-cpu")["time_over_plain_attention"]
    return table(
        ["batch", "tokens", "log size as a mask", "as one more channel"],
        [
            [str(r["batch"]), str(r["tokens"]), f"{r['mask']:.2f}x", f"{r['channel']:.2f}x"]
            for r in rows
        ],
    )


def monitor() -> str:
    rows = read("monitor-cpu")["over_a_call_without_a_monitor"]
    return table(
        ["strategy", "images", "time of a watched call", "extra time if every 100th is watched"],
        [
            [
                f"`{row['strategy']}`",
                str(row["batch"]),
                f"{row['watched']['ratio']:.2f}x",
                f"+{100 * row['share_at_every_100']:.2f} %",
            ]
            for row in rows
        ],
    )


def block_masks() -> str:
    """Fixed masks as lists of key blocks, where there are enough tokens."""
    rows = [row for row in read("blockmask-cpu")["rows"] if row["n"] > 1000]
    body = [
        [
            f"{row['n']:,}",
            row["mask"],
            "yes" if row["reorder"] else "no",
            f"{row['ideal_share']:.1%}",
            f"{row['computed_share']:.1%}",
            f"{row['speed_over_masked']:.2f}x",
            f"{row['speed_over_dense']:.2f}x",
            f"{row['making_ms']:.0f} ms",
        ]
        for row in rows
    ]
    head = ["tokens", "mask", "reordered", "pairs", "computed"]
    speeds = ["speed over masked SDPA", "speed over dense"]
    return table([*head, *speeds, "making the lists"], body)


def windowed() -> str:
    """Windows that are skipped in Swin."""
    rows = read("windowed")["rows"]["batch 1"]
    body = [
        [name, f"{row['macs_ratio']:.2f}x", f"{row['ratio']:.2f}x", f"{row['cosine']:.3f}"]
        for name, row in rows.items()
    ]
    return table(["skipped", "MACs, dense / patched", "speed", "cosine of the last map"], body)


def token_quality() -> str:
    found = read("token-quality-cifar")
    rows = [["dense", f"{found['dense_top1']:.2f}", "64", ""]]
    for name, row in found["rows"].items():
        saved = row["macs_saved"]
        saved = "" if saved is None else f"{100 * saved:.0f} %"
        rows.append([name, f"{row['top1']:.2f}", f"{row['tokens_left']:g}", saved])
    return table(["setting", "top-1", "patch tokens at the end", "MACs saved"], rows)


def memory() -> str:
    return table(
        ["tokens", "kernel", "dense", "sparse", "ratio"],
        [
            [f"{r['tokens']:,}", f"`{name}`", f"{r['mb']['dense']} MB", f"{r['mb'][name]} MB",
             f"{ratio:.2f}"]
            for r in read("memory-cpu")["rows"]
            for name, ratio in r["ratio"].items()
        ],
    )  # fmt: skip


def resolution() -> str:
    rows = read("resolution-cpu")["speedup"]
    head = ["setting", "speed of the whole model", "quartiles"]
    return table(
        head,
        [
            [name, f"{r['ratio']:.2f}x", _quartiles(r["ratio_quartiles"])]
            for name, r in rows.items()
        ],
    )


def search() -> str:
    found = read("search-cifar")
    dense = found["rows"][0]["macs_dense"]
    rows = [["dense", "", "", f"{found['dense_top1']:.2f}", ""]]
    for row in found["rows"]:
        for kind in ("uniform", "searched"):
            one = row[kind]
            shares = ", ".join(f"{name} {share:g}" for name, share in row["uniform_shares"].items())
            what = f"best uniform: {shares}" if kind == "uniform" else "searched"
            rows.append(
                [f"`{row['strategy']}`, at most {row['budget']:.0%} of the MACs", what,
                 f"{one['macs'] / dense:.1%}", f"{one['top1']:.2f}", f"{one['agreement']:.2f}"]
            )  # fmt: skip
    return table(["budget", "schedule", "MACs", "top-1", "agreement"], rows)


SOURCES = (
    "accuracy-cifar",
    "export-cpu",
    "kernels-cpu",
    "kernels-native-cpu",
    "printed-cpu",
    "kernels-native-epyc",
    "memory-cpu",
    "merge-cpu",
    "many-views-layer",
    "many-views-memory",
    "long-sequences",
    "key-mass",
    "many-views-recall",
    "models-cpu",
    "monitor-cpu",
    "overhead-cpu",
    "proportional-cpu",
    "quality-cifar",
    "reliability-cpu",
    "resolution-cpu",
    "runtimes-cpu",
    "search-cifar",
    "serving-cpu",
    "support",
    "token-quality-cifar",
    "tokens-cpu",
    "train-step-cpu",
    "windowed",
)


def printed(*keys: str, lines: int | None = None) -> str:
    """What a command or call on the page printed; its first ``lines`` if given."""
    found = read("printed-cpu")
    for key in keys:
        found = found[key]
    return "\n".join(["```text", *found["text"].splitlines()[:lines], "```"])


BLOCKS: dict[str, Callable[[], str]] = {
    "printed bench": partial(printed, "bench"),
    "printed verdict": partial(printed, "recommend", "1.4", lines=2),
    "printed recommend": partial(printed, "recommend", "1.4"),
    **{f"source {name}": partial(source, name) for name in SOURCES},
    "mass": mass,
    "kernels": kernels,
    "kernels gather": gather,
    "overhead": overhead,
    "tokens": tokens,
    "token-quality": token_quality,
    "windowed": windowed,
    "block masks": block_masks,
    "proportional": proportional,
    "monitor": monitor,
    "memory": memory,
    "resolution": resolution,
    "models": models,
    "train-step": train_step,
    "merging": merging,
    "search": search,
    "command line": command_line.text,
    "kernel features": lambda: table(*kernel_features.table()),
    **support_tables.BLOCKS,
    **accuracy_tables.BLOCKS,
    **reliability_tables.BLOCKS,
    **method_tables.BLOCKS,
    **equal_time_tables.BLOCKS,
    **quality_tables.BLOCKS,
    **recipe_tables.BLOCKS,
    **export_tables.BLOCKS,
    **serving_tables.BLOCKS,
    **runtime_tables.BLOCKS,
    **view_tables.BLOCKS,
}


def filled(text: str) -> str:
    """``text`` with new content between each ``<!-- name -->`` and ``<!-- end -->``."""

    def again(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{BLOCKS[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- ([\w -]+) -->\n.*?<!-- end -->", again, text, flags=re.DOTALL)


def main() -> int:
    stale = []
    pages = (path for folder in ("docs", "benchmarks") for path in (ROOT / folder).rglob("*.md"))
    for path in (ROOT / "README.md", *sorted(pages)):
        text = path.read_text()
        if filled(text) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(filled(text))
    print("changed:" if stale else "up to date", *stale)
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
