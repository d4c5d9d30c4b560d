"""Parts of a suite that takes longer than one sitting."""

from __future__ import annotations

import re
import zlib

import pytest


def part_of(text: str) -> tuple[int, int]:
    """``"I/N"`` as numbers, the I-th of N parts.

    Raises:
        UsageError: It is not of this form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--part must be I/N with 1 <= I <= N, as 2/4; got {text!r}")
    return part, parts


def is_in_part(test: str, text: str) -> bool:
    """Whether a test, by its id, is in a part. New tests move no other test to another part."""
    part, parts = part_of(text)
    return zlib.crc32(test.encode()) % parts == part - 1
