"""The programs that make the documentation site: outputs of code, entries, pictures, titles."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.pages import program

SNIPPETS = program("snippets")
ASSETS = ROOT / "docs" / "assets"
# drawn in colours that are legible on white and on black
FOR_BOTH_THEMES = {"forward", "packages", "logo", "favicon"}
LARGEST = 1_500_000  # bytes of the live example

PAGE = """# A page

```python
x = 2
print("two", x)
```

- in a list

    ```python
    print(x * 3)
    ```

<!-- no output: a page may say why -->

```python
print("hidden")
```

<!-- not run: needs a GPU -->
```python
print(undefined)
```

```sh
sparsiattn --version
```

<!-- run -->
```sh
echo from the shell
```
"""


@pytest.fixture
def outputs() -> ModuleType:
    pytest.importorskip("mkdocs", reason="needs sparsiattn[docs]")
    return program("outputs")


@pytest.fixture
def project() -> ModuleType:
    return program("project")


def test_blocks_and_their_marks_are_found() -> None:
    found = SNIPPETS.blocks(PAGE)
    assert [block.runs for block in found] == [True, True, True, False, False, True]
    assert [block.shows for block in found] == [True, True, False, True, True, True]
    lines = PAGE.splitlines()
    assert [lines[block.line - 1].strip() for block in found] == [
        block.code.splitlines()[0] for block in found
    ]


def test_blocks_run_in_order_and_share_their_names() -> None:
    printed = list(SNIPPETS.printed("page.md", PAGE))
    assert printed == ["two 2\n", "6\n", "hidden\n", "", "", "from the shell\n"]


@pytest.mark.parametrize("mark", ["not run", "no output", "not run:", "no output: "])
def test_a_mark_needs_a_reason(mark: str) -> None:
    with pytest.raises(SNIPPETS.SnippetFailed, match="say why"):
        SNIPPETS.blocks(f"<!-- {mark} -->\n```python\nx = 1\n```\n")


def test_other_comments_above_a_block_are_no_marks() -> None:
    (block,) = SNIPPETS.blocks("<!-- printed bench -->\n\n```python\nx = 1\n```\n")
    assert block.runs
    assert block.shows


def test_a_failing_block_is_named_with_page_line_and_error() -> None:
    text = "# Page\n\n```python\nx = 1\n```\n\n```python\nprint(x)\nx / 0\n```\n"
    with pytest.raises(SNIPPETS.SnippetFailed) as failed:
        list(SNIPPETS.printed("page.md", text))
    message = str(failed.value)
    assert message.startswith("page.md, block 2 (line 8):")
    assert 'File "page.md", line 9' in message
    assert "ZeroDivisionError" in message


def test_a_failing_command_is_named_with_what_it_said() -> None:
    text = "<!-- run -->\n```sh\necho before; ls /no-such-folder; echo after\n```\n"
    with pytest.raises(SNIPPETS.SnippetFailed, match="before") as failed:
        list(SNIPPETS.printed("page.md", text))
    assert "/no-such-folder" in str(failed.value)
    assert "after\n" not in str(failed.value).split("before")[1]


def test_a_page_leaves_no_module_behind() -> None:
    list(SNIPPETS.printed("left.md", "```python\nx = 1\n```\n"))
    assert "page_left_md" not in sys.modules


def test_outputs_stand_below_their_blocks(outputs: ModuleType) -> None:
    found = SNIPPETS.blocks(PAGE)
    page = outputs.with_outputs(PAGE, found, list(SNIPPETS.printed("page.md", PAGE)))
    below = '```` {{ .text .output title="Output" }}\n{0}two 2\n{0}````'
    assert below.format("").replace("{{", "{").replace("}}", "}") in page
    assert '    ```\n\n    ```` { .text .output title="Output" }\n    6\n    ````' in page
    assert "\nhidden\n" not in page
    assert "\nfrom the shell\n" in page
    assert re.sub(r"\n\n *```` \{.*?\n *````", "", page, flags=re.DOTALL) == PAGE


def test_long_outputs_scroll_and_long_prose_wraps(outputs: ModuleType) -> None:
    text = "```python\nprint(1)\n```\n"
    lines = "\n".join(map(str, range(outputs.LONG + 1)))
    assert ".output .long" in outputs.with_outputs(text, SNIPPETS.blocks(text), [lines])
    prose = "word " * 40
    assert all(len(part) <= outputs.WIDE for part in outputs.wrapped(prose.strip()))
    row = "blocks.0.attn  101     " * 8
    assert outputs.wrapped(row) == [row]


def test_outputs_name_no_folder_of_the_machine(outputs: ModuleType) -> None:
    said = f"{ROOT}/docs/x.md, {Path(json.__file__)}, {Path.home()}/.cache"
    shown = outputs.without_paths(said)
    assert str(ROOT) not in shown
    assert str(Path.home()) not in shown
    assert ".../docs/x.md" in shown


@pytest.fixture
def kept(outputs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook with a cache of its own."""
    monkeypatch.setattr(outputs, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(outputs, "used", set())
    return outputs


def mkdocs_page(path: Path) -> Any:
    return SimpleNamespace(file=SimpleNamespace(abs_src_path=str(path), src_uri=path.name))


def test_a_page_runs_once_and_again_when_its_code_changes(kept: ModuleType, tmp_path: Path) -> None:
    page, counter = tmp_path / "page.md", tmp_path / "runs"
    code = f'```python\nopen({str(counter)!r}, "a").write("x")\nprint("once")\n```\n'
    for text in (code, code, "Other words.\n\n" + code, code.replace('"once"', '"twice"')):
        page.write_text(text)
        shown = kept.on_page_markdown(text, page=mkdocs_page(page))
        assert ("\ntwice\n" if '"twice"' in text else "\nonce\n") in shown.split(".output")[1]
    assert counter.read_text() == "xx"
    assert len(list(kept.CACHE.glob("*.json"))) == 2


def test_results_that_no_page_uses_are_deleted(kept: ModuleType) -> None:
    kept.CACHE.mkdir()
    (kept.CACHE / "old.json").write_text("[]")
    (kept.CACHE / "new.json").write_text("[]")
    kept.used.add(kept.CACHE / "new.json")
    kept.on_post_build()
    assert [path.name for path in kept.CACHE.iterdir()] == ["new.json"]


def test_a_failing_page_is_a_warning_which_strict_builds_end_with(
    kept: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nraise KeyError('gone')\n```\n")
    assert kept.on_page_markdown(page.read_text(), page=mkdocs_page(page)) == page.read_text()
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "block 1 (line 2)" in record.getMessage()
    assert "KeyError: 'gone'" in record.getMessage()


def test_a_picture_with_a_dark_twin_is_shown_by_theme(project: ModuleType, tmp_path: Path) -> None:
    for name in ("plot.svg", "plot-dark.svg", "alone.svg"):
        (tmp_path / name).touch()
    text = "![A plot](plot.svg) ![Alone](alone.svg) ![Set](plot.svg#only-light)"
    shown = project.IMAGE.sub(lambda image: project.both_themes(image, tmp_path), text)
    assert shown == (
        "![A plot](plot.svg#only-light)![A plot](plot-dark.svg#only-dark) "
        "![Alone](alone.svg) ![Set](plot.svg#only-light)"
    )


def test_every_drawn_picture_has_a_dark_twin() -> None:
    for path in ASSETS.glob("*.svg"):
        name = re.sub(r"-(dark|light)$", "", path.stem)
        if name not in FOR_BOTH_THEMES:
            assert (ASSETS / f"{name}-dark.svg").is_file(), path.name


def test_the_live_example_is_small_and_complete() -> None:
    page = (ASSETS / "show.html").read_text()
    assert len(page) < LARGEST
    assert page.rstrip().endswith("</html>")
    assert not re.findall(r'(?:src|href)="https?:', page)


def test_descriptions_are_the_first_paragraph_in_plain_text(project: ModuleType) -> None:
    text = (
        "# Title\n\n```sh\nls\n```\n\nbrings torch.\n\nA [page](x.md) about `show`:\nand *more*.\n"
    )
    assert project.description(text) == "A page about show: and more."
    long = project.description("Words " * 100)
    assert len(long) <= project.LENGTH + 4
    assert long.endswith("Words ...")


def settings_of(project: ModuleType, folder: Path, **given: str) -> Any:
    """What the site takes from a project's file in a folder."""
    asked = {"repo_url": None, "repo_name": None, "site_url": None, "edit_uri": None, **given}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "ROOT", folder)
        return project.on_config(SimpleNamespace(**asked))


def test_addresses_and_version_come_from_the_project(project: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nversion = "7.8.9"\n[project.urls]\nHomepage = "https://a.example"\n'
        'Repository = "https://b.example/x"\nDocumentation = "https://c.example"\n'
    )
    config = settings_of(project, tmp_path)
    assert (config.repo_url, config.repo_name) == ("https://b.example/x", "x")
    assert config.site_url == "https://c.example"
    assert config.edit_uri == "edit/main/docs/"
    assert "7.8.9" in config.copyright
    assert settings_of(project, tmp_path, site_url="https://d.example").site_url.endswith(
        "d.example"
    )


def test_without_addresses_there_is_no_link_to_edit(project: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.0"\n')
    config = settings_of(project, tmp_path)
    assert config.repo_url is config.site_url is config.edit_uri is None


def test_cells_with_much_text_get_room(project: ModuleType) -> None:
    cells = f"<td>short</td><td><code>x</code> {'word ' * 20}</td>"
    shown = project.on_page_content(cells)
    assert shown.count('class="prose"') == 1
    assert shown.startswith("<td>short</td>")
