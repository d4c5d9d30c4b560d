"""The package is installed and registers its strategy and its kernel."""

from __future__ import annotations

import sparsiattn


def test_plugin_is_installed() -> None:
    plugin = sparsiattn.list_plugins()["nearest_keys"]
    assert plugin.error is None
    assert plugin.distribution == "nearest-keys"
    assert set(plugin.provides) == {"nearest_keys", "nearest_keys_softmax"}


def test_both_are_usable() -> None:
    assert sparsiattn.list_strategies()["nearest_keys"].usable
    assert sparsiattn.list_kernels()["nearest_keys_softmax"].usable
