"""Types of dataclass fields, each with a description of valid values and a check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_type_hints

from sparsiattn.errors import InvalidOption


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_span(value: Any) -> bool:
    ints = isinstance(value, tuple) and [type(epoch) for epoch in value] == [int, int]
    return ints and 0 <= value[0] < value[1]


Weight = Annotated[float, "a number >= 0", lambda x: _is_number(x) and x >= 0]
Positive = Annotated[float, "a number > 0", lambda x: _is_number(x) and x > 0]
Share = Annotated[float, "a number >= 0 and < 1", lambda x: _is_number(x) and 0 <= x < 1]
AtLeast0 = Annotated[int, "an int >= 0", lambda x: type(x) is int and x >= 0]
AtLeast1 = Annotated[int, "an int >= 1", lambda x: type(x) is int and x >= 1]
Flag = Annotated[bool, "true or false", lambda x: isinstance(x, bool)]
Text = Annotated[str, "a string", lambda x: isinstance(x, str)]
Name = Annotated[str, "a name without dots", lambda x: isinstance(x, str) and x.isidentifier()]
Trainable = Annotated[
    str, "one of planners, backbone, both", ("planners", "backbone", "both").__contains__
]
Layers = Annotated[str, "one of all, last", ("all", "last").__contains__]
Precision = Annotated[str, "one of no, bf16, fp16", ("no", "bf16", "fp16").__contains__]
Options = Annotated[Mapping[str, Any], "a mapping", lambda x: isinstance(x, Mapping)]
Stages = Annotated[tuple[Any, ...], "a list", lambda x: isinstance(x, tuple)]
Span = Annotated[tuple[int, int], "(start, end), epochs with 0 <= start < end", _is_span]


def check_counts(least: int, **values: Any) -> None:
    """Raise `InvalidOption` for a value that is not an int, or below ``least``; None is allowed."""
    for name, value in values.items():
        if value is not None and (type(value) is not int or value < least):
            raise InvalidOption(f"{name} must be an int >= {least}, got {value!r}")


def check_fields(instance: object, where: str) -> None:
    """Check all fields of a frozen dataclass; lists become tuples and mappings dicts.

    Raises:
        InvalidOption: A field is invalid; the message says what it must be and what it is.
    """
    for name, hint in get_type_hints(type(instance), include_extras=True).items():
        optional = type(None) in get_args(hint)
        _, words, accepts = get_args(get_args(hint)[0] if optional else hint)
        value = _plain(getattr(instance, name), words)
        if not accepts(value) and not (optional and value is None):
            words = f"{words}, or None" if optional else words
            raise InvalidOption(f"{where}: {name} must be {words}, got {value!r}")
        object.__setattr__(instance, name, value)


def _plain(value: Any, words: str) -> Any:
    """Convert numbers that YAML reads as strings (3e-4), lists and mappings."""
    if isinstance(value, str) and words.startswith("a number"):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, list) else value
