"""A long suite can be run part by part."""

from __future__ import annotations

import pytest

from tests.support.parts import is_in_part

TESTS = [f"tests/test_{i}.py::test[{i}]" for i in range(400)]


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_every_test_is_in_one_part(parts: int) -> None:
    by_part = [
        {test for test in TESTS if is_in_part(test, f"{part}/{parts}")}
        for part in range(1, parts + 1)
    ]
    assert sum(map(len, by_part)) == len(set.union(*by_part)) == len(TESTS)
    assert min(map(len, by_part)) > 400 / parts / 2


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3"])
def test_other_parts_are_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match="--part must be I/N"):
        is_in_part("tests/test_a.py::test", text)
