"""The laws that hold for every strategy, whatever it makes fewer of."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sparsiattn.analysis.profiling.profiler import profile
from sparsiattn.errors import SparsiattnError, UnknownName
from sparsiattn.patching.apply import patch
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.patching.load import load
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.strategies.base import LearnedPlanner
from sparsiattn.strategies.config import Config
from sparsiattn.testing.fresh import HEAVY, imported_by
from sparsiattn.testing.hosts import tiny_images, tiny_vit, windowed_images, windowed_vit
from sparsiattn.testing.plugin import temporary_plugin
from sparsiattn.training.reconstruction import site_losses


class PatchSuite:
    """What a strategy must keep on a small plain ViT, and on one with windows.

    Override ``model()`` and ``images()`` for another host, ``windowed()`` for another windowed one
    (None: there is none). ``tolerance``: of the identity at full budget; ``batch_tolerance``:
    between an image alone and in a batch; ``compiles``: False where the strategy has no static
    graph; ``changes``: False where it leaves outputs alone until it was trained.
    """

    strategy: Config
    tolerance: ClassVar[dict[str, Any]] = {"rtol": 1e-5, "atol": 1e-5}
    batch_tolerance: ClassVar[dict[str, Any]] = {"rtol": 1e-4, "atol": 1e-5}
    compiles: bool = True
    changes: bool = True

    def model(self) -> nn.Module:
        return tiny_vit()

    def images(self) -> Tensor:
        return tiny_images()

    def windowed(self) -> tuple[nn.Module, Tensor] | None:
        return windowed_vit(), windowed_images()

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Inside the block the strategy is found by its name, plug-in or not."""
        if REGISTRY.all("strategies").get(self.strategy.name) is type(self.strategy):
            yield
        else:
            with temporary_plugin(strategies=[type(self.strategy)], name="under-test"):  # type: ignore[list-item]
                yield

    def _ragged(self) -> bool:
        """Whether every image may keep its own number of tokens."""
        return bool(getattr(self.strategy, "ragged", bool)())

    def _static(self) -> None:
        if not self.compiles or self._ragged():
            pytest.skip("says that it has no static graph")

    def test_config_survives_json(self) -> None:
        saved = json.loads(json.dumps(self.strategy.to_dict()))
        assert saved["name"] == self.strategy.name
        assert saved["version"] == self.strategy.version
        assert type(self.strategy).build(saved["options"]) == self.strategy

    def test_says_what_it_is(self) -> None:
        """What `list_strategies()` shows, and why the full budget is not the dense model."""
        kind = type(self.strategy)
        assert (kind.__doc__ or "").strip(), "the first line of the docstring is its summary"
        assert kind.exact_at_full or kind.inexact_reason, "say in inexact why it is not exact"

    def _check_wrong_option(self, listed: str) -> None:
        with pytest.raises(UnknownName, match=rf"'no_such_option'.*{listed}"):
            type(self.strategy).build({"no_such_option": 1})

    def test_images_do_not_influence_each_other(self) -> None:
        model, x = self.model(), self.images()
        with torch.no_grad(), patch(model, self.strategy):
            torch.testing.assert_close(model(x)[:1], model(x[:1]), **self.batch_tolerance)

    def test_unpatch_restores_everything(self) -> None:
        model, x = self.model(), self.images()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modules = dict(model.named_modules())
        with torch.no_grad():
            dense = model(x)
            live = patch(model, self.strategy)
            sparse = model(x)
            assert not self.changes or not torch.equal(sparse, dense), "nothing was changed"
            with live.disabled():
                assert torch.equal(model(x), dense)
            live.unpatch()
            assert torch.equal(model(x), dense)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        after = dict(model.named_modules())
        assert list(after) == list(modules)
        assert all(after[name] is module for name, module in modules.items())
        _assert_no_hook(model)

    def test_a_wrong_input_leaves_nothing_behind(self) -> None:
        model, x = self.model(), self.images()
        with torch.no_grad():
            dense = model(x)
            with patch(model, self.strategy):
                sparse = model(x)
                with pytest.raises((RuntimeError, AssertionError, ValueError)):
                    model(x[:, :1])  # one channel
                assert torch.equal(model(x), sparse)
            assert torch.equal(model(x), dense)
        _assert_no_hook(model)

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

    def test_saved_and_loaded_it_computes_the_same(self, tmp_path: Path) -> None:
        model, x = self.model(), self.images()
        twin = copy.deepcopy(model)
        with torch.no_grad(), self.registered(), patch(model, self.strategy) as live:
            live.save(tmp_path / "saved")
            with load(twin, tmp_path / "saved") as again:
                assert type(again.strategy) is type(live.strategy)
                assert torch.equal(twin(x), model(x))

    def test_host_weights_get_gradients(self) -> None:
        """Also after a warm-up in inference mode, whose tensors must not be kept."""
        model, x = self.model(), self.images()
        with patch(model, self.strategy):
            with torch.inference_mode():
                model(x)
            model.train()(x).square().sum().backward()
        for name, weight in model.named_parameters():
            if ".sparsiattn." in name:
                continue
            if self.unread(name):
                assert weight.grad is None, name
            else:
                assert weight.grad is not None, name
                assert torch.isfinite(weight.grad).all(), name

    def unread(self, name: str) -> bool:
        """Whether nobody reads what this weight of the host makes, so that it gets no gradient:
        queries and keys where attention is replaced."""
        return False

    def test_gradients_survive_checkpointing(self) -> None:
        model: Any = self.model()
        if not hasattr(model, "set_grad_checkpointing"):
            pytest.skip("the host knows no gradient checkpointing")
        x = self.images()
        with patch(model, self.strategy):
            direct = _gradients(model, x)
            model.set_grad_checkpointing(True)
            for mine, theirs in zip(_gradients(model, x), direct, strict=True):
                torch.testing.assert_close(mine, theirs)

    def test_weights_of_planners_learn(self) -> None:
        """A planner with weights has a loss (`LearnedPlanner`), or the model's own reaches them in
        training mode."""
        model, x = self.model(), self.images()
        with patch(model, self.strategy) as live:
            own = {n: p for n, p in model.named_parameters() if ".sparsiattn." in n}
            for weight in own.values():
                weight.requires_grad_(True)
            fitted = [r.planner for r in live.runtimes if isinstance(r.planner, LearnedPlanner)]
            losses = site_losses(live, x) if own else []
            assert len(losses) >= len(fitted) * bool(own)
            if sum(1 for planner in fitted for _ in planner.parameters()) < len(own):
                losses.append(model.train()(x).square().mean())
            if losses:
                torch.stack(losses).sum().backward()
            for name, weight in own.items():
                assert weight.grad is not None, f"{name} gets no gradient"
                assert torch.isfinite(weight.grad).all(), name
            assert not own or any(bool((p.grad != 0).any()) for p in own.values())  # type: ignore[union-attr]

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

    def test_lower_precision(self) -> None:
        """Under autocast, and with weights in bfloat16; choices may differ, so values are free."""
        model, x = self.model(), self.images()
        with torch.no_grad(), patch(model, self.strategy):
            shape = model(x).shape
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mixed = model(x)
            half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
        for out in (mixed, half):
            assert out.shape == shape
            assert torch.isfinite(out).all()
        assert half.dtype == torch.bfloat16

    def test_declared_macs_are_those_that_run(self) -> None:
        """The report counts from shapes, `profile` counts what runs."""
        if self._ragged():
            pytest.skip("how many tokens stay is known from values alone")
        model, x = self.model(), self.images()[:1]
        with torch.no_grad(), patch(model, self.strategy) as live:
            model(x)
            declared = {row.name: row for row in live.report().sites}
            counted = profile(model, x)
        for site in counted.sites:
            row = declared[site.name]
            if row.density is not None and row.macs is not None:
                assert site.density == pytest.approx(row.density, abs=1e-6), site.name
                assert site.pattern.mhsa == pytest.approx(row.macs, rel=1e-6), site.name
                if self.strategy.kind == "attention":  # else the choice of tokens is in it too
                    planned = pytest.approx(row.predictor_macs, rel=0.02)
                    assert site.pattern.predictor == planned, site.name

    def test_windows(self) -> None:
        """A host with windows is served, or refused with a reason and left as it was."""
        host = self.windowed()
        if host is None:
            pytest.skip("no windowed host given")
        model, x = host
        with torch.no_grad():
            dense = model(x)
            live = _patched_or_none(model, self.strategy)
            if live is not None:
                assert torch.isfinite(model(x)).all()
                live.unpatch()
            assert torch.equal(model(x), dense)
        _assert_no_hook(model)

    @pytest.mark.slow
    def test_compiles_to_one_graph(self) -> None:
        self._static()
        model, x = self.model(), self.images()
        with torch.no_grad(), patch(model, self.strategy):
            exact = model(x)
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)
        torch.compiler.reset()

    @pytest.mark.slow
    def test_exports(self) -> None:
        self._static()
        model, x = self.model(), self.images()
        with torch.no_grad(), patch(model, self.strategy):
            program = torch.export.export(model, (x,))
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_its_import_brings_nothing_heavy(self) -> None:
        assert not imported_by(type(self.strategy).__module__) & HEAVY


def _patched_or_none(model: nn.Module, strategy: Config) -> Patch | None:
    """None where the strategy refuses the model in words, as it may."""
    try:
        return patch(model, strategy)
    except SparsiattnError as error:
        if not str(error):
            raise
        return None


def _assert_no_hook(model: nn.Module) -> None:
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(x).square().sum(), wanted, allow_unused=True)
    return [g for g in grads if g is not None]
