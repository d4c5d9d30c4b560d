"""The tables of docs/support.md, made from ``results/support.json`` and
``results/recent.json``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from reworded import reworded

RESULTS = Path(__file__).resolve().parent / "results"
WORKS = "works"


def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "support.json").read_text())
    return found


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# what differs from model to model, and what to say instead
PLAIN = (
    (
        r"^[A-Z]\w+(?= (?:has|attends|does|cannot|hands|passes|with|keeps|reads|lays|packs)|:)",
        "the model",
    ),
    (r"a dry run of \w+", "a dry run"),
    (r" with an input of shape \([\d, ]+\)", ""),
    (r"\(a dry run failed: .*?accepts\)", "in a dry run"),
    (r"\(a dry run failed in .*?\)(?=; use)", "in a dry run"),
    (r"as (?:at )?site '[^']*'(?: has)?: .*?(?=;)", "as the model has"),
    (r" Pass input=.*?accepts", ""),
    (r"block '[^']*'", "a block"),
    (r" \((?:for one image: \[[\d, ]+\]|[\w.]+)\)", ""),
)


def plain(reason: str) -> str:
    """A refusal without what differs from model to model: the class's name, shapes, paths.

    >>> plain("NothingToPatch: ViT has no attention to patch: x\\n  blocks.0: y")
    'the model has no attention to patch: x'
    """
    kernel = re.search(r"no kernel computes .*?\n +(\w+: .*)", reason, re.DOTALL)
    text = kernel[1] if kernel else reason
    text = re.sub(r"^(?:refused|fails|[A-Z]\w*(?:Patch|Failed|Option|Refused)): ", "", text)
    text = re.sub(r"^(?:refused|fails): ", "", text.split("\n")[0])
    for pattern, put in PLAIN:
        text = re.sub(pattern, put, text)
    return reworded(text).replace("|", "\\|")


def census() -> str:
    """One row for each library: names, models with attention, and the result of patching them."""
    rows = []
    for name, found in _read()["census"].items():
        status, many = found["status"], found["with_attention"]
        patched = status.get("patched", 0)
        share = f" ({100 * patched / many:.1f} %)" if many else ""
        named = f", {found['named']} of them by name" if found["named"] else ""
        counts = [found["models"], many, f"{patched}{share}{named}"]
        counts += [status.get("refused", 0), status.get("failed", 0)]
        rows.append([name, *map(str, counts)])
    return _table(["library", "models", "attending", "patched", "refused", "failed"], rows)


def _grouped(key: str) -> str:
    """Reasons of one kind over all lists, with the names behind each."""
    names: dict[str, list[str]] = {}
    for found in _read()["census"].values():
        for reason, models in found[key].items():
            names.setdefault(plain(reason), []).extend(models)
    if not names:
        return "No model."
    most = sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = [[reason, str(len(models)), _some(models)] for reason, models in most]
    return _table(["reason", "models", "names"], rows)


def _some(models: list[str], most: int = 12) -> str:
    shown = ", ".join(f"`{name}`" for name in models[:most])
    return shown + (f" and {len(models) - most} more" if len(models) > most else "")


def matrix() -> str:
    """Families by strategies; numbers refer to `reasons`."""
    found = _read()["matrix"]
    numbers: dict[str, int] = {}
    columns = list(next(iter(found.values()))["cells"]) if found else []
    rows = []
    for family, row in found.items():
        cells = [_cell(row["cells"][column], numbers) for column in columns]
        rows.append([f"{family}: `{row['model']}`", *cells])
    return _table(["family: model", *columns], rows)


def _cell(cell: dict[str, str], numbers: dict[str, int]) -> str:
    if cell["auto"] != WORKS:
        return f"no {_number(cell['auto'], numbers)}"
    missing = [
        f"{name} {_number(outcome, numbers)}" for name, outcome in cell.items() if outcome != WORKS
    ]
    return "yes" if not missing else f"yes, not {', '.join(missing)}"


def _number(reason: str, numbers: dict[str, int]) -> str:
    return f"[{numbers.setdefault(plain(reason), len(numbers) + 1)}]"


def reasons() -> str:
    """What the numbers of `matrix` mean, in its order."""
    numbers: dict[str, int] = {}
    for row in _read()["matrix"].values():
        for cell in row["cells"].values():
            _cell(cell, numbers)
    return "\n".join(f"{number}. {text}" for text, number in numbers.items()) or "None."


def _recent(kind: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((RESULTS / "recent.json").read_text())[kind]
    return found


def recent(kind: str) -> str:
    """Models of 2025-26, or task heads, by strategies; numbers refer to `recent_reasons`."""
    numbers: dict[str, int] = {}
    found = _recent(kind)
    columns = list(next(iter(found.values())))
    rows = [
        [f"`{name}`", *(_cell({"auto": row[column]}, numbers) for column in columns)]
        for name, row in found.items()
    ]
    return _table(["model", *columns], rows)


def recent_reasons(kind: str) -> str:
    """What the numbers of `recent` mean, in its order."""
    numbers: dict[str, int] = {}
    for row in _recent(kind).values():
        for outcome in row.values():
            _cell({"auto": outcome}, numbers)
    return "\n".join(f"{number}. {text}" for text, number in numbers.items()) or "None."


def kernels() -> str:
    """Whether each kernel ran on the machine of the page, or why not."""
    rows = [[f"`{name}`", plain(reason) if reason else "runs in the tables above"]
            for name, reason in _read()["kernels"].items()]  # fmt: skip
    return _table(["kernel", "on this machine"], rows)


BLOCKS = {
    "support census": census,
    "support refused": lambda: _grouped("refused"),
    "support failed": lambda: _grouped("failed"),
    "support left": lambda: _grouped("left"),
    "support missed": lambda: _grouped("missed"),
    "support not-tokens": lambda: _grouped("not_tokens"),
    "support matrix": matrix,
    "support reasons": reasons,
    "support kernels": kernels,
    "support hosts": lambda: recent("hosts"),
    "support hosts-reasons": lambda: recent_reasons("hosts"),
    "support heads": lambda: recent("heads"),
    "support heads-reasons": lambda: recent_reasons("heads"),
}
