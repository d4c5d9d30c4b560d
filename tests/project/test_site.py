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

pytestmark = pytest.mark.slow
pytest.importorskip("mkdocs", reason="needs sparsiattn[docs]")

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=15000", "--dump-dom",
]  # fmt: skip


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
    surroundings = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
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


def browse(url: str, profile: Path, size: str = "1200,900") -> tuple[str, list[str]]:
    """The page after its scripts ran, and what they complained of."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--window-size={size}", f"--user-data-dir={profile}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, said


def test_links_and_pictures_of_every_page_are_there(site: Path) -> None:
    for page in pages(site):
        text = (site / page / "index.html").read_text()
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"(https?:|mailto:|data:|#|/)", target):
                continue
            path, _, anchor = target.partition("#")
            file = (site / page / path.partition("?")[0]).resolve()
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{page or 'home'} links to {target}"
            if anchor and file.suffix == ".html":
                assert f'id="{anchor}"' in file.read_text(), f"{page or 'home'}: no {target}"


def test_every_public_name_has_an_entry(site: Path) -> None:
    """Names that are packages as well (`strategies`, `kernels`) could be described as those."""
    entries = set(re.findall(r'id="([\w.]+)"', (site / "api" / "index.html").read_text()))
    for name in sparsiattn.__all__:
        home = getattr(getattr(sparsiattn, name), "__module__", "")
        if not home.startswith("sparsiattn"):  # an alias does not say where it was defined
            assert any(entry.endswith(f".{name}") for entry in entries), name
        else:
            assert entries & {f"sparsiattn.{name}", f"{home}.{name}"}, name


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("size", ["1200,900", "420,900"])
def test_pages_open_without_a_word_on_the_console(
    site: Path, address: str, tmp_path: Path, size: str
) -> None:
    for page in pages(site):
        text, said = browse(f"{address}/{page}", tmp_path / "profile", size)
        assert "</html>" in text
        assert said == [], f"{page or 'home'} at {size}"


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
