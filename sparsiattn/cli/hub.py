"""The Hugging Face Hub, where it cannot be reached."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import typer


def may_ask_hub(model: str) -> bool:
    """Whether a model's name may lead to the Hub: it has a source, and is no folder.

    >>> may_ask_hub("hf:google/vit-base-patch16-224"), may_ask_hub("hf:."), may_ask_hub("vit")
    (True, False, False)
    """
    _, separator, name = model.partition(":")
    return bool(separator) and not Path(name).is_dir()


@contextmanager
def offline_if_unreachable(needed: bool) -> Iterator[None]:
    """Inside the block the Hub is not asked where its name has no address.

    Its client would try for a minute, with a line on stderr for each attempt.

    Args:
        needed: Whether the Hub may be asked at all.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and needed and _is_unreachable(constants.ENDPOINT):
        typer.secho(
            f"{constants.ENDPOINT} cannot be reached: only files of this machine are used",
            fg="yellow",
            err=True,
        )
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_unreachable(endpoint: str) -> bool:
    if getproxies():  # which know names that this machine does not
        return False
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return True
    return False
