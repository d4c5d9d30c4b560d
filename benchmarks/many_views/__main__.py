"""``python benchmarks/many_views --shared DIR --wheels DIR``: recall of true matches.

Views of one photo under known homographies, centred and normalised features of a ViT-S/14 as
queries and keys of one global layer. The scale of its logits is fixed on a photo set apart.
``--scenes`` photos, ``--views`` of each, ``--size`` pixels a side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import common  # noqa: E402
import torch  # noqa: E402
from quality.models import SUBJECTS  # noqa: E402
from quality.sources import ROOT, Sources  # noqa: E402

from many_views import recall  # noqa: E402
from many_views.scenes import Scene  # noqa: E402
from sparsiattn.registry import REGISTRY  # noqa: E402

SHARES = (0.05, 0.1, 0.25)
LINES: tuple[dict[str, Any], ...] = (
    {"strategy": "topk"},
    {"strategy": "connectivity"},
    {"strategy": "connectivity", "tile": (4, 4)},
    {"strategy": "connectivity", "tile": (2, 2)},
    {"strategy": "local"},
    {"strategy": "random"},
)
PATCH = 14
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def typed(line: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in line.items()).replace("'", '"')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--size", type=int, default=392)
    given = parser.parse_args()
    torch.manual_seed(0)
    sources = Sources(given.shared, given.wheels)
    model = SUBJECTS["s14-518"].model(sources)
    model.set_input_size(img_size=given.size)
    photos = sources.photos(given.scenes + 1)
    rows: dict[str, list[dict[str, Any]]] = {}
    scale = 0.0
    with torch.inference_mode():
        for seed, photo in enumerate(photos):
            scene = Scene.of(photo, given.views, given.size, seed)
            features = recall.descriptors(model, (scene.images - MEAN) / STD)
            matches = recall.others(scene.matches(given.size // PATCH))
            if not seed:  # the photo set apart
                scale = recall.best_scale(features, matches)
                continue
            for line, row in scored(features, matches, given.views, scale):
                rows.setdefault(line, []).append(row)
            print(photo.name, {line: round(found[-1]["recall"], 3) for line, found in rows.items()})
    about = {"scenes": given.scenes, "views": given.views, "size": given.size, "scale": scale}
    found = [{"line": line, **recall.mean(row)} for line, row in rows.items()]
    common.write("many-views-recall", {**about, "rows": found})


def scored(features: Any, matches: Any, views: int, scale: float) -> Any:
    """Each line at each budget on one scene."""
    for options in LINES:
        for k in SHARES:
            line = {**options, "k": k}
            strategy = REGISTRY.get("strategies", line["strategy"])(**_without_name(line))
            inputs = recall.inputs_of(features, views, strategy, scale)
            yield typed(line), recall.recall(recall.kept(inputs, strategy), matches)


def _without_name(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "strategy"}


if __name__ == "__main__":
    main()
