"""The page that `show` writes: what is in it, and that it works in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparsiattn
from sparsiattn.analysis.visualization import AttentionView
from sparsiattn.testing import tiny_images, tiny_vit
from tests.support import zoo


def shown(strategy: str, **options: Any) -> AttentionView:
    model = tiny_vit()
    with sparsiattn.patch(model, strategy, **options):
        return sparsiattn.show(model, tiny_images(1))


def parts(page: str) -> tuple[dict[str, Any], bytes]:
    """The page's JSON and its arrays."""
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    blob = re.search(r'id="blob">(.*?)</script>', page, re.S)
    assert data is not None
    assert blob is not None
    return json.loads(data[1]), zlib.decompress(base64.b64decode(blob[1]))


def array(blob: bytes, at: list[int], kind: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(blob, kind, at[1], at[0]).copy())


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = shown("connectivity", k=0.2).html()
    assert "connectivity k=0.2</title>" in page
    assert "@@" not in page
    assert not re.search(
        r"(?:https?:)?//[a-z]+\.", re.sub(r'id="blob">.*?<', "<", page, flags=re.S)
    )
    assert "default-src 'none'" in page


def test_names_from_outside_stay_text() -> None:
    found = shown("topk", k=0.2)
    odd = AttentionView(
        "</script><b>@@BLOB@@", {"name": "x"}, found.pixels, found.sites, (), found.points
    )  # fmt: skip
    page = odd.html()
    assert "<b>" not in page
    assert parts(page)[0]["title"] == "</script><b>@@BLOB@@, x"


@pytest.mark.parametrize("strategy", ["connectivity", "hybrid"])
def test_attention_comes_back_out_of_the_page(strategy: str) -> None:
    found = shown(strategy, k=0.2, **({"layers": [0]} if strategy == "hybrid" else {}))
    data, blob = parts(found.html())
    for site, about in zip(found.sites, data["sites"], strict=True):
        assert about["mass"] == pytest.approx(site.mass.tolist(), abs=1e-6)
        at, shape = about["at"], site.exact.shape
        codes = array(blob, at["codes"], "<u1").view(shape) / 255
        top = array(blob, at["top"], "<f4").view(shape[:2])[..., None]
        assert torch.allclose(top * codes**2, site.exact, atol=0.005 * float(site.exact.max()))
        bits = np.frombuffer(blob, "<u1", at["kept"][1], at["kept"][0]).reshape(*shape[:2], -1)
        kept = torch.from_numpy(np.unpackbits(bits, axis=-1, count=shape[2])).bool()
        assert torch.equal(kept, site.kept)
        mass = array(blob, at["mass"], "<f4").view(shape[:2])[..., None]
        background = array(blob, at["background"], "<f4").view(shape[:2])[..., None]
        # what the page computes: the pattern's softmax from the exact one
        assert torch.allclose(site.exact * kept * (1 - background) / mass, site.pattern, atol=1e-5)
        lookup = array(blob, at["lookup"], "<i4").view(site.lookup.shape)
        assert torch.equal(lookup, site.lookup.int())


