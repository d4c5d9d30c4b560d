"""Runs the code blocks of a documentation page in order, and collects the output of each.

Tests do so in their own process. The site starts a process for each page:
``python tools/pages/snippets.py PAGE RESULT`` writes a JSON list with a text for each block.

Python blocks run, and shell blocks do not. A comment above a block changes that:

* ``<!-- not run: REASON -->``: a Python block that is only shown;
* ``<!-- no output: REASON -->``: a block that runs, but the page does not show what it prints;
* ``<!-- run -->``: a shell block that runs, too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>[^>\n]*) -->\n\s*?)?"
    r"^(?P<indent> *)```(?P<language>python|sh)\b[^\n]*\n(?P<code>.*?)^(?P=indent)``` *$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"(?P<order>not run|no output): (?P<reason>\S.*)")
COLUMNS = "88"  # characters that fit into a block of the site without scrolling


class SnippetFailed(Exception):
    """A block of a page raised an error, or the comment above it is not understood."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: ``"python"`` or ``"sh"``.
        code: The code, without the indentation of the fence.
        line: Line of the page on which the code begins, from 1.
        end: Index of the end of the fence in the text of the page.
        indent: Spaces before the fence.
        runs: Whether it is run.
        shows: Whether the page shows what it prints.
    """

    language: str
    code: str
    line: int
    end: int
    indent: str
    runs: bool
    shows: bool


def blocks(text: str) -> list[Block]:
    """Return the Python and shell blocks of a page, in order."""
    return [_block(found, text) for found in BLOCK.finditer(text)]


def _block(found: re.Match[str], text: str) -> Block:
    order = _order(found["mark"] or "")
    python = found["language"] == "python"
    return Block(
        language=found["language"],
        code=textwrap.dedent(found["code"]),
        line=text.count("\n", 0, found.start("code")) + 1,
        end=found.end(),
        indent=found["indent"],
        runs=order != "not run" if python else order == "run",
        shows=order != "no output",
    )


def _order(mark: str) -> str:
    """Return the instruction in the comment above a block; empty for any other comment."""
    found = MARK.fullmatch(mark)
    if found is not None:
        return found["order"]
    if mark.startswith(("not run", "no output")):
        raise SnippetFailed(
            f"a block is marked {mark!r}: say why, as in '<!-- not run: REASON -->'"
        )
    return "run" if mark == "run" else ""


def printed(page: str, text: str) -> Iterator[str]:
    """Yield the output of each block of a page, in order; empty for blocks that do not run.

    Args:
        page: Path of the page, for errors.
        text: Text of the page.

    Raises:
        SnippetFailed: A block raised an error; the message has page, block and traceback.
    """
    module = ModuleType("page_" + re.sub(r"\W", "_", page))
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        for number, block in enumerate(blocks(text), start=1):
            try:
                yield _run(block, page, module) if block.runs else ""
            except Exception as error:
                where = f"{page}, block {number} (line {block.line})"
                raise SnippetFailed(f"{where}:\n{traceback.format_exc()}") from error
    finally:
        del sys.modules[module.__name__]


def _run(block: Block, page: str, module: ModuleType) -> str:
    if block.language == "sh":
        return _shell(block.code)
    # empty lines before the code: tracebacks then name lines of the page
    code = compile("\n" * (block.line - 1) + block.code, page, "exec")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, vars(module))
    return output.getvalue()


def _shell(code: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        env=os.environ | {"PATH": path, "COLUMNS": COLUMNS, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SnippetFailed(f"exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main(page: str, result: str) -> int:
    text, written = Path(page).read_text(encoding="utf-8"), Path(result).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # files that a page writes stay there
        try:
            found = list(printed(page, text))
        except SnippetFailed as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            os.chdir(written.parent)
    written.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
