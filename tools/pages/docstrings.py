"""Shows examples in docstrings as code, and descriptions of arguments as lists (API page)."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Object

EXAMPLE = re.compile(r"^ *>>> (?:.*\S.*\n?)+", re.MULTILINE)
SECTION = re.compile(r"[A-Z][a-z]+:\n")  # of a Google docstring, which mkdocstrings reads itself
ARGUMENTS = re.compile(r"(?:^|(?<=[.;] )|(?<=\.\) ))((?:\w+, )*\w+): ")


class Docstrings(Extension):
    """Puts every example into a fence, from its first prompt to the next empty line, and splits
    paragraphs that describe arguments or fields as ``name: ...``."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```\n", obj.docstring.value)

    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        _list(func, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        _list(cls, set(cls.members))


def _list(obj: Object, names: set[str]) -> None:
    if obj.docstring is not None:
        paragraphs = obj.docstring.value.split("\n\n")
        obj.docstring.value = "\n\n".join(_listed(text, names) for text in paragraphs)


def _listed(paragraph: str, names: set[str]) -> str:
    """Return the paragraph with its part from the first argument on as a list."""
    if ">>>" in paragraph or "```" in paragraph or SECTION.match(paragraph):
        return paragraph
    text = " ".join(paragraph.split())
    found = [m for m in ARGUMENTS.finditer(text) if names.issuperset(m[1].split(", "))]
    if not found:
        return paragraph
    ends = [match.start() for match in found[1:]] + [len(text)]
    items = [
        f"- **{match[1]}**: {text[match.end() : end].strip()}"
        for match, end in zip(found, ends, strict=True)
    ]
    return "\n\n".join(filter(None, [text[: found[0].start()].strip(), "\n".join(items)]))
