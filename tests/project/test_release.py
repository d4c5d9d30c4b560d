"""What a release rests on: one version everywhere, deprecations listed, a check that goes on."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import sparsiattn_backbones

import sparsiattn
from sparsiattn.errors import PLUGIN_REMOVED_IN, REMOVED_IN, RenamedMember
from sparsiattn.registry.deprecated import CallablePackage
from sparsiattn.registry.hookspecs import PLUGIN_API
from tests.support import ROOT
from tools import release_check, versions

PACKAGES = (sparsiattn, sparsiattn_backbones)
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

Listed = dict[tuple[str, str], tuple[str, str]]
"""(where, old name) to (new name, version that removes the old one)."""


def listed() -> Listed:
    """The tables of deprecations in the changelog; old names without arguments."""
    rows = re.findall(r"^\| (.*`.*) \| `([^`]+)` \| `([^`]+)` \| ([^|]+) \|$", CHANGELOG, re.M)
    return {
        (place, _bare(old)): (_bare(new), removed_in)
        for places, old, new, removed_in in rows
        for place in re.findall(r"`([^`]+)`", places)
    }


def _bare(name: str) -> str:
    return name.partition("(")[0].removeprefix("sparsiattn.")


def classes() -> Iterator[type]:
    """All of the packages, once each."""
    for package in PACKAGES:
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "_triton" in info.name or info.name.endswith("__main__"):
                continue
            for kind in vars(import_module(info.name)).values():
                if inspect.isclass(kind) and kind.__module__ == info.name:
                    yield kind


def renamed_members() -> list[tuple[type, RenamedMember]]:
    """Members of classes that still answer to their old name."""
    return [
        (kind, member)
        for kind in classes()
        for member in vars(kind).values()
        if isinstance(member, RenamedMember)
    ]


def renamed_in_classes() -> Listed:
    """Options of a strategy stand under its name, other members under that of the class."""
    return {
        (_place(kind), member.old): (member.new, member.removed_in)
        for kind, member in renamed_members()
    }


def _place(kind: Any) -> str:
    name: str = kind.name if getattr(kind, "renamed_options", None) else kind.__name__
    return name


def renamed_at_the_root() -> Listed:
    names = dict(sparsiattn._RENAMED)
    for info in pkgutil.iter_modules(sparsiattn.__path__):
        if isinstance(import_module(f"sparsiattn.{info.name}"), CallablePackage):
            names[info.name] = f"list_{info.name}"
    return {("sparsiattn", old): (new, REMOVED_IN) for old, new in names.items()}


def warned_by_name() -> Listed:
    """Calls such as ``warn_renamed("Class.method(...)", "other")`` in the sources."""
    found: Listed = {}
    for call in calls():
        if getattr(call.func, "id", "") == "warn_renamed":
            old, new = call.args[:2]
            if isinstance(old, ast.Constant) and isinstance(new, ast.Constant):
                place, _, name = _bare(str(old.value)).rpartition(".")
                found[place, name] = (_bare(str(new.value)), REMOVED_IN)
    return found


def calls() -> list[ast.Call]:
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted(Path(package.__path__[0]).rglob("*.py"))
    ]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


class TestDeprecations:
    def test_each_one_in_the_code_is_in_the_changelog(self) -> None:
        code = renamed_in_classes() | renamed_at_the_root() | warned_by_name()
        assert len(code) > 40
        assert listed() == code

    def test_all_warnings_name_the_replacement_and_the_version(self) -> None:
        """They come from `warn_renamed` alone, whose messages are tested below."""
        direct = [
            ast.unparse(call)
            for call in calls()
            if "DeprecationWarning" in ast.unparse(call) and "warn" in ast.unparse(call.func)
        ]
        assert direct == [
            "warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)"  # warn_renamed
        ]

    def test_names_are_gone_when_their_time_has_come(self) -> None:
        due = tuple(map(int, REMOVED_IN.split(".")))
        here = versions.stated(ROOT)[versions.PROJECT]
        assert tuple(map(int, re.findall(r"\d+", here)[:3])) < due, f"remove what {due} removes"
        assert tuple(map(int, re.findall(r"\d+", PLUGIN_REMOVED_IN))) > PLUGIN_API

    def test_each_member_warns_with_its_new_name_and_the_version(self) -> None:
        for kind, member in renamed_members():
            said = f"{kind.__name__}.{member.old} is now {member.new}; the old name is removed in "
            with pytest.warns(DeprecationWarning, match=re.escape(said + member.removed_in)):
                getattr(kind, member.old, None)  # fields without a default are not on the class


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda: sparsiattn.Bench, "sparsiattn.Bench is now sparsiattn.BenchResult"),
        (lambda: sparsiattn.Site.margin, "Site.margin is now halo"),
        (lambda: sparsiattn.kernels(), r"sparsiattn.kernels\(\) is now sparsiattn.list_kernels"),
    ],
)
def test_a_deprecated_name_says_when_it_goes(use: object, said: str) -> None:
    removed_in = PLUGIN_REMOVED_IN if "Site" in said else REMOVED_IN
    pattern = rf"{said}.*; the old name is removed in {re.escape(removed_in)}$"
    with pytest.warns(DeprecationWarning, match=pattern):
        use()  # type: ignore[operator]


class TestVersions:
    def test_all_files_state_one(self) -> None:
        assert versions.differing(versions.stated(ROOT)) == []

    @pytest.mark.parametrize(
        ("name", "old", "new"),
        [
            ("pyproject.toml", 'version = "1.2.3"', 'version = "1.2.4"'),
            ("CITATION.cff", "version: 1.2.3", "version: 1.2.2"),
            ("CHANGELOG.md", "## 1.2.3 (unreleased)", "## Unreleased"),
            ("docs/page.md", "sparsiattn[hf]==1.2.3", "sparsiattn[hf]==1.2.0"),
        ],
    )
    def test_a_difference_is_found(self, tmp_path: Path, name: str, old: str, new: str) -> None:
        self.write(tmp_path)
        assert versions.differing(versions.stated(tmp_path)) == []
        path = tmp_path / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        differing = versions.differing(versions.stated(tmp_path))
        assert (name in differing) == (name != "pyproject.toml")
        assert differing

    def test_a_file_without_a_version_differs(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\n")
        assert versions.differing(versions.stated(tmp_path)) == ["CITATION.cff"]

    @staticmethod
    def write(root: Path) -> None:
        (root / "docs").mkdir()
        (root / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
        (root / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
        (root / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (unreleased)\n\n## 1.2.2\n")
        (root / "README.md").write_text("Needs torch 2.10.0.\n")
        (root / "docs" / "page.md").write_text("pip install sparsiattn[hf]==1.2.3\n")


def fake(code: str) -> list[str]:
    return [sys.executable, "-c", code]


class TestReleaseCheck:
    def test_steps_are_make_targets(self) -> None:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(release_check.STEPS) <= set(targets)

    def test_it_goes_on_after_a_failure(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        last = tmp_path / "last"
        commands = {
            "wheel": fake("print('built')"),
            "docs": fake("raise SystemExit(3)"),
            "audit": [str(tmp_path / "no-such-program")],
            "test": fake(f"open({str(last)!r}, 'w')"),
        }
        assert release_check.check(commands) == 1
        assert last.exists()
        out = capfd.readouterr().out
        assert out.index("== wheel") < out.index("built") < out.index("== docs")
        results = re.findall(r"^([\w-]+) +(ok|FAILED) +\d+\.\d", out, re.M)
        assert results == [
            ("wheel", "ok"), ("docs", "FAILED"), ("audit", "FAILED"), ("test", "ok"),
        ]  # fmt: skip
        assert out.rstrip().endswith("failed: docs, audit")

    def test_all_passed(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert release_check.check({"wheel": fake("pass"), "docs": fake("pass")}) == 0
        assert capfd.readouterr().out.rstrip().endswith("all passed")

    def test_an_unknown_step_runs_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert release_check.main(["wheels"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "unknown step wheels; choose from versions" in captured.err
