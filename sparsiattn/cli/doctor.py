"""``sparsiattn doctor``."""

from __future__ import annotations

import typer

from sparsiattn.cli.console import print_result
from sparsiattn.cli.options import AsJson


def diagnose(as_json: AsJson = False) -> None:
    """Check this installation: versions, devices, kernels, plug-ins, and how to fix what is broken.

    Exits with 0 unless the library itself cannot run.

    Example: sparsiattn doctor --json
    """
    from sparsiattn import doctor

    diagnosis = doctor()
    print_result(as_json, diagnosis.to_dict(), diagnosis)
    if not diagnosis.works:
        raise typer.Exit(1)
