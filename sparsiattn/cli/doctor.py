"""``sparsiattn doctor``."""

from __future__ import annotations

import json

import typer

from sparsiattn.cli.options import AsJson


def diagnose(as_json: AsJson = False) -> None:
    """Versions, devices, kernels and plug-ins; what is missing or broken, and what mends it.

    Exits with 0 unless the core itself cannot run. Example: sparsiattn doctor --json
    """
    from sparsiattn.testing.diagnosis import doctor

    found = doctor()
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)
    if not found.works:
        raise typer.Exit(1)
