"""`AttentionView`: the result of `show`, and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from sparsiattn.analysis.visualization import figures
from sparsiattn.analysis.visualization.html_page import page
from sparsiattn.analysis.visualization.result import AttentionRecord
from sparsiattn.errors import InvalidOption

PAGES = (".html", ".htm")
PICTURES = (".png", ".svg", ".pdf")


def check_view(path: Path, view: str) -> None:
    """Refuse a file that `AttentionView.save` cannot write.

    Raises:
        InvalidOption: Another suffix.
        UnknownName: A picture of no such view.
    """
    suffix = path.suffix.lower()
    if suffix not in (*PAGES, *PICTURES):
        raise InvalidOption(
            f"show() writes .html, .png, .svg and .pdf, got {path.name!r}: name the file so"
        )
    if suffix in PICTURES:
        figures.check_view(view)


@dataclass(frozen=True, eq=False)
class AttentionView(AttentionRecord):
    """A patched model's attention in one image, and its pictures.

    Index it by a site's name or position.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> with sparsiattn.patch(model, "topk", k=0.25):
    ...     view = sparsiattn.show(model, tiny_images(1))
    >>> view.title, [site.name for site in view.sites]
    ('VisionTransformer, topk k=0.25', ['blocks.0.attn', 'blocks.1.attn'])
    """

    def figure(self, view: str = "overview", site: str | int | None = None) -> Any:
        """Draw a matplotlib figure (needs the ``viz`` extra).

        Args:
            view: ``"overview"`` compares exact attention with the pattern; ``"layers"`` shows every
                layer; ``"heads"`` shows every head of ``site``; ``"tokens"`` shows dropped and
                merged tokens; ``"density"`` shows the kept shares by layer and head.
            site: Name or index of a site; None for the middle one.

        Returns:
            The figure.

        Raises:
            UnknownName: There is no such view or site.
            InvalidOption: There is nothing to draw in this view, or matplotlib is not installed.
        """
        return figures.draw(self, view, site)

    def html(self) -> str:
        """A self-contained HTML page: hover over a patch to see its keys."""
        return page(self)

    def save(
        self, path: str | PathLike[str], view: str = "overview", site: str | int | None = None
    ) -> Path:
        """Write a picture or the page.

        Args:
            path: The file; its suffix sets the format: ``.png``, ``.svg``, ``.pdf`` or ``.html``.
            view: As in `figure`; the page has all views.
            site: As in `figure`.

        Returns:
            The path.

        Raises:
            InvalidOption: The suffix is not supported, or as in `figure`.
        """
        path = Path(path)
        check_view(path, view)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in PAGES:
            path.write_text(self.html(), encoding="utf-8")
        else:
            self.figure(view, site).savefig(path, dpi=120, facecolor="white")
        return path

    def _repr_html_(self) -> str:
        """The page in a notebook."""
        return (
            '<iframe style="width:100%;height:900px;border:0" sandbox="allow-scripts" '
            f'srcdoc="{escape(self.html(), quote=True)}"></iframe>'
        )

    def __repr__(self) -> str:
        return f"<AttentionView: {self.title}, {len(self.sites)} sites>"
