"""The command line: ``sparsiattn list``, ``inspect``, ``bench``, ``calibrate`` and more.

A file holds the command of its name. Only the bodies of commands import the rest of the library:
``--help`` must answer without torch. Nothing imports this package.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sparsiattn._version import __version__
from sparsiattn.cli.bench import bench_model
from sparsiattn.cli.calibrate import calibrate_model
from sparsiattn.cli.console import readable_errors
from sparsiattn.cli.doctor import diagnose
from sparsiattn.cli.evaluate import evaluate_model
from sparsiattn.cli.export import export_model
from sparsiattn.cli.inspect import inspect_model
from sparsiattn.cli.list import list_all
from sparsiattn.cli.new_plugin import write_plugin
from sparsiattn.cli.profile import profile_model
from sparsiattn.cli.recommend import recommend_setting
from sparsiattn.cli.search import search_model
from sparsiattn.cli.show import show_model
from sparsiattn.cli.train import train_model
from sparsiattn.cli.tune import tune_here

app = typer.Typer(no_args_is_help=True, help="Sparse attention for any Vision Transformer.")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sparsiattn {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="The installed version.", callback=_print_version),
    ] = False,
) -> None:
    """Sparse attention for any Vision Transformer."""


for _name, _command in (
    ("list", list_all),
    ("doctor", diagnose),
    ("inspect", inspect_model),
    ("tune", tune_here),
    ("recommend", recommend_setting),
    ("bench", bench_model),
    ("show", show_model),
    ("calibrate", calibrate_model),
    ("profile", profile_model),
    ("search", search_model),
    ("eval", evaluate_model),
    ("train", train_model),
    ("export", export_model),
    ("new-plugin", write_plugin),
):
    app.command(_name)(readable_errors()(_command))
