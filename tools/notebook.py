"""Runs the code cells of a notebook with plain Python and stores what they print and draw.

    python tools/notebook.py FILE            # runs it, writes the outputs into the file
    python tools/notebook.py FILE --check    # runs it, exits 1 if stored outputs have another form

Jupyter is not needed; lines such as ``%matplotlib inline`` are for it alone. Numbers may always
differ. Cells whose words depend on the machine too, such as names of kernels, carry the tag
``measured``; those whose whole answer does, ``machine``.
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

# the least share of words that a stored and a fresh output have in common, by the cell's tag
ALIKE = {"measured": 0.6, "machine": 0.0}
DPI, COLOURS = 80, 256  # pictures of some 150 kB

Cell = dict[str, Any]
Outputs = list[dict[str, Any]]


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> list[Outputs]:
    """The outputs of each code cell, run in order in one namespace.

    An error of a cell ends the run; its traceback names the cell by its number.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    return [
        run_cell("".join(cell["source"]), number, names)
        for number, cell in enumerate(code_cells(notebook), start=1)
    ]


def run_cell(source: str, number: int, names: dict[str, Any]) -> Outputs:
    """What one cell prints, and the value of its last line if that is an expression."""
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
    """The text of a value, and a picture of a matplotlib figure."""
    data: dict[str, Any] = {"text/plain": lines(repr(value))}
    if hasattr(value, "savefig"):
        data["image/png"] = picture(value)
    return data


def picture(figure: Any) -> str:
    """A small PNG of a matplotlib figure, in base64."""
    from PIL import Image  # only notebooks that draw need it

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
    # this method keeps rare colours, such as a mark's
    few = Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    few.save(small, format="png", optimize=True)
    return base64.b64encode(small.getvalue()).decode() + "\n"


def lines(text: str) -> list[str]:
    """Text as notebooks store it: a list of lines that keep their ends."""
    return text.splitlines(keepends=True)


def differences(notebook: dict[str, Any], fresh: list[Outputs]) -> list[str]:
    """Where stored outputs have another form than fresh ones."""
    found = []
    for number, (cell, outputs) in enumerate(zip(code_cells(notebook), fresh, strict=True), 1):
        stored, tags = cell["outputs"], cell["metadata"].get("tags", ())
        if kinds(stored) != kinds(outputs):
            found.append(f"cell {number}: stored {kinds(stored)}, now {kinds(outputs)}")
        elif not same_form(text_of(stored), text_of(outputs), tags):
            found.append(f"cell {number}: stored\n{text_of(stored)}\nnow\n{text_of(outputs)}")
    return found


def kinds(outputs: Outputs) -> list[tuple[str, ...]]:
    return [(output["output_type"], *sorted(output.get("data", ()))) for output in outputs]


def text_of(outputs: Outputs) -> str:
    parts = [output.get("text") or output["data"]["text/plain"] for output in outputs]
    return "\n".join("".join(part) for part in parts)


def same_form(stored: str, now: str, tags: Iterable[str]) -> bool:
    """Whether two texts are equal but for numbers, or share the words that a tag asks for."""
    shares = [ALIKE[tag] for tag in tags if tag in ALIKE]
    if not shares:
        return without_numbers(stored) == without_numbers(now)
    one, other = (set(re.findall(r"[A-Za-z_]{2,}", text)) for text in (stored, now))
    return len(one & other) >= min(shares) * len(one | other)


def without_numbers(text: str) -> list[str]:
    return re.sub(r"[\d.,]*\d", "#", text).split()


def store(notebook: dict[str, Any], fresh: list[Outputs]) -> None:
    """Put the outputs into the notebook."""
    for number, (cell, outputs) in enumerate(zip(code_cells(notebook), fresh, strict=True), 1):
        cell.update(execution_count=number, outputs=outputs)


def main(arguments: list[str]) -> int:
    (name,) = (argument for argument in arguments if argument != "--check")
    path = Path(name)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    fresh = run(notebook)
    if "--check" in arguments:
        found = differences(notebook, fresh)
        advice = [f"if that is meant, run `python tools/notebook.py {name}`"] if found else []
        print(*found, *advice, sep="\n")
        return int(bool(found))
    store(notebook, fresh)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {path.name}: {len(fresh)} code cells")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
