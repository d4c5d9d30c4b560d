"""`BackboneSuite`: tests that every backbone must pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsiattn.patching import Backbone, patch_quietly
from sparsiattn.strategies import TopK
from sparsiattn.testing.laws import restored


class BackboneSuite:
    """Tests of a backbone: subclass it, set ``backbone``, override ``model()``, and run pytest.

    Attributes:
        backbone: The backbone to test.
        least_sites: Smallest number of attention calls that must be found.
        tolerance: Tolerance of the comparison with the dense model at full budget.
        batch_tolerance: Tolerance of the comparison of an image alone and in a batch.
    """

    backbone: Backbone
    least_sites = 1
    tolerance: ClassVar[dict[str, Any]] = {"rtol": 1e-5, "atol": 1e-5}
    batch_tolerance: ClassVar[dict[str, Any]] = {"rtol": 1e-3, "atol": 1e-4}

    def model(self) -> nn.Module:
        """A small model that the backbone supports."""
        raise NotImplementedError

    def images(self, model: nn.Module) -> Tensor:
        """Images for the model, ``[B, C, H, W]``."""
        shape = self.backbone.input_shape(model)
        assert shape is not None, "the input size of the model is not known: override images()"
        return torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0))

    def test_takes_the_model(self) -> None:
        assert self.backbone.why_not(self.model()) == []

    def test_refuses_others_with_a_reason(self) -> None:
        reasons = self.backbone.why_not(nn.Linear(2, 2))
        assert all(isinstance(reason, str) and reason for reason in reasons)

    def test_sites_are_patched_and_restored(self) -> None:
        model = self.model().eval()
        x = self.images(model)
        with torch.no_grad():
            dense = model(x)
            with patch_quietly(model, TopK(k=1.0), input=x) as patched:
                assert patched.backbone == self.backbone.name
                assert len(patched.sites) >= self.least_sites
                torch.testing.assert_close(model(x), dense, **self.tolerance)
            with patch_quietly(model, TopK(k=0.25), input=x) as patched:
                assert not torch.equal(model(x), dense)
                with patched.disabled():
                    assert torch.equal(model(x), dense)
            assert torch.equal(model(x), dense)

    def test_nothing_of_the_patch_stays(self) -> None:
        """Modules, hooks, keys and attributes of `Backbone.attribute_overrides` are restored."""
        model = self.model().eval()
        x = self.images(model)
        keys, overrides = set(model.state_dict()), self.backbone.attribute_overrides(model)
        with torch.no_grad(), restored(model), patch_quietly(model, TopK(k=0.25), input=x):
            model(x)
            assert set(model.state_dict()) == keys
        for override in overrides:
            value = getattr(override.module, override.attribute, ...)
            assert value == override.before, override.attribute

    def test_images_do_not_influence_each_other(self) -> None:
        model = self.model().eval()
        x = self.images(model)
        with torch.no_grad(), patch_quietly(model, TopK(k=0.25), input=x):
            torch.testing.assert_close(model(x)[:1], model(x[:1]), **self.batch_tolerance)

    def test_sites_describe_their_tokens(self) -> None:
        model = self.model().eval()
        with patch_quietly(model, TopK(k=0.5), input=self.images(model)) as patched:
            for site in patched.sites:
                assert site.grid[0] * site.grid[1] + site.prefix_tokens == site.tokens
                assert site.key_grid[0] * site.key_grid[1] + site.prefix_tokens == site.keys

    def test_class_tokens_are_prefix_tokens(self) -> None:
        model = self.model().eval()
        with patch_quietly(model, TopK(k=0.5), input=self.images(model)) as patched:
            prefix = min(site.prefix_tokens for site in patched.sites)
        assert 0 <= self.backbone.class_tokens(model) <= prefix
        assert self.backbone.pooling(model) in ("prefix", "avg", "max", "other")
