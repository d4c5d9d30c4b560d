"""Odd turns of phrase stay out of what users read: pages, docstrings, comments, messages.

`phrases.txt` lists them, one a line, sorted, in lower case. Add a turn when you correct it, so that
it does not return.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PHRASES = (Path(__file__).parent / "phrases.txt").read_text(encoding="utf-8").splitlines()
SUFFIXES = {".c", ".h", ".ipynb", ".md", ".py", ".pyi", ".toml", ".yaml"}
FOLDERS = ("docs", "sparsiattn", "backbones", "examples")
# Between two words of a phrase: spaces, and what starts or ends a line of a comment or a string.
GAP = r"""(?:[\s"'`#*/>]|\\n|\b[fr]["'])+"""


def texts() -> list[Path]:
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for folder in FOLDERS:
        found += (path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    return sorted(found)


def expression(phrases: list[str]) -> re.Pattern[str]:
    """Matches any of the phrases as whole words, also across line breaks."""
    spread = (GAP.join(map(re.escape, phrase.split())) for phrase in phrases)
    return re.compile(rf"(?<!\w)(?:{'|'.join(spread)})(?!\w)", re.IGNORECASE)


def hits(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """Line number and wording of each phrase in ``text``."""
    for match in pattern.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_odd_phrase(path: Path) -> None:
    found = hits(path.read_text(encoding="utf-8"), expression(PHRASES))
    lines = [f"{path.relative_to(ROOT)}:{line}: {wording!r}" for line, wording in found]
    assert not lines, "reword (tests/project/phrases.txt lists the phrases):\n" + "\n".join(lines)


def test_the_list_is_sorted_and_has_no_doubles() -> None:
    assert sorted({phrase.strip().lower() for phrase in PHRASES}) == PHRASES


@pytest.mark.parametrize(
    "text",
    [
        "22 methods come along.",
        "They Come\nalong.",
        "# they come\n    # along",
        'message = (\n    "they come "\n    f"along"\n)',
    ],
)
def test_phrases_are_found_across_lines(text: str) -> None:
    assert list(hits(text, expression(["come along"])))


@pytest.mark.parametrize("text", ["income along", "come alongside", "come and along"])
def test_other_words_are_left_alone(text: str) -> None:
    assert not list(hits(text, expression(["come along"])))
