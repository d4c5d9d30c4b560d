"""The laws every strategy must keep."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsiattn.config import Config
from sparsiattn.errors import UnknownName
from sparsiattn.handle import patch_of
from sparsiattn.patching import patch
from sparsiattn.strategy import Strategy
from sparsiattn.testing.hosts import random_inputs, tiny_images, tiny_vit


class PatchSuite:
    """What holds for every strategy, whatever it makes fewer of."""

    strategy: Config

    def model(self) -> nn.Module:
        return tiny_vit()

    def images(self) -> Tensor:
        return tiny_images()

    def test_config_survives_json(self) -> None:
        saved = json.loads(json.dumps(self.strategy.to_dict()))
        assert saved["name"] == self.strategy.name
        assert saved["version"] == self.strategy.version
        assert type(self.strategy).build(saved["options"]) == self.strategy

    def _check_wrong_option(self, listed: str) -> None:
        with pytest.raises(UnknownName, match=rf"'no_such_option'.*{listed}"):
            type(self.strategy).build({"no_such_option": 1})

    def test_images_do_not_influence_each_other(self) -> None:
        model, x = self.model(), self.images()
        with torch.no_grad(), patch(model, self.strategy):
            torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)

    def test_unpatch_restores_everything(self) -> None:
        model, x = self.model(), self.images()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            dense = model(x)
            live = patch(model, self.strategy)
            model(x)
            with live.disabled():
                assert torch.equal(model(x), dense)
            live.unpatch()
            assert torch.equal(model(x), dense)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_host_keys_stay_and_dense_checkpoints_load(self) -> None:
        model = self.model()
        dense = copy.deepcopy(model.state_dict())
        with patch(model, self.strategy) as live:
            added = set(model.state_dict()) - set(dense)
            homes = tuple(f"{site.name}.sparsiattn." for site in live.sites)
            assert all(name.startswith(homes) for name in added)
            assert set(dense) <= set(model.state_dict())
            model.load_state_dict(dense, strict=True)

    def test_copies_and_pickles_stay_patched(self) -> None:
        model, x = self.model(), self.images()
        with torch.no_grad(), patch(model, self.strategy):
            sparse = model(x)
            for twin in (copy.deepcopy(model), _through_pickle(model)):
                live = patch_of(twin)
                assert live is not None
                assert live.model is twin
                assert torch.equal(twin(x), sparse)
                live.unpatch()
            assert torch.equal(model(x), sparse), "undoing a copy must not undo the original"

    def test_host_weights_get_gradients(self) -> None:
        model, x = self.model().train(), self.images()
        with patch(model, self.strategy):
            model(x).square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in gradients)

    def test_same_input_same_bits(self) -> None:
        model, x = self.model(), self.images()
        state = torch.get_rng_state()
        with torch.no_grad():
            with patch(model, self.strategy):
                first, second = model(x), model(x)
            with patch(model, self.strategy):
                third = model(x)
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert torch.equal(state, torch.get_rng_state()), "the global RNG was touched"


class StrategySuite(PatchSuite):
    """Subclass it, set ``strategy`` to an instance with a budget below one, and run pytest.

    ``model()`` and ``images()`` may be overridden to test on another host.
    """

    strategy: Strategy

    def _at(self, **fields: Any) -> Strategy:
        return dataclasses.replace(self.strategy, **fields)

    def _has_budget(self) -> bool:
        return "k" in self.strategy.option_names()

    def test_wrong_option_is_named_with_the_right_ones(self) -> None:
        self._check_wrong_option("tile")

    def test_full_budget_is_the_dense_model(self) -> None:
        if not (self._has_budget() and self.strategy.exact_at_full):
            assert self.strategy.inexact or not self._has_budget()
            return
        model, x = self.model(), self.images()
        with torch.no_grad():
            dense = model(x)
            with patch(model, self._at(k=1.0)):
                torch.testing.assert_close(model(x), dense, rtol=1e-5, atol=1e-5)

    def test_every_pattern_fits_its_site(self) -> None:
        for tile in (1, (2, 2)):
            inputs = random_inputs((4, 4), prefix=1, tile=tile)
            planner = self.strategy.planner(inputs.site)
            mask = self._finished(planner, inputs).to_mask()
            shape = torch.broadcast_shapes(mask.shape, (2, 3, 17, 17))
            assert shape == (2, 3, 17, 17)
            assert mask.dtype == torch.bool
            assert mask.any(-1).all(), "a query was left without a key"
            assert mask[..., :1, :].all(), "prefix queries must see every key"
            if self.strategy.prefix_keys:
                assert mask[..., :1].all(), "prefix keys must be kept"

    def _finished(self, planner: Any, inputs: Any) -> Any:
        from sparsiattn.planning import finish

        options = {"prefix_keys": self.strategy.prefix_keys}
        return finish(planner(inputs), inputs, background=self.strategy.background, **options)


def _through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded
