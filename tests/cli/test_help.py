"""``--help`` of every command, ``--version``, completion and errors of usage."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer

from sparsiattn.cli import app
from sparsiattn.cli.help_page import SECTIONS, default_of, names_of, sections, summary_of
from tests.support.commands import run

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PARAMETERS = [
    pytest.param(name, one, id=f"{name} {one.name}")
    for name, command in COMMANDS.items()
    for one in command.params
]

TAKES_MODEL = [name for name, one in COMMANDS.items() if "model" in {p.name for p in one.params}]


def options(name: str) -> set[str]:
    return {text for one in COMMANDS[name].params for text in one.opts}


def page(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is printed on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return str(run(*arguments, "--help").stdout)


def heavy_modules(*arguments: str, **env: str) -> str:
    """What a command imports that takes long."""
    code = (
        "import sys\n"
        "from sparsiattn.cli import app\n"
        "try: app(sys.argv[1:], prog_name='sparsiattn')\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'timm', 'numpy', 'pluggy', 'rich.markdown', 'pydantic')\n"
        "print(*[name for name in heavy if name in sys.modules])"
    )
    command = [sys.executable, "-S", "-c", code, *arguments]
    env = {**env, "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return done.stdout.splitlines()[-1]


def test_the_measure_sees_heavy_modules() -> None:
    assert {"torch", "pluggy"} <= set(heavy_modules("list").split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_that_takes_long(name: str) -> None:
    assert heavy_modules(name, "--help") == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        [],
        ["benhc"],
        ["list", "--bogus"],
        ["bench"],
        ["eval", "test_vit"],
    ],
    ids=str,
)
def test_nor_do_errors_of_usage(arguments: list[str]) -> None:
    assert heavy_modules(*arguments) == ""


@pytest.mark.parametrize("words", ["sparsiattn be", "sparsiattn bench vit --str"])
def test_nor_does_completion(words: str) -> None:
    at = str(len(words.split()) - 1)
    assert (
        heavy_modules(_SPARSIATTN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=at) == ""
    )


def test_nor_does_the_version() -> None:
    assert heavy_modules("--version") == ""


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_a_page_fits_80_columns_with_every_name_whole(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(*filter(None, [name]), monkeypatch=monkeypatch)
    assert max(map(len, text.splitlines())) <= 80
    for never in ("…", "<bool>", "<str>", "{model}"):
        assert never not in text
    shown = COMMANDS if name is None else map(names_of, COMMANDS[name].params)
    for one in shown:
        assert f"\n  {one}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_h_is_help(name: str) -> None:
    assert run(name, "-h").stdout == run(name, "--help").stdout


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_every_parameter_is_described_in_a_section(name: str, parameter: Any) -> None:
    assert parameter.help
    assert parameter.help.rstrip(")")[-1] in "._" or parameter.help.endswith("...")
    assert parameter.rich_help_panel in SECTIONS
    # an option that takes a value says what it is
    assert parameter.metavar or getattr(parameter, "is_flag", False)


def test_sections_come_in_order_and_help_stands_alone() -> None:
    found = sections(COMMANDS["eval"].params)
    assert list(found) == [name for name in SECTIONS if name in found]
    assert [one.name for one in found["Data"]] == ["data", "split", "data_option", "limit"]


def test_commands_are_listed_by_their_first_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(page(monkeypatch=monkeypatch).split())
    for name, command in COMMANDS.items():
        assert f"{name} {summary_of(command.help)}" in words


def test_defaults_in_words() -> None:
    found = {
        f"{name} {one.name}": default_of(one)
        for name in ("bench", "tune", "eval", "search")
        for one in COMMANDS[name].params
    }
    assert found["bench rounds"] == "10"
    assert found["bench as_json"] is None
    assert found["tune quick"] == "--quick"
    assert found["eval device"] == "the GPU if there is one, else the CPU"
    assert found["eval data"] is None
    assert found["search seed"] == "0"


def test_an_example_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    text = page("search", monkeypatch=monkeypatch)
    example = text.partition("Example:\n")[2].partition("\n\n")[0]
    assert example == (
        "  sparsiattn search deit_small_patch16_224 --pretrained --data photos \\\n"
        "      --strategy hybrid --macs 0.7 --out schedule.json"
    )


@pytest.mark.parametrize("name", TAKES_MODEL)
def test_where_a_model_runs_it_has_a_device_and_a_dtype(name: str) -> None:
    if name != "inspect":  # which runs nothing
        assert {"--device", "--dtype"} <= options(name)
        assert {"--pretrained", "--checkpoint"} <= options(name)
    assert {"--model-option", "--model-kwargs", "--image-size"} <= options(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_where_images_are_read_there_are_workers(name: str) -> None:
    assert ("--data" in options(name)) == ("--workers" in options(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_saved_patch_goes_by_patch_and_by_its_old_name(name: str) -> None:
    assert ("--patch" in options(name)) == ("--planners" in options(name))


def test_an_old_name_warns() -> None:
    result = run("profile", "test_vit", "--planners", "nowhere", "--strategy", "local", code=2)
    assert result.stderr.startswith("warning: --planners is now --patch\n")
    assert "a saved patch has its own strategy" in result.stderr
    result = run("profile", "test_vit", "--patch", "nowhere", "--strategy", "local", code=2)
    assert "warning" not in result.stderr


def test_what_is_missing_is_named() -> None:
    assert "Missing argument MODEL." in run("bench", code=2).stderr
    assert "Missing option --data SOURCE." in run("eval", "test_vit", code=2).stderr
