"""`sparsiattn new-plugin`, the template it writes, and the pytest option."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsiattn import InvalidOption
from sparsiattn.cli import app
from sparsiattn.registry.new_plugin import new_plugin, rendered
from tests.support import ROOT
from tests.support.plugins import STRATEGIES, source

EXAMPLE = ROOT / "examples" / "plugin-template"
KEPT = {".py", ".md", ".toml", ".typed"}


def texts(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.suffix in KEPT)
    return {str(p.relative_to(folder)).replace(os.sep, "/"): p.read_text() for p in files}


def test_the_example_is_what_the_command_writes() -> None:
    """One source: `sparsiattn/plugin_template`. Mend a difference by writing the example anew."""
    assert texts(EXAMPLE) == rendered("nearest-keys")


def test_writes_a_package(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["new-plugin", "far_keys", "--directory", str(tmp_path)])
    assert result.exit_code == 0, result.output
    written = texts(tmp_path / "far_keys")
    assert written == rendered("far_keys")
    assert "class FarKeys(Strategy)" in written["src/far_keys/strategy.py"]
    assert not [text for text in written.values() if "{{" in text or "PACKAGE" in text]
    for path, text in written.items():
        if path.endswith(".py"):
            compile(text, path, "exec")


def test_refuses_a_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "far-keys").mkdir()
    with pytest.raises(InvalidOption, match="exists"):
        new_plugin("far-keys", tmp_path)
    result = CliRunner().invoke(app, ["new-plugin", "far-keys", "--directory", str(tmp_path)])
    assert result.exit_code == 1
    assert list((tmp_path / "far-keys").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["", "Far", "far keys", "1far", "far-", "-far", "far--keys", "../far", "far.keys", "class",
     "json", "sparsiattn", "torch", "topk", "fär"],
)  # fmt: skip
def test_refuses_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidOption):
        new_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def run_pytest(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "backbones"), path])
    command = [sys.executable, "-m", "pytest", "-p", "sparsiattn_pytest", "-c", os.devnull, "-q"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def installed(folder: Path, text: str) -> str:
    """A distribution ``fake-dist`` with one entry point, as a folder for the path."""
    info = folder / "fake_dist-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sparsiattn]\nfake = fake_module\n")
    (folder / "fake_module.py").write_text(text)
    return str(folder)


class TestOption:
    def test_without_it_nothing_is_imported(self, tmp_path: Path) -> None:
        (tmp_path / "test_it.py").write_text(
            "import sys\ndef test_it():\n"
            "    assert not {'torch', 'sparsiattn'} & set(sys.modules)\n"
        )
        done = run_pytest(tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 passed" in done.stdout

    def test_unknown_package_is_an_error(self, tmp_path: Path) -> None:
        done = run_pytest(tmp_path, "--sparsiattn-suite", "no_such_package")
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert "no plug-in of that name" in done.stderr

    def test_broken_plugin_fails(self, tmp_path: Path) -> None:
        path = installed(tmp_path / "site", "raise OSError('libnothing.so')")
        (tmp_path / "run").mkdir()
        done = run_pytest(tmp_path / "run", "--sparsiattn-suite", "fake-dist", path=path)
        assert done.returncode == pytest.ExitCode.TESTS_FAILED
        assert "libnothing.so" in done.stdout

    def test_collects_what_is_registered_with_readable_ids(self, tmp_path: Path) -> None:
        path = installed(tmp_path / "site", source(STRATEGIES, "mine"))
        (tmp_path / "run").mkdir()
        arguments = ("--sparsiattn-suite", "fake_module", "--collect-only")
        said = run_pytest(tmp_path / "run", *arguments, path=path).stdout
        assert "fake_module::TestStrategy_mine::test_full_budget_is_the_dense_model" in said
        assert "fake_module::TestPlugins::test_is_whole[fake]" in said
        assert "topk" not in said

    @pytest.mark.slow
    def test_works_with_xdist(self, tmp_path: Path) -> None:
        pytest.importorskip("xdist")
        chosen = ("-n", "2", "-k", "TestPlugins or survives_json")
        done = run_pytest(tmp_path, "--sparsiattn-suite", "sparsiattn", *chosen)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "passed" in done.stdout


@pytest.mark.slow
def test_the_example_works_from_wheels() -> None:
    command = [sys.executable, str(ROOT / "tools" / "plugin_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
