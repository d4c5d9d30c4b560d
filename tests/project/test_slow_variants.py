"""The list of tests that `make test` leaves to `make test-slow`."""

from __future__ import annotations

import re

from tests.support import ROOT

LINES = (ROOT / "tests" / "slow_variants.txt").read_text().splitlines()
IDS = [line for line in LINES if not line.startswith("#")]


def test_every_line_names_a_test_that_there_is() -> None:
    assert sorted(set(IDS)) == IDS
    for line in IDS:
        path, *names = line.partition("[")[0].split("::")
        source = (ROOT / path).read_text()
        for name in names:
            assert re.search(rf"^ *(def|class) {name}\b", source, re.MULTILINE), line
