"""Fills the reference: an entry for each registered strategy, and an index of the public names.

Marks on a page are replaced: ``<!-- strategies: attention -->`` (or ``tokens``, ``both``) by the
strategies of the library of that kind, ``<!-- public names -->`` by the index, and
``<!-- anchors -->`` by a script that redirects old addresses to the present entries.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import sparsiattn
from sparsiattn import Strategy, TokenStrategy
from sparsiattn.registry import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
PLUGINS = ("sparsiattn.strategies", "sparsiattn.methods")
HEADS = ("option", "default", "meaning")
ENTRY = re.compile(r"^::: sparsiattn\.(?P<name>[\w.]+)$", re.MULTILINE)

TO_NEW_PLACE = """<script>
const places = %s;
for (let name = location.hash.slice(1); name; name = name.replace(/\\.?[^.]*$/, ""))
  if (name in places) { location.replace("../reference/" + places[name]); break; }
</script>"""
"""Redirects to the entry of the name in the address or, for a method, to that of its class."""


def strategies(kind: str) -> str:
    """Return the entries of the library's strategies of one kind, as Markdown."""
    infos = sparsiattn.list_strategies().values()
    ours = [info for info in infos if info.kind == kind and info.plugin in PLUGINS]
    return "\n\n".join(entry(info.name) for info in ours)


def entry(name: str) -> str:
    """Return the description of a strategy, its paper, and its options with their defaults."""
    kind = REGISTRY.get("strategies", name)
    home = f"{kind.__module__}.{kind.__qualname__}"
    parts = [f"## `{name}` {{ #{name} }}", f'<a id="{home}"></a>`{home}`', prose(kind), facts(kind)]
    rows = [f"| {' | '.join(HEADS)} |", "| --- | --- | --- |"]
    meanings = described(kind)
    for option, default in defaults(kind).items():
        rows.append(f"| `{option}` | `{default}` | {meanings.get(option, '')} |")
    return "\n\n".join([*filter(None, parts), "\n".join(rows)])


def defaults(kind: type) -> dict[str, str]:
    """Return the options of a strategy and the `repr` of their defaults, shared options last."""
    shared = {name for base in (Strategy, TokenStrategy) for name in base.option_names()}
    options = sorted((f for f in fields(kind) if f.init), key=lambda f: f.name in shared)
    return {option.name: _typed(option) for option in options}


def _typed(option: Any) -> str:
    made = option.default_factory
    return repr(option.default if made is MISSING else made())


def prose(kind: type) -> str:
    """Return the docstring of a class up to its arguments."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return _markdown(re.split(r"\n\n(?:Args:|Attributes:|>>> )", text)[0])


def facts(kind: Any) -> str:
    """Return a list of the strategy's paper, its fidelity to that, and its requirements."""
    found = [f"- Paper: <{kind.paper}>" if kind.paper else ""]
    found.append(f"- How close: {kind.fidelity}" if kind.fidelity else "")
    if kind.needs_training:
        found.append("- Must be calibrated or trained before use")
    if not kind.exact_at_full:
        found.append(f"- Not equal to the dense model with its full budget: {kind.inexact_reason}")
    return "\n".join(filter(None, found))


def described(kind: type) -> dict[str, str]:
    """Return the descriptions of the options, from the class or else from its base classes."""
    found: dict[str, str] = {}
    for base in kind.__mro__[:-1]:
        for name, text in arguments(inspect.cleandoc(base.__doc__ or "")).items():
            found.setdefault(name, text)
    return {name: _spelt_out(name, text) for name, text in found.items()}


def _spelt_out(name: str, text: str) -> str:
    """Replace a reference such as "As in `Strategy`" by the description of the option there."""
    for base in (Strategy, TokenStrategy):
        refers = re.match(rf"(?:Of|As in) `{base.__name__}`(?:[;.:] ?)?", text)
        if refers is not None:
            whole = arguments(inspect.cleandoc(base.__doc__ or "")).get(name, "")
            rest = text[refers.end() :]
            return whole if "None" in whole and "None" in rest else f"{whole} {rest}".strip()
    return text


def arguments(docstring: str) -> dict[str, str]:
    """Return the descriptions in the section ``Args:`` by name, each on one line."""
    section = re.search(r"^Args:\n((?: .*\n?|\n(?= ))+)", docstring, re.MULTILINE)
    found: dict[str, str] = {}
    for names, text in re.findall(
        r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE
    ):
        said = _markdown(" ".join(text.split())).replace("|", "\\|")
        found |= dict.fromkeys(names.split(", "), said)
    return found


def _markdown(text: str) -> str:
    """Replace double backticks by single ones, which the rest of the site uses."""
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def places() -> dict[str, str]:
    """Return the page of the reference with the entry of each name (without ``sparsiattn.``)."""
    pages = sorted(REFERENCE.glob("*.md"))
    return {name: page.stem for page in pages for name in ENTRY.findall(page.read_text())}


def moved() -> str:
    """Return anchors for old addresses of names, and the script that redirects to their entries.

    Public names are redirected from the path of their module, too.
    """
    found = {}
    for name, page in places().items():
        public = getattr(sparsiattn, name) if name in sparsiattn.__all__ else None
        home = getattr(public, "__module__", "sparsiattn")
        for old in (f"sparsiattn.{name}", f"{home}.{name}"):
            found[old] = f"{page}/#sparsiattn.{name}"
    anchors = "".join(f'<a id="{old}"></a>' for old in found)
    return f"<div>{anchors}</div>\n\n{TO_NEW_PLACE % json.dumps(found)}"


def index() -> str:
    """Return a table of the public names, with a link and the first sentence of each docstring."""
    rows = ["| name | what it is |", "| --- | --- |"]
    for name, page in sorted(places().items(), key=lambda place: place[0].lower()):
        if name in sparsiattn.__all__:
            rows.append(f"| [`{name}`]({page}.md#sparsiattn.{name}) | {_sentence(name)} |")
    return "\n".join(rows)


def _sentence(name: str) -> str:
    """Return the first sentence of a docstring; empty for values, which have that of their type."""
    thing = getattr(sparsiattn, name)
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return ""
    paragraph = " ".join(inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0].split())
    first = re.split(r"(?<!\be\.g)(?<!i\.e)[.:;] ", paragraph)[0].rstrip(".:")
    return _markdown(first).replace("|", "\\|")


FILLED: dict[str, Callable[[], str]] = {
    "strategies: attention": partial(strategies, "attention"),
    "strategies: tokens": partial(strategies, "tokens"),
    "strategies: both": partial(strategies, "both"),
    "public names": index,
    "anchors": moved,
}


def filled(markdown: str) -> str:
    """Return a page with its marks replaced."""
    for mark, content in FILLED.items():
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", content())
    return markdown


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: called for a page before it becomes HTML."""
    return filled(markdown)