def test_a_notebook_gets_the_page_in_a_frame() -> None:
    html = shown("topk", k=0.2)._repr_html_()
    assert html.startswith("<iframe")
    assert html.count('"') == html.count('="') * 2  # nothing inside ends the attribute


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom",
]  # fmt: skip
# Runs in the page: moves the pointer, presses keys, and notes what is seen.
PROBE = """<script>
(async () => {
  const wait = () => new Promise((done) => setTimeout(done, 30));
  const root = document.documentElement, photo = document.getElementById("photo"), seen = {};
  for (let i = 0; i < 200 && root.dataset.ready !== "yes"; i++) await wait();
  const pixels = () => photo.toDataURL();
  const text = () => document.getElementById("where").textContent;
  const hover = (x, y) => {
    const box = photo.getBoundingClientRect();
    photo.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, pointerType: "mouse",
      clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
  };
  const press = (key) => photo.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const readout = document.getElementById("readout");
  const note = (name) => { seen[name] = [text(), pixels(), readout.textContent]; };
  note("start");
  hover(0.95, 0.06); note("hover");
  press("ArrowLeft"); note("left");
  hover(0.5, 0.5); note("pinned");
  press("Escape"); hover(0.5, 0.5); note("free");
  press("PageUp"); note("layer");
  document.querySelector("[data-mode=exact]").click(); note("exact");
  document.querySelector("[data-mode=kept]").click(); note("kept");
  document.querySelectorAll("#heads button")[1].click(); note("head");
  const { left, top } = photo.getBoundingClientRect();
  const tap = { bubbles: true, pointerType: "touch", clientX: left + 2, clientY: top + 2 };
  photo.dispatchEvent(new PointerEvent("pointerdown", tap)); note("touch");
  const theme = root.dataset.theme;
  document.getElementById("theme").click();
  seen.theme = [theme, root.dataset.theme, getComputedStyle(document.body).backgroundColor];
  seen.wide = document.documentElement.scrollWidth - innerWidth;
  seen.tokens = [...document.querySelectorAll("#tokens figcaption")].map((one) => one.textContent);
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = btoa(JSON.stringify(seen));
  document.body.append(out);
})();
</script></body>"""


def browse(page: Path, size: str) -> dict[str, Any]:
    """What the probe saw; fails on any console error."""
    assert CHROMIUM is not None
    page.write_text(page.read_text().replace("</body>", PROBE), encoding="utf-8")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, f"--window-size={size}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert found is not None, done.stdout[-2000:]
    return json.loads(base64.b64decode(found[1]))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("size", ["1200,900", "500,900"])
def test_hovering_keys_and_touch_in_a_browser(tmp_path: Path, size: str) -> None:
    found = shown("connectivity", k=0.2)
    seen = browse(found.save(tmp_path / "a.html"), size)
    assert "patch (2, 2)" in seen["start"][0]
    assert "blocks.1.attn, mean of heads, patch (0, 7) of 8 x 8" in seen["hover"][0]
    assert "patch (0, 6)" in seen["left"][0]
    assert seen["pinned"] == seen["left"]
    assert "patch (4, 4)" in seen["free"][0]
    assert "blocks.0.attn" in seen["layer"][0]
    assert "head 0" in seen["head"][0]
    assert "patch (0, 0)" in seen["touch"][0]
    names = ["start", "hover", "left", "free", "layer", "exact", "kept", "head", "touch"]
    assert len({seen[name][1] for name in names}) == len(names)  # every step draws another picture
    query = found["blocks.1.attn"].query(0, 7)
    kept = found["blocks.1.attn"].kept[:, query].sum(-1).float().mean()
    assert f"Keys kept{kept:g} of 65" in seen["hover"][2]
    assert set(seen["theme"][:2]) == {"light", "dark"}
    assert seen["wide"] <= 0
    assert seen["tokens"] == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("host", ["merge", "fused", "swin", "hiera"])
def test_other_pages_work_in_a_browser(tmp_path: Path, host: str) -> None:
    if host in ("swin", "hiera"):
        model = zoo.build(host)
        sparsiattn.patch(model, "connectivity", k=0.25)
        found = sparsiattn.show(model, zoo.images(model, 1))
    elif host == "merge":
        found = shown("token_merge", r=12)
    else:
        found = shown("token_drop", keep=0.5, fuse=True, layers=[0])
    seen = browse(found.save(tmp_path / "a.html"), "1200,900")
    blocks = [  # those that change something
        block
        for i, block in enumerate(found.tokens)
        if i == 0 or not torch.equal(block.place, found.tokens[i - 1].place)
    ]
    captions = [f"{block.name}: {block.count} of {block.place.numel()}" for block in blocks]
    assert seen["tokens"] == captions
    if host == "hiera":
        assert "divides the image into windows" in seen["hover"][0]
    else:
        assert "dropped" not in seen["start"][0]
        assert seen["hover"][1] != seen["free"][1]
