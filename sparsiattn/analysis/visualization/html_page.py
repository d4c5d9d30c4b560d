"""The page of a `AttentionView`: one HTML file with its data inside, no network needed."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsiattn.analysis.visualization.result import AttentionView, BlockTokens, SiteShown

SMALL = 96  # pixels: below it an image is stored without loss and drawn in squares


class Blob:
    """Arrays one after the other, each at a multiple of four bytes."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, values: Tensor, kind: str) -> list[int]:
        """Where an array lies: its first byte and its number of elements. kind: numpy's dtype,
        little-endian."""
        data = np.ascontiguousarray(values.numpy()).astype(kind).tobytes()
        where = [self.size, values.numel()]
        self.parts.append(data + bytes(-len(data) % 4))
        self.size += len(self.parts[-1])
        return where

    def text(self) -> str:
        """Deflated, as base64."""
        return base64.b64encode(zlib.compress(b"".join(self.parts), 9)).decode("ascii")


def page(shown: AttentionView) -> str:
    """The whole page as text."""
    blob = Blob()
    data = {
        "title": shown.title,
        "size": list(shown.pixels.shape[:2]),
        "image": picture(shown.pixels),
        "small": max(shown.pixels.shape[:2]) < SMALL,
        "step": shown.step,
        "points": [list(point) for point in shown.points],
        "sites": [_site(site, blob) for site in shown.sites],
        "tokens": [_tokens(block, blob) for block in shown.tokens],
    }
    parts = {
        "TITLE": escape(shown.title),
        "STYLE": _file("page.css"),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "BLOB": blob.text(),
        "SCRIPT": _file("tokens.js") + _file("page.js"),
    }
    # one pass, so that nothing inside the data is taken for a mark
    return re.sub(r"@@([A-Z]+)@@", lambda mark: parts[mark[1]], _file("page.html"))


def picture(pixels: Tensor) -> str:
    """``[H, W, 3]`` uint8 as a data URL."""
    from PIL import Image

    kind = "png" if max(pixels.shape[:2]) < SMALL else "jpeg"
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, kind, **({} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _site(site: SiteShown, blob: Blob) -> dict[str, Any]:
    about = site.to_dict()
    if site.place is None or site.key_place is None:
        return {**about, "at": None}
    gone = site.key_place < 0
    local = torch.where(gone, -1, site.key_place % site.keys)
    window = torch.where(gone, -1, site.key_place // site.keys)
    top = site.exact.amax(-1)
    codes = (site.exact / top.clamp_min(1e-30)[..., None]).sqrt() * 255
    return {
        **about,
        "background": bool(site.background.any()),
        "keyGrid": list(site.key_place.shape),
        "at": {
            "lookup": blob.add(site.lookup, "<i4"),
            "place": blob.add(site.place, "<i4"),
            "keyIndex": blob.add(local, "<i4"),
            "keyWindow": blob.add(window, "<i4"),
            "queryToken": blob.add(site.queries, "<i4"),
            "codes": blob.add(codes.round().clamp(0, 255), "<u1"),
            "top": blob.add(top, "<f4"),
            "kept": blob.add(_bits(site.kept), "<u1"),
            "mass": blob.add((site.exact * site.kept).sum(-1), "<f4"),
            "background": blob.add(site.background, "<f4"),
        },
    }


def _tokens(block: BlockTokens, blob: Blob) -> dict[str, Any]:
    where = blob.add(block.place, "<i4")
    return {**block.to_dict(), "grid": list(block.place.shape), "place": where}


def _bits(kept: Tensor) -> Tensor:
    """``[..., Nk]`` bool as bytes of eight, the first key in the highest bit."""
    return torch.from_numpy(np.packbits(kept.numpy(), axis=-1))


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
