"""Draws ``docs/assets/photo.jpg``: what two patches of a photo attend to, and which keys stay.

``python benchmarks/photo.py --shared DIR --wheels DIR --photo FILE`` takes a ViT-S/14 with real
weights, as ``python benchmarks/quality`` does. The photo of Eileen Collins by NASA is in the public
domain; scikit-image brings it (``skimage/data/astronaut.png``).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from quality.models import SUBJECTS
from quality.sources import ROOT, Sources

import sparsiattn

ASSETS = ROOT / "docs" / "assets"
# of the overview that `show` draws: the first two queries, without title and table
LEFT, TOP, RIGHT, BOTTOM = 0.0, 0.058, 0.772, 0.693


def overview(sources: Sources, photo: Path) -> Image.Image:
    """What `show` draws of a photo, as a picture."""
    subject = SUBJECTS["s14-518"]
    model = subject.model(sources)
    image = sources.loader(subject.name)["preprocess"]([photo], subject.size)
    with sparsiattn.patch(model, "connectivity", k=0.1):
        shown = sparsiattn.show(model, image)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "overview.png"
        shown.save(path)
        return Image.open(path).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--photo", type=Path, required=True, help="skimage's data/astronaut.png")
    given = parser.parse_args()
    drawn = overview(Sources(given.shared, given.wheels), given.photo)
    width, height = drawn.size
    box = (LEFT * width, TOP * height, RIGHT * width, BOTTOM * height)
    drawn.crop(tuple(map(round, box))).save(ASSETS / "photo.jpg", quality=90)


if __name__ == "__main__":
    main()
