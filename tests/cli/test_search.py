"""``sparsiattn search``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from sparsiattn.cli.search import grid_of
from tests.support.commands import NAME, model_options, run, small
from tests.support.pictures import folder

SMALL = small(8)
MODEL = [NAME, *model_options(SMALL)]


def test_the_file_it_writes_is_a_schedule_that_commands_take(tmp_path: Path) -> None:
    data, out = folder(tmp_path / "images"), tmp_path / "new" / "schedule.json"
    found = json.loads(
        run("search", *MODEL, "--data", data, "--strategy", "token_drop", "--macs", "0.9",
            "--trials", 1, "--images", 4, "--out", out, "--json").stdout
    )  # fmt: skip
    assert found["found"]["macs"] <= 0.9 * found["macs_dense"]
    assert json.loads(out.read_text())["keep"] == found["schedule"]["keep"]
    profile = json.loads(
        run("profile", *MODEL, "--strategy", "token_drop", "-o", f"schedule={out}", "--json").stdout
    )
    assert profile["macs"] == found["found"]["macs"]


def test_one_budget_is_needed(tmp_path: Path) -> None:
    for budgets in ([], ["--macs", "0.5", "--latency", "0.5"]):
        result = run("search", *MODEL, "--data", tmp_path, *budgets, code=2)
        assert "one of --macs, --latency and --agreement" in " ".join(result.stderr.split())


def test_it_says_how_much_it_runs_and_what_commands_need_to_use_it(tmp_path: Path) -> None:
    data, out = folder(tmp_path / "images"), tmp_path / "schedule.json"
    result = run(
        "search", *MODEL, "--data", data, "--strategy", "hybrid", "--macs", "0.95", "--images", 4,
        "--trials", 4, "--options-grid", "tile=[[2,2]]", "--budget-seconds", 600, "--out", out,
    )  # fmt: skip
    assert "up to 4 trials" in result.stderr
    assert "x 4 images = 16 forward passes" in result.stderr
    line = next(x for x in result.stdout.splitlines() if x.startswith("in commands: "))
    flags = shlex.split(line.removeprefix("in commands: "))
    assert "tile=[2,2]" in flags
    profile = json.loads(run("profile", *MODEL, *flags, "--json").stdout)
    assert profile["macs"] == json.loads(out.read_text())["about"]["found"]["macs"]


def test_grids_on_the_command_line() -> None:
    assert grid_of(None) is None
    assert grid_of(["none"]) == {}
    assert grid_of(['tile=["auto",[4,4]]', "background=[null,2]"]) == {
        "tile": ["auto", [4, 4]],
        "background": [None, 2],
    }
