"""The laws every attention strategy must keep."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsiattn.attention.cross_layer_state import CrossLayerState
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Dense, Pattern
from sparsiattn.errors import InvalidOption
from sparsiattn.kernels.reference import Reference
from sparsiattn.patching.apply import patch
from sparsiattn.strategies.base import Strategy
from sparsiattn.strategies.finalize import finish
from sparsiattn.testing.hosts import random_inputs, tiny_vit
from sparsiattn.testing.laws import PatchSuite

__all__ = ["PatchSuite", "StrategySuite"]


class StrategySuite(PatchSuite):
    """Subclass it, set ``strategy`` to an instance with a budget below one, and run pytest.

    `PatchSuite` says what may be overridden; ``grid``, ``heads`` and ``dim`` are those of the calls
    that are planned without a host.
    """

    strategy: Strategy
    grid: tuple[int, int] = (4, 4)
    heads: int = 3
    dim: int = 8

    def calls(self, **options: Any) -> AttentionInputs:
        """One call to plan, of two images."""
        given = {"heads": self.heads, "dim": self.dim, **options}
        return random_inputs(self.grid, **given).replace(cross_layer=CrossLayerState())

    def plan(self, inputs: AttentionInputs) -> Pattern:
        """The finished pattern of one call."""
        pattern = self.strategy.planner(inputs.site)(inputs)
        options = {"prefix_keys": self.strategy.prefix_keys}
        return finish(pattern, inputs, background=self.strategy.background, **options)

    def _at(self, **fields: Any) -> Strategy:
        return dataclasses.replace(self.strategy, **fields)

    def _has_budget(self) -> bool:
        return "k" in self.strategy.option_names()

    def test_wrong_option_is_named_with_the_right_ones(self) -> None:
        self._check_wrong_option("tile")

    def test_full_budget_is_the_dense_model(self) -> None:
        if not (self._has_budget() and self.strategy.exact_at_full):
            assert self.strategy.inexact_reason or not self._has_budget()
            return
        self._identity_on(self.model(), self.images(), self._at(k=1.0))
        windowed = self.windowed()
        if windowed is not None:
            with suppress(InvalidOption):  # such hosts may be refused; another law wants words
                self._identity_on(*windowed, self._at(k=1.0))

    def _identity_on(self, model: nn.Module, x: Tensor, full: Strategy) -> None:
        with torch.no_grad():
            dense = model(x)
            with patch(model, full):
                torch.testing.assert_close(model(x), dense, **self.tolerance)

    @pytest.mark.parametrize("prefix", [0, 1, 5])
    @pytest.mark.parametrize("tile", [1, (2, 2)])
    def test_every_pattern_fits_its_site(self, tile: Any, prefix: int) -> None:
        """Prefix queries see every key, every query sees one, and prefix keys are kept."""
        inputs = self.calls(prefix=prefix, tile=tile)
        mask = self.plan(inputs).to_mask()
        whole = (2, self.heads, inputs.n_queries, inputs.n_keys)
        assert torch.broadcast_shapes(mask.shape, whole) == whole
        assert mask.dtype == torch.bool
        assert mask.any(-1).all(), "a query was left without a key"
        assert mask[..., :prefix, :].all(), "prefix queries must see every key"
        if self.strategy.prefix_keys and self._keeps(inputs) > prefix:
            assert mask[..., :prefix].all(), "prefix keys must be kept"

    def _keeps(self, inputs: AttentionInputs) -> float:
        """Keys per query that the budget allows for."""
        k = getattr(self.strategy, "k", 1.0)
        return k * (inputs.n_keys if isinstance(k, float) else 1)

    def test_a_row_without_a_key_is_zero(self) -> None:
        """A host may forbid a query every key: that is zeros, and no NaN anywhere."""
        n = self.calls(prefix=1).n_keys
        allowed = torch.rand(1, 1, n, n, generator=torch.Generator().manual_seed(9)) > 0.4
        allowed[..., torch.arange(n), torch.arange(n)] = True
        allowed[..., 3, :] = False
        inputs = self.calls(prefix=1, bias=allowed, kind="mask")
        try:
            pattern = self.plan(inputs)
        except InvalidOption as refused:
            pytest.skip(f"hosts that forbid keys are refused: {refused}")
        out = Reference()(inputs, pattern)
        assert torch.isfinite(out).all()
        assert (out[..., 3, :] == 0).all()

    def test_budget_is_kept_at_every_call(self) -> None:
        """Half the budget must not keep more pairs, and less than all are kept at the one given."""
        if not self._has_budget() or not isinstance(self.strategy.k, float):  # type: ignore[attr-defined]
            pytest.skip("no budget that is a share")
        inputs = self.calls(prefix=1)
        kept = [_share(self.plan(inputs)), _share(self._halved().plan(inputs))]
        assert kept[1] <= kept[0] <= 1

    def _halved(self) -> StrategySuite:
        other = type(self)()
        other.strategy = self._at(k=self.strategy.k / 2)  # type: ignore[attr-defined]
        return other

    def test_registers_are_prefix_tokens(self) -> None:
        """Five leading tokens instead of one: all of them reach the head in full."""
        model, x = tiny_vit(reg_tokens=4), self.images()
        seen: list[Tensor] = []
        with torch.no_grad(), patch(model, self.strategy, input=x) as live:
            assert all(site.prefix_tokens == 5 for site in live.sites)
            with live.observing(lambda site, planner, inputs: seen.append(inputs.q)):
                assert torch.isfinite(model(x)).all()
        assert seen or isinstance(self.plan(self.calls()), Dense)


def _share(pattern: Pattern) -> float:
    return float(pattern.to_mask().float().mean())
