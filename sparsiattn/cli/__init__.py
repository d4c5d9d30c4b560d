"""The command line: ``sparsiattn list``, ``inspect``, ``bench``, ``calibrate`` and more.

A file holds the command of its name. Only the bodies of commands import the rest of the library:
``--help`` must answer without torch. Nothing imports this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from sparsiattn.cli.bench import bench_model
from sparsiattn.cli.calibrate import calibrate_model
from sparsiattn.cli.console import readable_errors
from sparsiattn.cli.doctor import diagnose
from sparsiattn.cli.evaluate import evaluate_model
from sparsiattn.cli.export import export_model
from sparsiattn.cli.help_page import Command, Commands
from sparsiattn.cli.inspect import inspect_model
from sparsiattn.cli.list import list_all
from sparsiattn.cli.new_plugin import write_plugin
from sparsiattn.cli.profile import profile_model
from sparsiattn.cli.recommend import recommend_setting
from sparsiattn.cli.search import search_model
from sparsiattn.cli.show import show_model
from sparsiattn.cli.train import train_model
from sparsiattn.cli.tune import tune_here

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # with either, `--help` and errors of usage would import rich
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from sparsiattn._version import __version__

        print(f"sparsiattn {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version),
    ] = False,
) -> None:
    """Faster Vision Transformers by sparse attention and fewer tokens.

    Start with inspect and recommend, or with bench to see speed alone.

    Example: sparsiattn bench vit_small_patch16_384
    """


SECTIONS: dict[str, tuple[tuple[str, Callable[..., None]], ...]] = {
    "Look around": (("list", list_all), ("doctor", diagnose), ("inspect", inspect_model)),
    "Choose a setting": (
        ("tune", tune_here),
        ("recommend", recommend_setting),
        ("search", search_model),
    ),
    "Measure and see": (
        ("bench", bench_model),
        ("profile", profile_model),
        ("eval", evaluate_model),
        ("show", show_model),
    ),
    "Train": (("calibrate", calibrate_model), ("train", train_model)),
    "Deploy and extend": (("export", export_model), ("new-plugin", write_plugin)),
}
for _section, _commands in SECTIONS.items():
    for _name, _command in _commands:
        app.command(_name, cls=Command, rich_help_panel=_section)(readable_errors()(_command))
