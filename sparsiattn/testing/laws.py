"""The laws that hold for every strategy, whatever it makes fewer of."""

from __future__ import annotations

import copy
import dataclasses
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
from sparsiattn.patching import Patch, patch_of, patch_quietly
from sparsiattn.patching.load import load
from sparsiattn.strategies import Config, LearnedPlanner
from sparsiattn.testing.fresh import HEAVY, imported_by
from sparsiattn.testing.hosts import tiny_images, tiny_vit, windowed_images, windowed_vit
from sparsiattn.testing.plugin import registered
from sparsiattn.training.reconstruction import site_losses


class PatchSuite:
    """What a strategy must keep on a small plain ViT, and on one with windows.

    Override ``model()`` and ``images()`` for another host, ``windowed()`` for another windowed one
    (None: there is none).

    Attributes:
        strategy: What is tested.
        identity: Options of the budget that keeps all.
        tolerance: Of the identity at full budget.
        batch_tolerance: Between an image alone and in a batch.
        compiles: False where the strategy has no static graph.
        changes: False where it leaves outputs alone until it was trained.
    """

    strategy: Config
    identity: dict[str, Any] = {"k": 1.0}  # noqa: RUF012
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
    def _patched(self) -> Iterator[tuple[Any, Tensor, Patch]]:
        """The model, patched inside the block, its images, and the patch."""
        model = self.model()
        with torch.no_grad(), patch_quietly(model, self.strategy) as patched:
            yield model, self.images(), patched

    def _ragged(self) -> bool:
        """Whether every image may keep its own number of tokens."""
        return bool(getattr(self.strategy, "is_ragged", bool)())

    def _skip_without_static_graph(self) -> None:
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
        assert kind.exact_at_full or kind.inexact_reason, "say why in inexact_reason"

    def test_wrong_option_is_named_with_the_right_ones(self) -> None:
        names = type(self.strategy).option_names()
        with pytest.raises(UnknownName, match="'no_such_option'") as error:
            type(self.strategy).build({"no_such_option": 1})
        assert all(name in str(error.value) for name in names)

    def test_full_budget_is_the_dense_model(self) -> None:
        if self.strategy.exact_at_full:
            self._identity_on(self.model(), self.images())

    def _identity_on(self, model: nn.Module, x: Tensor) -> None:
        full = dataclasses.replace(self.strategy, **self.identity)
        with torch.no_grad():
            dense = model(x)
            with patch_quietly(model, full):
                torch.testing.assert_close(model(x), dense, **self.tolerance)

    def test_images_do_not_influence_each_other(self) -> None:
        with self._patched() as (model, x, _):
            torch.testing.assert_close(model(x)[:1], model(x[:1]), **self.batch_tolerance)

    def test_unpatch_restores_everything(self) -> None:
        model, x = self.model(), self.images()
        with torch.no_grad():
            dense = model(x)
            with restored(model), patch_quietly(model, self.strategy) as patched:
                sparse = model(x)
                assert not self.changes or not torch.equal(sparse, dense), "nothing was changed"
                with patched.disabled():
                    assert torch.equal(model(x), dense)
            assert torch.equal(model(x), dense)

    def test_a_wrong_input_leaves_nothing_behind(self) -> None:
        model, x = self.model(), self.images()
        with torch.no_grad():
            dense = model(x)
            with restored(model), patch_quietly(model, self.strategy):
                sparse = model(x)
                with pytest.raises((RuntimeError, AssertionError, ValueError)):
                    model(x[:, :1])  # one channel
                assert torch.equal(model(x), sparse)
            assert torch.equal(model(x), dense)

    def test_host_keys_stay_and_dense_checkpoints_load(self) -> None:
        model = self.model()
        dense = copy.deepcopy(model.state_dict())
        with patch_quietly(model, self.strategy) as patched:
            added = set(model.state_dict()) - set(dense)
            prefixes = tuple(f"{site.name}.sparsiattn." for site in patched.sites)
            assert all(name.startswith(prefixes) for name in added)
            assert set(dense) <= set(model.state_dict())
            model.load_state_dict(dense, strict=True)

    def test_copies_and_pickles_stay_patched(self) -> None:
        with self._patched() as (model, x, _):
            sparse = model(x)
            for model_copy in (copy.deepcopy(model), _through_pickle(model)):
                patched = patch_of(model_copy)
                assert patched is not None
                assert patched.model is model_copy
                assert torch.equal(model_copy(x), sparse)
                patched.unpatch()
            assert torch.equal(model(x), sparse), "undoing a copy must not undo the original"

    def test_saved_and_loaded_it_computes_the_same(self, tmp_path: Path) -> None:
        model, x = self.model(), self.images()
        model_copy = copy.deepcopy(model)
        found_by_name = registered("strategies", type(self.strategy))
        with torch.no_grad(), found_by_name, patch_quietly(model, self.strategy) as patched:
            patched.save(tmp_path / "saved")
            with load(model_copy, tmp_path / "saved") as loaded:
                assert type(loaded.strategy) is type(patched.strategy)
                assert torch.equal(model_copy(x), model(x))

    def test_host_weights_get_gradients(self) -> None:
        """Also after a warm-up in inference mode, whose tensors must not be kept."""
        model, x = self.model(), self.images()
        with patch_quietly(model, self.strategy):
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
        with patch_quietly(model, self.strategy):
            direct = _gradients(model, x)
            model.set_grad_checkpointing(True)
            torch.testing.assert_close(_gradients(model, x), direct)

    def test_weights_of_planners_learn(self) -> None:
        """A planner with weights has a loss (`LearnedPlanner`), or the model's own reaches them in
        training mode."""
        model, x = self.model(), self.images()
        with patch_quietly(model, self.strategy) as patched:
            weights = {n: p for n, p in model.named_parameters() if ".sparsiattn." in n}
            if not weights:
                return
            for weight in weights.values():
                weight.requires_grad_(True)
            planners = [runtime.planner for runtime in patched.runtimes]
            learned = [planner for planner in planners if isinstance(planner, LearnedPlanner)]
            losses = site_losses(patched, x)
            assert len(losses) >= len(learned)
            if sum(1 for planner in learned for _ in planner.parameters()) < len(weights):
                losses.append(model.train()(x).square().mean())
            torch.stack(losses).sum().backward()
            for name, weight in weights.items():
                assert weight.grad is not None, f"{name} gets no gradient"
                assert torch.isfinite(weight.grad).all(), name
            assert any(p.grad is not None and p.grad.any() for p in weights.values())

    def test_same_input_same_bits(self) -> None:
        model, x = self.model(), self.images()
        state = torch.get_rng_state()
        outputs = []
        for _ in range(2):
            with torch.no_grad(), patch_quietly(model, self.strategy):
                outputs += [model(x), model(x)]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        assert torch.equal(state, torch.get_rng_state()), "the global RNG was touched"

    def test_lower_precision(self) -> None:
        """Under autocast, and with weights in bfloat16; choices may differ, so values are free."""
        with self._patched() as (model, x, _):
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
        with self._patched() as (model, x, patched):
            model(x[:1])
            declared = {row.name: row for row in patched.report().sites}
            profiled = profile(model, x[:1])
        for site in profiled.sites:
            row = declared[site.name]
            if row.density is not None and row.macs is not None:
                assert site.density == pytest.approx(row.density, abs=1e-6), site.name
                assert site.pattern.mhsa == pytest.approx(row.macs, rel=1e-6), site.name
                if self.strategy.kind == "attention":  # else the choice of tokens is in it too
                    planned = pytest.approx(row.predictor_macs, rel=0.02)
                    assert site.pattern.predictor == planned, site.name

    def test_windows(self) -> None:
        """A host with windows is served, or refused with a reason and left as it was."""
        windowed = self.windowed()
        if windowed is None:
            pytest.skip("no windowed host given")
        model, x = windowed
        with torch.no_grad():
            dense = model(x)
            with restored(model):
                try:
                    patched = patch_quietly(model, self.strategy)
                except SparsiattnError as refusal:
                    assert str(refusal)  # noqa: PT017 - a refusal is one of two answers
                else:
                    assert torch.isfinite(model(x)).all()
                    patched.unpatch()
            assert torch.equal(model(x), dense)

    @pytest.mark.slow
    def test_compiles_to_one_graph(self) -> None:
        self._skip_without_static_graph()
        with self._patched() as (model, x, _):
            exact = model(x)
            torch.compiler.reset()
            compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)
        torch.compiler.reset()

    @pytest.mark.slow
    def test_exports(self) -> None:
        self._skip_without_static_graph()
        with self._patched() as (model, x, _):
            program = torch.export.export(model, (x,))
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_its_import_brings_nothing_heavy(self) -> None:
        assert not imported_by(type(self.strategy).__module__) & HEAVY


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """After the block a model must have the modules and weights it had before, and no hooks."""
    modules, weights = list(model.named_modules()), copy.deepcopy(model.state_dict())
    yield
    assert list(model.named_modules()) == modules
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    weights = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(x).square().sum(), weights, allow_unused=True)
    return [g for g in grads if g is not None]
