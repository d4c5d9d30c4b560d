"""For the API page: examples in docstrings are code, not quotations full of links."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^ *>>> (?:.*\S.*\n?)+", re.MULTILINE)


class Doctests(Extension):
    """Fences every example, from its first prompt to the next empty line."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```\n", obj.docstring.value)
