"""Video encoders of transformers with tiles of frames, rows and columns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn import InvalidOption
from sparsiattn.analysis.visualization.token_places import places_of
from tests.attention.test_token_order import Patch, by_boxes

transformers = pytest.importorskip("transformers")

SIZE = 4, 8, 8
"""Frames (two of the video each), rows and columns of patches."""
PLAIN = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 4}


def videomae() -> nn.Module:
    config = transformers.VideoMAEConfig(
        **PLAIN, num_hidden_layers=2, image_size=32, num_frames=8, tubelet_size=2
    )
    return transformers.VideoMAEModel(config)  # type: ignore[no-any-return]


def vivit() -> nn.Module:
    config = transformers.VivitConfig(
        **PLAIN, num_hidden_layers=2, image_size=32, num_frames=8, tubelet_size=[2, 4, 4]
    )
    return transformers.VivitModel(config)  # type: ignore[no-any-return]


def vjepa2() -> nn.Module:
    config = transformers.VJEPA2Config(
        hidden_size=48, num_attention_heads=4, num_hidden_layers=2, patch_size=4, crop_size=32,
        frames_per_clip=8, mlp_ratio=2.0, pred_hidden_size=48, pred_num_attention_heads=4,
        pred_num_hidden_layers=1,
    )  # fmt: skip
    return transformers.VJEPA2Model(config)  # type: ignore[no-any-return]


HOSTS = {"videomae": (videomae, 0), "vivit": (vivit, 1), "vjepa2": (vjepa2, 0)}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = HOSTS[name][0]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(1, 8, 3, 32, 32)


def run(model: nn.Module, video: Tensor) -> Tensor:
    options = {"skip_predictor": True} if isinstance(model, transformers.VJEPA2Model) else {}
    with torch.no_grad():
        return model(video, **options).last_hidden_state  # type: ignore[no-any-return]


@contextmanager
def in_boxes(tile: Patch, count: int, prefix: int) -> Iterator[None]:
    """Inside the block, the queries of every box keep their strongest keys."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return by_boxes((q, k, v), SIZE, tile, count, prefix)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


@pytest.mark.parametrize("tile", [(2, 4, 4), (4, 2, 4), (1, 4, 4)], ids=str)
@pytest.mark.parametrize("name", HOSTS)
def test_queries_of_a_box_share_their_keys(name: str, tile: Patch) -> None:
    model, video = built(name)
    prefix = HOSTS[name][1]
    with in_boxes(tile, 60, prefix):
        expected = run(model, video)
    with sparsiattn.patch(model, "topk", k=60, tile=tile, input=video) as patch:
        assert all(site.views == 4 for site in patch.sites)
        torch.testing.assert_close(run(model, video), expected, rtol=1e-3, atol=1e-4)
        assert f"tile {tile[0]}x{tile[1]}x{tile[2]}" in str(patch.report())


LINES: list[dict[str, Any]] = [
    {"strategy": "connectivity", "tile": (2, 4, 4), "block": (2, 2, 2), "background": "auto"},
    {"strategy": "connectivity", "tile": (4, 4, 4), "scores": "predictor"},
    {"strategy": "local", "tile": (2, 4, 4), "block": (2, 2, 2)},
    {"strategy": "local", "tile": (3, 4, 4)},
    {"strategy": "random", "tile": (2, 8, 2)},
]


@pytest.mark.parametrize("line", LINES, ids=str)
def test_every_kernel_attends_to_the_same_keys(line: dict[str, Any]) -> None:
    model, video = built("vjepa2")
    dense = run(model, video)
    with sparsiattn.patch(model, **line, k=0.25, kernel="reference", input=video):
        expected = run(model, video)
    for kernel in ("gather", "sdpa"):
        with sparsiattn.patch(model, **line, k=0.25, kernel=kernel, input=video):
            torch.testing.assert_close(run(model, video), expected, rtol=1e-3, atol=1e-4)
    with sparsiattn.patch(model, **line, k=1.0, input=video):
        torch.testing.assert_close(run(model, video), dense, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, dense, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("line", LINES, ids=str)
def test_compiled_code_chooses_the_same_keys(line: dict[str, Any], compiled_native: None) -> None:
    model, video = built("vjepa2")
    with sparsiattn.patch(model, **line, k=0.25, kernel="reference", input=video):
        expected = run(model, video)
    with sparsiattn.patch(model, **line, k=0.25, kernel="native", input=video):
        torch.testing.assert_close(run(model, video), expected, rtol=1e-3, atol=1e-4)


def test_a_patch_with_tiles_of_frames_is_saved(tmp_path: Path) -> None:
    model, video = built("videomae")
    line = {"strategy": "connectivity", "scores": "predictor", "tile": (2, 4, 4)}
    with sparsiattn.patch(model, **line, k=0.25) as patch:
        expected = run(model, video)
        patch.save(tmp_path)
    assert any([2, 4, 4] in json.loads(f.read_text())["strategy"]["options"].values()
               for f in tmp_path.glob("*.json"))  # fmt: skip
    with sparsiattn.load(model, tmp_path):
        assert torch.equal(run(model, video), expected)


def test_places_of_tiles_of_frames() -> None:
    """What a picture of attention marks: frames are below one another."""
    model, video = built("vivit")
    seen: list[Any] = []
    patch = sparsiattn.patch(model, "connectivity", k=0.25, tile=(2, 4, 4), input=video)
    with patch, patch.observing(lambda _, __, inputs: seen.append(inputs)):
        run(model, video)
    inputs = seen[0]
    place = places_of(inputs, None).place
    assert place is not None
    host = inputs.order.pick(torch.device("cpu"))
    assert torch.equal(host[place], torch.arange(4 * 8 * 8).view(32, 8) + 1)


def test_tiles_that_do_not_fit_are_refused() -> None:
    model, video = built("videomae")
    with pytest.raises(InvalidOption, match="4 x 8 x 8 patches; use at most"):
        sparsiattn.patch(model, "connectivity", tile=(2, 16, 4), input=video)
    with pytest.raises(InvalidOption, match="4 x 8 x 8"):
        sparsiattn.patch(model, "connectivity", tile=(8, 4, 4), input=video)
