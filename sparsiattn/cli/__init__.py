"""The command line: ``sparsiattn list``, ``inspect``, ``bench``, ``calibrate`` and more."""

from __future__ import annotations

import typer

from sparsiattn.cli.bench import bench_model
from sparsiattn.cli.calibrate import calibrate_model
from sparsiattn.cli.doctor import diagnose
from sparsiattn.cli.evaluate import evaluate_model
from sparsiattn.cli.export import export_model
from sparsiattn.cli.inspect import inspect_model
from sparsiattn.cli.list import list_all
from sparsiattn.cli.new_plugin import write_plugin
from sparsiattn.cli.profile import profile_model
from sparsiattn.cli.search import search_model
from sparsiattn.cli.show import show_model
from sparsiattn.cli.train import train_model
from sparsiattn.cli.tune import tune_here

app = typer.Typer(no_args_is_help=True, help="Sparse attention for any Vision Transformer.")


@app.callback()
def main() -> None:
    """Sparse attention for any Vision Transformer."""


app.command("list")(list_all)
app.command("doctor")(diagnose)
app.command("inspect")(inspect_model)
app.command("tune")(tune_here)
app.command("bench")(bench_model)
app.command("show")(show_model)
app.command("calibrate")(calibrate_model)
app.command("profile")(profile_model)
app.command("search")(search_model)
app.command("eval")(evaluate_model)
app.command("train")(train_model)
app.command("export")(export_model)
app.command("new-plugin")(write_plugin)
