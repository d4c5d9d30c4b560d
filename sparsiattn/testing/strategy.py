"""`StrategySuite`: tests that every attention strategy must pass."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import pytest
import torch

from sparsiattn.attention import AttentionInputs, CrossLayerState, Dense, Pattern
from sparsiattn.errors import InvalidOption
from sparsiattn.kernels import Reference
from sparsiattn.patching import patch_quietly
from sparsiattn.strategies import Strategy, finish
from sparsiattn.testing.hosts import random_inputs, tiny_vit
from sparsiattn.testing.laws import PatchSuite

__all__ = ["PatchSuite", "StrategySuite"]


class StrategySuite(PatchSuite):
    """Tests of an attention strategy.

    Subclass it, set ``strategy`` to an instance with a budget below one, and run pytest.
    `PatchSuite` lists the methods and attributes to override.

    Attributes:
        strategy: The strategy to test.
        grid: Rows and columns of patch tokens in calls without a model.
        heads: Number of heads in these calls.
        dim: Channels per head in these calls.
    """

    strategy: Strategy
    grid: tuple[int, int] = (4, 4)
    heads: int = 3
    dim: int = 8

    def calls(self, **options: Any) -> AttentionInputs:
        """One attention call of two images."""
        options = {"heads": self.heads, "dim": self.dim, **options}
        return random_inputs(self.grid, **options).replace(cross_layer=CrossLayerState())

    def plan(self, inputs: AttentionInputs) -> Pattern:
        """The finished pattern of one call."""
        pattern = self.strategy.planner(inputs.site)(inputs)
        options = {"prefix_keys": self.strategy.prefix_keys}
        background = self.strategy.background_for(inputs.key_grid, inputs.key_views)
        return finish(pattern, inputs, background=background, **options)

    def _has_budget(self) -> bool:
        return "k" in self.strategy.option_names()

    def test_full_budget_is_the_dense_model(self) -> None:
        if not (self._has_budget() and self.strategy.exact_at_full):
            return
        super().test_full_budget_is_the_dense_model()
        windowed = self.windowed()
        if windowed is not None:
            with suppress(InvalidOption):  # windowed models may be refused, see `test_windows`
                self._identity_on(*windowed)

    @pytest.mark.parametrize("prefix", [0, 1, 5])
    @pytest.mark.parametrize("tile", [1, (2, 2)])
    def test_every_pattern_fits_its_site(self, tile: Any, prefix: int) -> None:
        """Prefix queries attend to every key, every query to at least one, prefix keys are kept."""
        inputs = self.calls(prefix=prefix, tile=tile)
        mask = self.plan(inputs).to_mask()
        pairs = (2, self.heads, inputs.n_queries, inputs.n_keys)
        assert torch.broadcast_shapes(mask.shape, pairs) == pairs
        assert mask.dtype == torch.bool
        assert mask.any(-1).all(), "a query was left without a key"
        assert mask[..., :prefix, :].all(), "prefix queries must attend to every key"
        if self.strategy.prefix_keys and self._keeps(inputs) > prefix:
            assert mask[..., :prefix].all(), "prefix keys must be kept"

    def _keeps(self, inputs: AttentionInputs) -> float:
        """Number of keys per query in the budget."""
        k = getattr(self.strategy, "k", 1.0)
        return k * (inputs.n_keys if isinstance(k, float) else 1)

    def test_a_row_without_a_key_is_zero(self) -> None:
        """If a host masks every key of a query, its output is zero, without NaN anywhere."""
        n = self.calls(prefix=1).n_keys
        allowed = torch.rand(1, 1, n, n, generator=torch.Generator().manual_seed(9)) > 0.4
        allowed[..., torch.arange(n), torch.arange(n)] = True
        allowed[..., 3, :] = False
        inputs = self.calls(prefix=1, bias=allowed, kind="mask")
        try:
            pattern = self.plan(inputs)
        except InvalidOption as refused:
            pytest.skip(f"hosts that mask keys are refused: {refused}")
        out = Reference()(inputs, pattern)
        assert torch.isfinite(out).all()
        assert (out[..., 3, :] == 0).all()

    def test_budget_is_kept_at_every_call(self) -> None:
        """Half the budget keeps no more pairs, and the strategy's budget keeps fewer than all."""
        if not self._has_budget() or not isinstance(self.strategy.k, float):  # type: ignore[attr-defined]
            pytest.skip("the budget is not a share")
        inputs = self.calls(prefix=1)
        halved = type(self)()
        half: dict[str, Any] = {"k": self.strategy.k / 2}  # type: ignore[attr-defined]
        halved.strategy = dataclasses.replace(self.strategy, **half)
        shares = [suite.plan(inputs).to_mask().float().mean() for suite in (halved, self)]
        assert shares[0] <= shares[1] <= 1

    def test_registers_are_prefix_tokens(self) -> None:
        """All leading tokens are prefix tokens, here five instead of one."""
        model, x = tiny_vit(reg_tokens=4), self.images()
        names: list[str] = []
        with torch.no_grad(), patch_quietly(model, self.strategy, input=x) as patched:
            assert all(site.prefix_tokens == 5 for site in patched.sites)
            with patched.observing(lambda site, planner, inputs: names.append(site.name)):
                assert torch.isfinite(model(x)).all()
        assert names or isinstance(self.plan(self.calls()), Dense)
