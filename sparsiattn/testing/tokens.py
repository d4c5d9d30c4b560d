"""The laws every token strategy must keep."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsiattn.errors import InvalidOption
from sparsiattn.patching.apply import patch
from sparsiattn.testing.hosts import tiny_vit
from sparsiattn.testing.laws import PatchSuite


class TokenStrategySuite(PatchSuite):
    """Subclass it, set ``strategy`` to an instance that reduces in a model of four blocks, and run
    pytest. ``identity`` holds the options of the budget that keeps all.

    ``model()`` and ``images()`` may be overridden to test on another host.
    """

    identity: dict[str, Any] = {"keep": 1.0}  # noqa: RUF012

    def model(self) -> nn.Module:
        return tiny_vit(depth=4)

    def test_wrong_option_is_named_with_the_right_ones(self) -> None:
        self._check_wrong_option("layers")

    def test_full_budget_is_the_dense_model(self) -> None:
        if not self.strategy.exact_at_full:
            assert self.strategy.inexact_reason
            return
        model, x = self.model(), self.images()
        full = dataclasses.replace(self.strategy, **self.identity)
        with torch.no_grad():
            dense = model(x)
            with patch(model, full):
                torch.testing.assert_close(model(x), dense, **self.tolerance)

    def test_fewer_tokens_arrive_and_prefix_tokens_survive(self) -> None:
        model, x = self.model(), self.images()
        seen: list[Tensor] = []
        with torch.no_grad(), patch(model, self.strategy) as live:
            handle = model.get_submodule("norm").register_forward_pre_hook(
                lambda _, args: seen.append(args[0])
            )
            model(x)
            handle.remove()
            source = live.source()
        whole = 1 + 64
        assert seen[0].shape[1] < whole or live.restores_last
        assert source.shape == (len(x), whole)
        assert (source[:, 0] == 0).all(), "the class token must stay first"
        patches = source[:, 1:]
        assert ((patches == -1) | (patches >= 1)).all()
        assert (patches == -1).any() or patches.unique().numel() < 64, "nothing was reduced"

    def test_order_of_patches_does_not_matter(self) -> None:
        """Where the strategy itself has no order (see `ordered`), shuffled patches give the same
        class token: positions are added before the blocks. In double precision, where rounding
        hardly ever decides between two tokens."""
        if self.ordered():
            return
        model: Any = self.model().double()
        x = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(6)).double()
        lead = torch.randn(2, 1, 48, generator=torch.Generator().manual_seed(7)).double()
        shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(8))
        with torch.no_grad(), patch(model, self.strategy):
            straight = model.blocks(torch.cat([lead, x], 1))[:, 0]
            mixed = model.blocks(torch.cat([lead, x[:, shuffle]], 1))[:, 0]
        torch.testing.assert_close(straight, mixed, rtol=1e-4, atol=1e-4)

    def ordered(self) -> bool:
        """Whether the reduction depends on the order of tokens, as alternate pairing does."""
        return False

    def test_dense_consumers_get_every_position(self) -> None:
        model: Any = self.model()
        x = self.images()
        if self.strategy.restore is None:  # type: ignore[attr-defined]
            return
        with torch.no_grad(), patch(model, self.strategy):
            maps = model.forward_intermediates(x, intermediates_only=True)
            assert all(m.shape == (len(x), 48, 8, 8) for m in maps)
            assert model.forward_features(x).shape == (len(x), 65, 48)
            assert model(x).shape == (len(x), 5)

    def test_restore_none_refuses_dense_consumers(self) -> None:
        model: Any = self.model()
        never = dataclasses.replace(self.strategy, restore=None)  # type: ignore[call-arg]
        with patch(model, never), pytest.raises(InvalidOption, match="restore"):
            model.forward_intermediates(self.images())

    def test_copies_of_the_config_are_equal(self) -> None:
        assert copy.deepcopy(self.strategy) == self.strategy
