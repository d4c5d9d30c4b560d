"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys

from typer.testing import CliRunner

from sparsiattn.cli import app


def test_list_as_json_is_one_document() -> None:
    result = CliRunner().invoke(app, ["list", "--json"])
    assert result.exit_code == 0
    listing = json.loads(result.stdout)
    assert {row["name"] for row in listing["strategies"]} >= {"connectivity", "topk"}
    status = {row["name"]: row["status"] for row in listing["kernels"]}
    assert status["gather"] == "usable"
    assert status["varlen"] in ("usable", "needs a CUDA device")


def test_list_as_tables_and_as_a_module() -> None:
    command = [sys.executable, "-m", "sparsiattn", "list"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("strategies", "kernels", "backbones", "plugins", "connectivity", "timm_swin"):
        assert word in out


def test_no_command_shows_help_and_a_wrong_one_is_a_usage_error() -> None:
    assert "list" in CliRunner().invoke(app, []).output
    assert CliRunner().invoke(app, ["no-such-command"]).exit_code == 2
