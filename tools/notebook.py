"""Runs the code cells of a notebook with plain Python and stores their outputs.

    python tools/notebook.py FILE            # runs it and writes the outputs into the file
    python tools/notebook.py FILE --check    # runs it; exits 1 if the stored outputs are outdated

Jupyter is not needed, so magic commands such as ``%matplotlib inline`` are skipped. The check
ignores numbers. Cells with words that depend on the machine, such as names of kernels, carry the
tag ``measured``; cells whose complete output depends on it carry the tag ``machine``.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# minimum share of words that a stored and a fresh output have in common, by tag of the cell
ALIKE = {"measured": 0.6, "machine": 0.0}
DPI, COLOURS = 80, 256  # for pictures of about 150 kB

Cell = dict[str, Any]
Outputs = list[dict[str, Any]]


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    """Return the code cells of a notebook, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> list[Outputs]:
    """Run all code cells in order in one namespace, and return the outputs of each.

    An error in a cell ends the run; the traceback names the cell by its number.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    return [
        run_cell("".join(cell["source"]), number, names)
        for number, cell in enumerate(code_cells(notebook), start=1)
    ]


def run_cell(source: str, number: int, names: dict[str, Any]) -> Outputs:
    """Run one cell; return its printed text, and the value of its last line if an expression."""
    printed, file = io.StringIO(), f"cell {number}"
    body = ast.parse(re.sub(r"^%", "# %", source, flags=re.MULTILINE), file)
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(body, file, "exec"), names)
        value = eval(compile(ast.Expression(last.value), file, "eval"), names) if last else None
    outputs: Outputs = []
    if printed.getvalue():
        text = lines(printed.getvalue())
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None and not source.rstrip().endswith(";"):
        result = {"data": data_of(value), "execution_count": number, "metadata": {}}
        outputs.append({**result, "output_type": "execute_result"})
    return outputs


def data_of(value: Any) -> dict[str, Any]:
    """Return the `repr` of a value, and a picture if it is a matplotlib figure."""
    data: dict[str, Any] = {"text/plain": lines(repr(value))}
    if hasattr(value, "savefig"):
        data["image/png"] = picture(value)
    return data


def picture(figure: Any) -> str:
    """Return a small PNG of a matplotlib figure, in base64."""
    from PIL import Image  # needed by notebooks with figures only

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
    # MAXCOVERAGE keeps rare colours, such as that of a small marker
    few = Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    few.save(small, format="png", optimize=True)
    return base64.b64encode(small.getvalue()).decode() + "\n"


def lines(text: str) -> list[str]:
    """Split a text as notebooks store it: a list of lines with their line ends."""
    return text.splitlines(keepends=True)


def differences(notebook: dict[str, Any], fresh: list[Outputs]) -> list[str]:
    """Describe each cell with stored outputs that do not match the fresh ones.

    Args:
        notebook: The notebook, with its stored outputs.
        fresh: Outputs of each code cell of a new run, as `run` returns them.

    Returns:
        One text for each cell that differs.
    """
    changed = []
    for number, (cell, outputs) in enumerate(zip(code_cells(notebook), fresh, strict=True), 1):
        stored, tags = cell["outputs"], cell["metadata"].get("tags", ())
        if kinds(stored) != kinds(outputs):
            changed.append(f"cell {number}: stored {kinds(stored)}, now {kinds(outputs)}")
        elif not same_form(text_of(stored), text_of(outputs), tags):
            changed.append(f"cell {number}: stored\n{text_of(stored)}\nnow\n{text_of(outputs)}")
    return changed


def kinds(outputs: Outputs) -> list[tuple[str, ...]]:
    """Return the output type and the MIME types of each output."""
    return [(output["output_type"], *sorted(output.get("data", ()))) for output in outputs]


def text_of(outputs: Outputs) -> str:
    """Return the text of all outputs of a cell."""
    parts = [output.get("text") or output["data"]["text/plain"] for output in outputs]
    return "\n".join("".join(part) for part in parts)


def same_form(stored: str, now: str, tags: Iterable[str]) -> bool:
    """Whether two texts are equal apart from numbers or, with a tag, share enough words."""
    minimum_shares = [ALIKE[tag] for tag in tags if tag in ALIKE]
    if not minimum_shares:
        return without_numbers(stored) == without_numbers(now)
    old_words, new_words = (set(re.findall(r"[A-Za-z_]{2,}", text)) for text in (stored, now))
    return len(old_words & new_words) >= min(minimum_shares) * len(old_words | new_words)


def without_numbers(text: str) -> list[str]:
    """Split a text into words, with each number replaced by ``#``."""
    return re.sub(r"[\d.,]*\d", "#", text).split()


def store(notebook: dict[str, Any], fresh: list[Outputs]) -> None:
    """Write the outputs into the notebook, in place."""
    for number, (cell, outputs) in enumerate(zip(code_cells(notebook), fresh, strict=True), 1):
        cell.update(execution_count=number, outputs=outputs)


def main(arguments: list[str]) -> int:
    (name,) = (argument for argument in arguments if argument != "--check")
    path = Path(name)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    fresh = run(notebook)
    if "--check" in arguments:
        changed = differences(notebook, fresh)
        advice = [f"if this change is intended, run `python tools/notebook.py {name}`"]
        print(*changed, *(advice if changed else []), sep="\n")
        return int(bool(changed))
    store(notebook, fresh)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {path.name}: {len(fresh)} code cells")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
