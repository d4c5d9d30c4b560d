"""``sparsiattn doctor``."""

from __future__ import annotations

import json

import typer

from sparsiattn.cli.options import AsJson


def diagnose(as_json: AsJson = False) -> None:
    """Versions, devices, kernels and plug-ins; what is missing or broken, and what mends it.

    Exits with 0 unless the core itself cannot run. Example: sparsiattn doctor --json
    """
    from sparsiattn import doctor

    diagnosis = doctor()
    print(json.dumps(diagnosis.to_dict(), indent=2) if as_json else diagnosis)
    if not diagnosis.works:
        raise typer.Exit(1)
