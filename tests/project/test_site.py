"""The documentation site, built and looked at in a browser."""

from __future__ import annotations

import functools
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import sparsiattn
from tests.support import ROOT
from tests.support.pages import program

SNIPPETS = program("snippets")
pytestmark = pytest.mark.slow
pytest.importorskip("mkdocs", reason="needs sparsiattn[docs]")

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=15000", "--dump-dom",
]  # fmt: skip


ADDRESS = "https://docs.example/sparsiattn/"
# Shows a page in a frame (windows have a least width), and writes down what sticks out of it and
# which pictures did not load.
FRAME = """<body><script>
const asked = new URLSearchParams(location.search), frame = document.createElement("iframe");
frame.style = `width: ${asked.get("width")}px; height: 900px; border: 0`;
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const seen = [...page.images].filter((image) => image.offsetParent);
  document.body.dataset.width = root.clientWidth;
  document.body.dataset.outside = root.scrollWidth - root.clientWidth;
  document.body.dataset.missing = seen.filter((image) => !image.naturalWidth).length;
};
frame.src = "/" + asked.get("page");
document.body.append(frame);
</script></body>"""

# Waits for the search worker in real time, which `--dump-dom` does not, and sends what it found.
SEARCHER = """<script>
(async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  let found = "";
  for (let i = 0; i < 300 && !found; i++) {
    await wait(100);
    const input = document.querySelector("input.md-search__input");
    input.focus();
    input.value = "token_merge";
    input.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true, key: "e" }));
    const links = document.querySelectorAll(".md-search-result__list a");
    found = [...links].map((link) => link.getAttribute("href")).join(" ");
  }
  await fetch("/found", { method: "POST", body: found || "nothing" });
})();
</script></body>"""


class _Quiet(SimpleHTTPRequestHandler):
    found: queue.Queue[str] = queue.Queue()

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.found.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    surroundings = os.environ | {"NO_MKDOCS_2_WARNING": "1", "SITE_URL": ADDRESS}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=surroundings, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def pages(site: Path) -> list[str]:
    found = sorted(str(path.parent.relative_to(site)) for path in site.rglob("index.html"))
    return ["" if name == "." else f"{name}/" for name in found]


def browse(url: str, profile: Path, theme: str) -> tuple[str, list[str]]:
    """The page after its scripts ran, and what they complained of."""
    assert CHROMIUM is not None
    flags = [*FLAGS, *(["--force-dark-mode"] if theme == "dark" else [])]
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, said


def test_links_and_pictures_of_every_page_are_there(site: Path) -> None:
    for page in pages(site):
        text = (site / page / "index.html").read_text()
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"(https?:|mailto:|data:|javascript:|#|/)", target):
                continue
            path, _, anchor = target.partition("#")
            file = (site / page / path.partition("?")[0]).resolve()
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{page or 'home'} links to {target}"
            if anchor and file.suffix == ".html":
                assert f'id="{anchor}"' in file.read_text(), f"{page or 'home'}: no {target}"


def test_every_public_name_has_an_entry(site: Path) -> None:
    """Names that are packages as well (`strategies`, `kernels`) could be described as those."""
    text = "".join(path.read_text() for path in (site / "reference").rglob("index.html"))
    entries = set(re.findall(r'id="([\w.]+)"', text))
    assert {f"sparsiattn.{name}" for name in sparsiattn.__all__} <= entries
    assert set(sparsiattn.list_strategies()) <= entries


def test_outputs_are_on_the_pages(site: Path) -> None:
    """Where a Python block prints without a mark, a block with its output follows."""
    for page in (ROOT / "docs").rglob("*.md"):
        printing = [
            block
            for block in SNIPPETS.blocks(page.read_text())
            if block.runs and block.shows and re.search(r"^print\(", block.code, re.MULTILINE)
        ]
        name = page.relative_to(ROOT / "docs").with_suffix("")
        name = name.parent if name.name == "index" else name
        html = (site / name / "index.html").read_text()
        shown = re.findall(r'class="[^"]*\boutput\b[^"]*"', html)
        assert len(shown) >= len(printing), page.name


def test_pages_say_what_they_are(site: Path) -> None:
    """A title of its own, a description, an icon, the version; and the map of all pages."""
    titles = []
    for page in pages(site):
        text = (site / page / "index.html").read_text()
        titles += re.findall(r"<title>(.*?)</title>", text)
        assert re.search(r'<meta name="description" content="[^"]{10,}"', text), page
        assert 'rel="icon" href="' in text
        assert re.search(r"sparsiattn \d+\.\d+\.\S+\. Outputs below code were printed", text), page
    assert len(titles) == len(set(titles)) == len(pages(site))
    assert not any(title.startswith("sparsiattn - ") for title in titles)
    places = re.findall(r"<loc>(.*?)</loc>", (site / "sitemap.xml").read_text())
    assert set(places) == {ADDRESS + page for page in pages(site)}


def test_pages_lead_to_their_neighbours(site: Path) -> None:
    listed = [page for page in pages(site) if page != "api/"]  # which is in no menu
    ends = [0, 0]
    for page in listed:
        text = (site / page / "index.html").read_text()
        ends[0] += "md-footer__link--prev" not in text
        ends[1] += "md-footer__link--next" not in text
    assert ends == [1, 1]


def test_links_of_the_page_for_wrong_addresses_keep_the_path_of_the_site(site: Path) -> None:
    text = (site / "404.html").read_text()
    links = re.findall(r'(?:href|src)="(/[^"]*)"', text)
    assert links
    assert all(link.startswith("/sparsiattn/") for link in links)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_pages_open_without_a_word_on_the_console_and_fit(
    site: Path, address: str, tmp_path: Path, width: int, theme: str
) -> None:
    (site / "frame.html").write_text(FRAME)
    for page in [*pages(site), "assets/show.html"]:
        url = f"{address}/frame.html?width={width}&page={page}"
        text, said = browse(url, tmp_path / "profile", theme)
        assert said == [], f"{page or 'home'} at {width}"
        assert f'data-width="{width}"' in text
        assert 'data-outside="0"' in text, f"{page or 'home'} is wider than {width} pixels"
        assert 'data-missing="0"' in text, f"{page or 'home'} lacks a picture"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_search_finds_a_strategy(site: Path, address: str, tmp_path: Path) -> None:
    text = (site / "index.html").read_text()
    (site / "searching.html").write_text(text.replace("</body>", SEARCHER))
    assert CHROMIUM is not None
    flags = [flag for flag in FLAGS if "budget" not in flag and "dump" not in flag]
    command = [CHROMIUM, *flags, "--remote-debugging-port=0", f"--user-data-dir={tmp_path}"]
    browser = subprocess.Popen(
        [*command, f"{address}/searching.html"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        found = _Quiet.found.get(timeout=90)
    finally:
        browser.kill()
        browser.wait()
    assert "tokens/" in found
