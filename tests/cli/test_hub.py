"""Where the Hugging Face Hub cannot be reached commands say so at once."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from huggingface_hub import constants

from sparsiattn.cli.hub import offline_if_unreachable
from tests.support.commands import run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hosts whose address was looked up, and none has one."""
    hosts: list[str] = []

    def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:
        hosts.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("sparsiattn.cli.hub.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    return hosts


def test_it_is_offline_inside_the_block_only(asked: list[str]) -> None:
    with offline_if_unreachable(True):
        assert constants.HF_HUB_OFFLINE
        with offline_if_unreachable(True):
            assert constants.HF_HUB_OFFLINE
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert asked == ["hub.example"]


def test_a_proxy_may_reach_it(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsiattn.cli.hub.getproxies", lambda: {"https": "http://proxy.example"})
    with offline_if_unreachable(True):
        assert not constants.HF_HUB_OFFLINE
    assert asked == []


def test_a_command_says_it_once_and_fails_at_once(asked: list[str]) -> None:
    result = run("inspect", "hf:nobody/no-such-model", code=1)
    said, error = result.stderr.splitlines()
    assert said.startswith("https://hub.example cannot be reached")
    assert error.startswith("error: no model configuration at 'nobody/no-such-model'")
    assert asked == ["hub.example"]


def test_what_needs_no_hub_does_not_look_for_it(asked: list[str]) -> None:
    run("inspect", "test_vit", "--strategy", "local", "--json")
    assert asked == []
