"""What the site takes from the project: version, addresses, machine; and what each page says of
itself: a description for search engines, the dark twin of a picture where there is one, and which
cells of tables hold prose."""

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
"""Labels of `[project.urls]`, in the order in which they are looked for."""

LENGTH = 155  # characters of a description that search engines show
PROSE = 60  # characters from which a cell needs a column of some width
BEGINNING = re.compile(r"[A-Z`*\[]")  # of a paragraph that stands for itself
CELL = re.compile(r"<td(?P<look>[^>]*)>(?P<content>.*?)</td>", re.DOTALL)
IMAGE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s]+)\.(?P<kind>svg|png|jpg)\)")


def on_config(config: Any, **_: Any) -> Any:
    """mkdocs: fills in what mkdocs.yml leaves to pyproject.toml."""
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
    """The address under the first of some labels."""
    return next((urls[label] for label in labels if label in urls), None)


def version(settings: dict[str, Any]) -> str:
    """That of pyproject.toml, or of the installed package where it is not written there."""
    return str(settings.get("version", __version__))


def footer(current: str) -> str:
    """Version, and where the outputs on the pages come from."""
    card = timing.machine()
    threads = "1 thread" if card["threads"] == 1 else f"{card['threads']} threads"
    return (
        f"sparsiattn {current}. Outputs below code were printed when this site was built: "
        f"{card['processor']}, {threads}, torch {card['torch']}, timm {card['timm']}, "
        f"{card['date']}. Times differ from machine to machine."
    )


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """mkdocs: a page before it becomes HTML."""
    page.meta.setdefault("description", description(markdown))
    source = Path(page.file.abs_src_path or config.docs_dir)
    return IMAGE.sub(lambda image: both_themes(image, source.parent), markdown)


def description(markdown: str) -> str:
    """The first paragraph of a page as plain text, cut after a word."""
    text = re.sub(r"<!--.*?-->|```.*?```", "", markdown, flags=re.DOTALL)
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    prose = next((paragraph for paragraph in paragraphs if BEGINNING.match(paragraph)), "")
    plain = re.sub(r"!?\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", prose)
    plain = re.sub(r"[`*]|\[\^\w+\]", "", plain)
    if len(plain) <= LENGTH:
        return plain
    return plain[:LENGTH].rpartition(" ")[0].rstrip(",;:") + " ..."


def both_themes(image: re.Match[str], folder: Path) -> str:
    """A picture, and beside it ``NAME-dark`` for the dark theme where that file exists."""
    dark = f"{image['path']}-dark.{image['kind']}"
    if not (folder / dark).is_file():
        return image[0]
    light = f"{image['path']}.{image['kind']}"
    text = image["text"]
    return f"![{text}]({light}#only-light)![{text}]({dark}#only-dark)"


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs: a page as HTML. Cells with much text are marked, so that they get room to wrap."""
    return CELL.sub(_with_room, html)


def _with_room(cell: re.Match[str]) -> str:
    text = re.sub(r"<[^>]+>", "", cell["content"])
    if len(text) < PROSE or "class=" in cell["look"]:
        return cell[0]
    return f'<td class="prose"{cell["look"]}>{cell["content"]}</td>'
