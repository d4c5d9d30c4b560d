"""`TokenStrategySuite`: tests that every token strategy must pass."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from sparsiattn.errors import InvalidOption
from sparsiattn.patching import patch
from sparsiattn.testing.hosts import tiny_vit
from sparsiattn.testing.laws import PatchSuite


class TokenStrategySuite(PatchSuite):
    """Tests of a token strategy.

    Subclass it, set ``strategy`` to an instance that reduces tokens in a model with four blocks,
    and run pytest. Override ``model()`` and ``images()`` to test with another model.

    Attributes:
        identity: Options of the budget that keeps all tokens.
    """

    identity: dict[str, Any] = {"keep": 1.0}  # noqa: RUF012

    def model(self) -> nn.Module:
        return tiny_vit(depth=4)

    def test_fewer_tokens_arrive_and_prefix_tokens_survive(self) -> None:
        lengths: list[int] = []
        with self._patched() as (model, x, patched):
            with model.norm.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1])):
                model(x)
            source = patched.source()
        tokens = 1 + 64
        assert lengths[0] < tokens or patched.restores_last
        assert source.shape == (len(x), tokens)
        assert (source[:, 0] == 0).all(), "the class token must stay first"
        patches = source[:, 1:]
        assert ((patches == -1) | (patches >= 1)).all()
        assert (patches == -1).any() or patches.unique().numel() < 64, "nothing was reduced"

    def test_order_of_patches_does_not_matter(self) -> None:
        """Shuffled patches give the same class token, as positions are added before the blocks.

        Strategies that depend on the order (see `ordered`) are skipped.
        """
        if self.ordered():
            return
        # in float64, rounding hardly ever changes which token is selected
        model: Any = self.model().double()
        x = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(6)).double()
        lead = torch.randn(2, 1, 48, generator=torch.Generator().manual_seed(7)).double()
        shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(8))
        with torch.no_grad(), patch(model, self.strategy):
            in_order = model.blocks(torch.cat([lead, x], 1))[:, 0]
            shuffled = model.blocks(torch.cat([lead, x[:, shuffle]], 1))[:, 0]
        torch.testing.assert_close(in_order, shuffled, rtol=1e-4, atol=1e-4)

    def ordered(self) -> bool:
        """Whether the reduction depends on the order of tokens, as pairing of neighbours does."""
        return False

    def test_dense_consumers_get_every_position(self) -> None:
        if self.strategy.restore is None:  # type: ignore[attr-defined]
            return
        with self._patched() as (model, x, _):
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
