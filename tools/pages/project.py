"""Adds facts about the project to the site (version, URLs, machine), and to each page a description
for search engines, dark variants of pictures, and a mark on table cells with much text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sparsiattn import __version__
from sparsiattn.runtime import timing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ("repository", "source", "homepage")
SITE = ("documentation", "docs")
"""Labels of `[project.urls]`, in order of preference."""

LENGTH = 155  # characters of a description that search engines show
PROSE = 60  # characters; cells with more need a wider column
BEGINNING = re.compile(r"[A-Z`*\[]")  # first character of a paragraph of prose
CELL = re.compile(r"<td(?P<look>[^>]*)>(?P<content>.*?)</td>", re.DOTALL)
IMAGE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s]+)\.(?P<kind>svg|png|jpg)\)")


def on_config(config: Any, **_: Any) -> Any:
    """mkdocs: sets options that mkdocs.yml does not set, from pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = {label.lower(): url for label, url in settings.get("urls", {}).items()}
    config.repo_url = config.repo_url or first(urls, SOURCE)
    config.site_url = config.site_url or first(urls, SITE)
    if config.repo_url:
        config.repo_name = config.repo_name or config.repo_url.rstrip("/").rpartition("/")[2]
        config.edit_uri = config.edit_uri or "edit/main/docs/"
    config.copyright = footer(version(settings))
    return config


def first(urls: dict[str, str], labels: tuple[str, ...]) -> str | None:
    """Return the URL of the first label that has one."""
    return next((urls[label] for label in labels if label in urls), None)


def version(settings: dict[str, Any]) -> str:
    """Return the version of pyproject.toml, or of the installed package if it has none."""
    return str(settings.get("version", __version__))


def footer(current: str) -> str:
    """Return the version, and on which machine the outputs on the pages were printed."""
    card = timing.machine()
    threads = "1 thread" if card["threads"] == 1 else f"{card['threads']} threads"
    return (
        f"sparsiattn {current}. Outputs below code were printed when this site was built: "
        f"{card['processor']}, {threads}, torch {card['torch']}, timm {card['timm']}, "
        f"{card['date']}. Times differ from machine to machine."
    )


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """mkdocs: called for a page before it becomes HTML."""
    page.meta.setdefault("description", description(markdown))
    source = Path(page.file.abs_src_path or config.docs_dir)
    return IMAGE.sub(lambda image: both_themes(image, source.parent), markdown)


def description(markdown: str) -> str:
    """Return the first paragraph of a page as plain text, cut at the end of a word."""
    text = re.sub(r"<!--.*?-->|```.*?```", "", markdown, flags=re.DOTALL)
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    prose = next((paragraph for paragraph in paragraphs if BEGINNING.match(paragraph)), "")
    plain = re.sub(r"!?\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", prose)
    plain = re.sub(r"[`*]|\[\^\w+\]", "", plain)
    if len(plain) <= LENGTH:
        return plain
    return plain[:LENGTH].rpartition(" ")[0].rstrip(",;:") + " ..."


def both_themes(image: re.Match[str], folder: Path) -> str:
    """Return a picture, followed by ``NAME-dark`` for the dark theme if that file exists."""
    dark = f"{image['path']}-dark.{image['kind']}"
    if not (folder / dark).is_file():
        return image[0]
    light = f"{image['path']}.{image['kind']}"
    text = image["text"]
    return f"![{text}]({light}#only-light)![{text}]({dark}#only-dark)"


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs: called for a page as HTML. Marks cells with much text, which get a wider column."""
    return CELL.sub(_with_room, html)


def _with_room(cell: re.Match[str]) -> str:
    text = re.sub(r"<[^>]+>", "", cell["content"])
    if len(text) < PROSE or "class=" in cell["look"]:
        return cell[0]
    return f'<td class="prose"{cell["look"]}>{cell["content"]}</td>'
