"""Shows the output of the code on every page below the block that prints it.

The code of a page runs in a process of its own. Outputs are cached in ``build/page-outputs``, under
a hash of the page's code and of the versions of packages: run ``make clean`` after a change of the
library to renew them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import site
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import snippets
from mkdocs.plugins import get_plugin_logger

log = get_plugin_logger("outputs")

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "page-outputs"
VERSIONS = ("sparsiattn", "torch", "timm", "transformers", "torchvision")
LONG = 24  # lines; longer outputs scroll
WIDE = 92  # characters that fit next to the navigation


used: set[Path] = set()
"""Files of the cache that this build reads."""


def outputs(page: Path, found: list[snippets.Block]) -> list[str]:
    """Return the output of each block; the page's code runs if the cache does not have them."""
    path = CACHE / f"{_key(found)}.json"
    used.add(path)
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        run(page, path)
    texts: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return texts


def _key(found: list[snippets.Block]) -> str:
    code = [[block.language, block.code, block.runs] for block in found]
    versions = [_version(package) for package in VERSIONS]
    return hashlib.sha256(json.dumps([code, versions]).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def run(page: Path, result: Path) -> None:
    """Run the code of a page.

    Raises:
        SnippetFailed: A block raised an error.
    """
    log.info("running the code of %s", page.name)
    path = [str(ROOT), str(ROOT / "backbones"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, snippets.__file__, os.path.relpath(page, ROOT), str(result)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise snippets.SnippetFailed(done.stderr.strip())


def without_paths(output: str) -> str:
    """Return the output with folders of the building machine replaced by ``...``."""
    for folder in (*site.getsitepackages(), str(ROOT), str(Path.home())):
        output = re.sub(re.escape(folder) + r"(?=/)", "...", output)
    return output


def with_outputs(text: str, found: list[snippets.Block], texts: list[str]) -> str:
    """Return the page with an output block after each block that printed something."""
    parts, start = [], 0
    for block, output in zip(found, texts, strict=True):
        parts.append(text[start : block.end])
        if output.strip() and block.shows:
            parts.append(_fenced(without_paths(output), block.indent))
        start = block.end
    return "".join([*parts, text[start:]])


def wrapped(line: str) -> list[str]:
    """Wrap a long line of prose as a terminal does; rows of tables are not wrapped."""
    if len(line) <= WIDE or "  " in line.strip():
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(
        line, WIDE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _fenced(output: str, indent: str) -> str:
    lines = [part for line in output.rstrip().splitlines() for part in wrapped(line)]
    kind = ".output .long" if len(lines) > LONG else ".output"
    fenced = [f'```` {{ .text {kind} title="Output" }}', *lines, "````"]
    return "\n\n" + "\n".join(f"{indent}{line}".rstrip() for line in fenced)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """mkdocs: called for a page before it becomes HTML.

    A block that fails gives a warning, which ends a build with ``--strict``.
    """
    if page.file.abs_src_path is None:
        return markdown
    try:
        found = snippets.blocks(markdown)
        if not any(block.runs for block in found):
            return markdown
        return with_outputs(markdown, found, outputs(Path(page.file.abs_src_path), found))
    except snippets.SnippetFailed as error:
        log.warning("%s: %s", page.file.src_uri, error)
        return markdown


def on_post_build(**_: Any) -> None:
    """mkdocs: called after the build. Deletes cached outputs that no page uses any more."""
    for path in set(CACHE.glob("*.json")) - used:
        path.unlink()
    used.clear()
