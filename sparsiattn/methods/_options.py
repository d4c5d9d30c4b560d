"""Checks of options. Each raises an error that says what the option must be."""

from __future__ import annotations

from dataclasses import fields

from sparsiattn import InvalidOption, InvalidType, SparsiattnError, Strategy, TokenStrategy

MAX_COUNT = 2**31 - 1
"""Largest count: tables of positions multiply two counts in 64 bits."""


def check_count(option: str, value: object, least: int = 1) -> None:
    """Require an int from ``least`` to `MAX_COUNT`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(f"{option} must be an int >= {least}, got {value!r}")
    if not least <= value <= MAX_COUNT:
        limit = "" if value < least else f" and at most {MAX_COUNT}"
        raise InvalidOption(f"{option} must be an int >= {least}{limit}, got {value!r}")


def check_odd(option: str, value: int) -> None:
    """Require an odd int >= 1, so that a window has a centre."""
    check_count(option, value)
    if value % 2 == 0:
        raise InvalidOption(
            f"{option} must be odd, to have a centre; got {value}: pass {value + 1}"
        )


def check_number(
    option: str, value: object, least: float, most: float, *, above: bool = False
) -> None:
    """Require a number from ``least`` (exclusive if ``above``) to ``most``; NaN is refused."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most or (above and value == least):  # type: ignore[operator]
        start = f"above {least:g} and at most" if above else f"from {least:g} to"
        raise InvalidOption(f"{option} must be a number {start} {most:g}, got {value!r}")


def check_flag(option: str, value: object, error: type[SparsiattnError] = InvalidType) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise error(f"{option} must be True or False, got {value!r}")


def check_flags(config: Strategy | TokenStrategy) -> None:
    """Require True or False for every option with such a default."""
    for option in fields(config):
        if isinstance(option.default, bool):
            check_flag(option.name, getattr(config, option.name))


def constants(option: object) -> list[object]:
    """The constant values of an option that may be a list or a function of the `Site`."""
    values = option if isinstance(option, (list, tuple)) else [option]
    return [value for value in values if not callable(value)]
