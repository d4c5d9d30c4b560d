"""`sparsiattn.doctor` and its command."""

from __future__ import annotations

import json
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import sparsiattn
from sparsiattn.cli import app
from sparsiattn.kernels import xformers as fmha
from sparsiattn.testing import diagnosis


def found(group: str, name: str) -> Any:
    rows = sparsiattn.doctor().findings
    return next(row for row in rows if (row.group, row.name) == (group, name))


def test_json_is_one_document_and_this_installation_works() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["works"] is True
    rows = {(row["group"], row["name"]): row for row in document["findings"]}
    assert rows["core", "torch"]["detail"] == metadata.version("torch")
    assert rows["kernels", "reference"]["status"] == "ok"
    assert rows["trial", "patch and undo"]["status"] == "ok"
    assert "the core works" in CliRunner().invoke(app, ["doctor"]).stdout


def test_an_extra_that_is_missing_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "pyyaml":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(diagnosis.metadata, "version", version)
    row = found("extra train", "yaml")
    assert (row.status, row.fix) == ("missing", "pip install 'sparsiattn[train]'")
    assert sparsiattn.doctor().works
    assert row.fix in str(sparsiattn.doctor())


def test_what_is_installed_but_does_not_import_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(diagnosis, "import_module", fail)
    monkeypatch.setattr(diagnosis.metadata, "version", lambda name: "1.2.3")
    row = found("extra train", "torchvision")
    assert row.status == "broken"
    assert row.detail == "1.2.3: RuntimeError: operator torchvision::nms does not exist"
    assert row.fix == "pip install --force-reinstall --no-deps torchvision"


@pytest.mark.parametrize(
    ("reason", "status"), [("", "ok"), ("xformers cannot load its CUDA extension", "broken")]
)
def test_a_wheel_for_another_torch_is_found_out(
    reason: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis.metadata, "version", lambda name: "0.0.1")
    monkeypatch.setattr(fmha, "probe", lambda: fmha.Operators(None, reason))
    assert found("extra xformers", "xformers").status == status


def test_broken_plugins_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = SimpleNamespace(name="bad", distribution="bad-dist", broken=True, error="no such hook")
    monkeypatch.setattr(diagnosis, "list_plugins", lambda: {plugin.name: plugin})
    row = found("plug-ins", "bad")
    assert (row.status, row.detail, row.fix) == (
        "broken",
        "no such hook",
        "pip install -U bad-dist",
    )


def test_a_core_that_cannot_patch_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(*arguments: object, **options: object) -> None:
        raise RuntimeError("hooks are gone")

    monkeypatch.setattr(diagnosis, "patch_quietly", patch)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "RuntimeError: hooks are gone" in result.stdout
    assert "the core does NOT work" in result.stdout
