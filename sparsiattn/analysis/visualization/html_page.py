"""The HTML page of an `AttentionRecord`: a single file that needs no network."""

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

from sparsiattn.analysis.visualization.result import AttentionRecord, BlockTokens, SiteAttention

SMALL = 96  # pixels; smaller images are stored losslessly and drawn as squares


class Blob:
    """A sequence of arrays, aligned to four bytes as JavaScript's typed arrays require."""

    def __init__(self) -> None:
        self.file = io.BytesIO()

    def add(self, values: Tensor, kind: str) -> list[int]:
        """Append an array.

        Args:
            values: Array of any shape.
            kind: numpy's dtype, little-endian.

        Returns:
            Byte offset and number of elements of the array.
        """
        data = np.ascontiguousarray(values.numpy()).astype(kind).tobytes()
        location = [self.file.tell(), values.numel()]
        self.file.write(data + bytes(-len(data) % 4))
        return location

    def text(self) -> str:
        """The compressed data as base64."""
        return base64.b64encode(zlib.compress(self.file.getvalue(), 9)).decode("ascii")


def page(record: AttentionRecord) -> str:
    """The whole page as text."""
    blob = Blob()
    data = {
        "title": record.title,
        "size": list(record.pixels.shape[:2]),
        "image": picture(record.pixels),
        "small": max(record.pixels.shape[:2]) < SMALL,
        "step": record.step,
        "points": [list(point) for point in record.points],
        "sites": [_site_data(site, blob) for site in record.sites],
        "tokens": [_block_data(block, blob) for block in record.tokens],
    }
    parts = {
        "TITLE": escape(record.title),
        "STYLE": _file("page.css"),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "BLOB": blob.text(),
        "SCRIPT": _file("tokens.js") + _file("page.js"),
    }
    # a single pass, so that placeholders inside the data are not replaced
    return re.sub(r"@@([A-Z]+)@@", lambda placeholder: parts[placeholder[1]], _file("page.html"))


def picture(pixels: Tensor) -> str:
    """An image ``[H, W, 3]`` uint8 as a data URL."""
    from PIL import Image

    kind, options = ("png", {}) if max(pixels.shape[:2]) < SMALL else ("jpeg", {"quality": 90})
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _site_data(site: SiteAttention, blob: Blob) -> dict[str, Any]:
    """The data of a site for ``page.js``; ``at`` has the locations of its arrays in the blob."""
    data = site.to_dict()
    if site.place is None or site.key_place is None:
        return {**data, "at": None}
    is_dropped = site.key_place < 0
    top = site.exact.amax(-1)
    codes = (site.exact / top.clamp_min(1e-30)[..., None]).sqrt() * 255
    arrays = {
        "lookup": (site.lookup, "<i4"),
        "place": (site.place, "<i4"),
        "keyIndex": (torch.where(is_dropped, -1, site.key_place % site.keys), "<i4"),
        "keyWindow": (torch.where(is_dropped, -1, site.key_place // site.keys), "<i4"),
        "queryToken": (site.queries, "<i4"),
        "codes": (codes.round().clamp(0, 255), "<u1"),
        "top": (top, "<f4"),
        # eight keys per byte, the first key in the highest bit
        "kept": (torch.from_numpy(np.packbits(site.kept.numpy(), axis=-1)), "<u1"),
        "mass": ((site.exact * site.kept).sum(-1), "<f4"),
        "background": (site.background, "<f4"),
    }
    return {
        **data,
        "background": bool(site.background.any()),
        "keyGrid": list(site.key_place.shape),
        "at": {name: blob.add(*array) for name, array in arrays.items()},
    }


def _block_data(block: BlockTokens, blob: Blob) -> dict[str, Any]:
    location = blob.add(block.place, "<i4")
    return {**block.to_dict(), "grid": list(block.place.shape), "place": location}


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
