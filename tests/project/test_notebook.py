"""The notebook: valid, with stored outputs that the present code still gives."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, environment
from tools import notebook as tool

PATH = ROOT / "examples" / "quickstart.ipynb"
NOTEBOOK: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
CELLS = tool.code_cells(NOTEBOOK)
STEPS = ["Inspect", "Patch", "Report", "Compare", "A faster setting", "Show", "Undo"]
MACHINE = r"(?<![\w./:])~?/\w[\w.-]*/|[A-Z]:\\|site-packages|localhost|file://"


class TestStored:
    def test_the_format(self) -> None:
        assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
        names = [cell["id"] for cell in NOTEBOOK["cells"]]
        assert len(set(names)) == len(names)
        for cell in NOTEBOOK["cells"]:
            assert cell["cell_type"] in ("code", "markdown")
            assert isinstance(cell["metadata"], dict)
            assert all(line.endswith("\n") for line in cell["source"][:-1])

    def test_the_steps(self) -> None:
        texts = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "markdown"]
        assert re.findall(r"^## \d\. (.*)$", "\n".join(texts), re.M) == STEPS

    def test_every_cell_ran_in_order(self) -> None:
        assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
        for cell in CELLS:
            assert cell["outputs"], "".join(cell["source"])

    def test_there_are_no_errors_or_warnings(self) -> None:
        for cell in CELLS:
            for output in cell["outputs"]:
                assert output["output_type"] in ("stream", "execute_result")
                assert output.get("name", "stdout") == "stdout"
            assert "Warning" not in tool.text_of(cell["outputs"])

    def test_nothing_names_a_machine(self) -> None:
        for path in ("/home/me/x.py", "in ~/x/y", "C:\\x", "(/opt/site-packages/"):
            assert re.search(MACHINE, path)
        assert not re.findall(MACHINE, "".join(map(text_without_pictures, CELLS)))

    def test_the_picture_is_one(self) -> None:
        from PIL import Image

        data = [output.get("data", {}) for cell in CELLS for output in cell["outputs"]]
        (png,) = (one["image/png"] for one in data if "image/png" in one)
        image = Image.open(io.BytesIO(base64.b64decode(png)))
        assert image.format == "PNG"
        assert image.width > 600
        assert PATH.stat().st_size < 500_000

    def test_the_model_is_itself_again_at_the_end(self) -> None:
        assert tool.text_of(CELLS[-1]["outputs"]) == "True\n"


def text_without_pictures(cell: dict[str, Any]) -> str:
    return "".join(cell["source"]) + tool.text_of(cell["outputs"])


@pytest.mark.slow
def test_the_present_code_gives_these_outputs() -> None:
    pytest.importorskip("sklearn", reason="needs sparsiattn[viz]")
    pytest.importorskip("matplotlib", reason="needs sparsiattn[viz]")
    command = [sys.executable, str(ROOT / "tools" / "notebook.py"), str(PATH), "--check"]
    # as outside of the tests, which keep compiled code away
    kept = {name: value for name, value in environment().items() if "SPARSIATTN_" not in name}
    surroundings = {**kept, "CC": os.environ["CC_OF_NATIVE_TESTS"]}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def notebook_of(*sources: str, tags: tuple[str, ...] = ()) -> dict[str, Any]:
    cells = [
        {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": tool.lines(source)}
        for source in sources
    ]
    return {"cells": [{"cell_type": "markdown", "source": ["# Title"]}, *cells]}


def stored(*sources: str, tags: tuple[str, ...] = ()) -> dict[str, Any]:
    """A notebook that was run."""
    notebook = notebook_of(*sources, tags=tags)
    tool.store(notebook, tool.run(notebook))
    return notebook


class TestTool:
    def test_what_is_printed_and_the_last_value_are_stored(self) -> None:
        notebook = stored(
            "%matplotlib inline\na = 2\nprint('two\\nlines')", "print(a)\na + 1", "a;"
        )
        printed, both, nothing = (cell["outputs"] for cell in tool.code_cells(notebook))
        assert printed == [
            {"name": "stdout", "output_type": "stream", "text": ["two\n", "lines\n"]}
        ]
        assert both[0]["text"] == ["2\n"]
        assert both[1]["data"] == {"text/plain": ["3"]}
        assert both[1]["execution_count"] == 2
        assert nothing == []

    def test_a_figure_is_stored_as_a_picture(self) -> None:
        pytest.importorskip("matplotlib", reason="needs sparsiattn[viz]")
        notebook = stored("from matplotlib.figure import Figure\nFigure()")
        (output,) = tool.code_cells(notebook)[0]["outputs"]
        assert base64.b64decode(output["data"]["image/png"]).startswith(b"\x89PNG")
        assert "Figure" in output["data"]["text/plain"][0]

    def test_a_cell_that_fails_ends_the_run(self) -> None:
        with pytest.raises(ZeroDivisionError):
            tool.run(notebook_of("1 / 0"))

    @pytest.mark.parametrize(
        ("before", "now", "tags", "same"),
        [
            ("print('1.5x of 20 ms')", "print('12.25x of 3 ms')", (), True),
            ("print('1.5x  of 20 ms')", "print('1.5x of 20 s')", (), False),
            ("print('a 1')", "'a 1'", (), False),
            ("print('a 1')", "print('a 1'); 2", (), False),
            ("print('kernel native fast')", "print('kernel gather fast')", (), False),
            (
                "print('the kernel native runs')",
                "print('the kernel gather runs')",
                ("measured",),
                True,
            ),
            ("print('the kernel native runs')", "print('another table')", ("measured",), False),
            ("print('found a line')", "print('nothing')", ("machine",), True),
            ("print('found a line')", "'found a line'", ("machine",), False),
        ],
    )
    def test_differences(self, before: str, now: str, tags: tuple[str, ...], same: bool) -> None:
        found = tool.differences(stored(before, tags=tags), tool.run(notebook_of(now)))
        assert (found == []) == same, found

    def test_the_command_writes_and_checks(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "one.ipynb"
        path.write_text(json.dumps(stored("print('old words')")))
        notebook = json.loads(path.read_text())
        notebook["cells"][1]["source"] = ["print('new text')"]
        path.write_text(json.dumps(notebook))
        assert tool.main([str(path), "--check"]) == 1
        assert "old words" in capsys.readouterr().out
        assert tool.main([str(path)]) == 0
        assert tool.main([str(path), "--check"]) == 0
        assert "new text" in path.read_text()


def test_every_public_call_in_it_exists() -> None:
    import sparsiattn

    code = "\n".join(re.sub("^%", "# %", "".join(cell["source"])) for cell in CELLS)
    used = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "sparsiattn"
    }
    assert {"inspect", "patch", "bench", "recommend", "show"} <= used <= set(sparsiattn.__all__)
