"""The version of the interface between this library and its plug-ins.

A plug-in states the version that it was written for beside its hooks::

    SPARSIATTN_API = (1, 0)

The minor number grows when something is added that a plug-in may use, the major number when
something is changed or taken away that a plug-in may have used.
"""

from __future__ import annotations

from sparsiattn.errors import PluginError

Version = tuple[int, int]

PLUGIN_API: Version = (1, 0)
"""``(major, minor)`` of the interface that this version of sparsiattn offers to plug-ins."""

OLDEST: Version = (1, 0)
"""The oldest one that still works. A plug-in that states none is taken to be of this one."""

ATTRIBUTE = "SPARSIATTN_API"


def stated(plugin: object) -> Version:
    """The version that a plug-in says it was written for, `OLDEST` if it says nothing.

    Raises `PluginError` where that is no pair of ints.

    >>> from types import SimpleNamespace
    >>> stated(SimpleNamespace(SPARSIATTN_API=(1, 0)))
    (1, 0)
    """
    found = getattr(plugin, ATTRIBUTE, OLDEST)
    if isinstance(found, (tuple, list)) and [type(part) for part in found] == [int, int]:
        return found[0], found[1]
    raise PluginError(
        f"{ATTRIBUTE} must be a pair of ints (major, minor), the sparsiattn.PLUGIN_API that the "
        f"plug-in was written for; got {found!r}"
    )


def refusal(api: Version, have: Version = PLUGIN_API, oldest: Version = OLDEST) -> str:
    """Why a plug-in of this version cannot work here; empty if it can.

    >>> refusal((1, 0), have=(1, 2))
    ''
    >>> refusal((1, 3), have=(1, 2))
    'needs plug-in API 1.3, this sparsiattn has 1.2: upgrade sparsiattn'
    """
    if api > have:
        return f"needs plug-in API {_text(api)}, this sparsiattn has {_text(have)}: " + (
            "upgrade sparsiattn"
        )
    if api < oldest:
        return (
            f"was written for plug-in API {_text(api)}, this sparsiattn takes {_text(oldest)} to "
            f"{_text(have)}: upgrade the plug-in"
        )
    return ""


def deprecation(api: Version, have: Version = PLUGIN_API, oldest: Version = OLDEST) -> str:
    """What to tell about a plug-in that works, but is of an earlier major version; else empty.

    >>> deprecation((1, 4), have=(2, 0), oldest=(1, 0))
    'plug-in API 1 is deprecated and goes with the next major version: upgrade the plug-in to 2.0'
    """
    if api[0] >= have[0] or api < oldest:
        return ""
    return (
        f"plug-in API {api[0]} is deprecated and goes with the next major version: upgrade the "
        f"plug-in to {_text(have)}"
    )


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
