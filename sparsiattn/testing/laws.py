"""`PatchSuite`: tests that every strategy must pass, whether it reduces keys or tokens."""

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
    """Tests of a strategy on a small plain ViT and on a windowed model.

    Override ``model()`` and ``images()`` to test with another model, and ``windowed()`` for another
    windowed model (None for no such test).

    Attributes:
        strategy: The strategy to test.
        identity: Options of the budget that keeps everything.
        tolerance: Tolerance of the comparison with the dense model at full budget.
        batch_tolerance: Tolerance of the comparison of an image alone and in a batch.
        compiles: Whether the strategy has a static graph.
        changes: Whether the strategy changes outputs before it is trained.
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
        """Yield the model, patched inside the block, its images, and the patch."""
        model = self.model()
        with torch.no_grad(), patch_quietly(model, self.strategy) as patched:
            yield model, self.images(), patched

    def _ragged(self) -> bool:
        """Whether images may keep different numbers of tokens."""
        return bool(getattr(self.strategy, "is_ragged", bool)())

    def _skip_without_static_graph(self) -> None:
        if not self.compiles or self._ragged():
            pytest.skip("the strategy has no static graph")

    def test_config_survives_json(self) -> None:
        saved = json.loads(json.dumps(self.strategy.to_dict()))
        assert saved["name"] == self.strategy.name
        assert saved["version"] == self.strategy.version
        assert type(self.strategy).build(saved["options"]) == self.strategy

    def test_says_what_it_is(self) -> None:
        """It has a summary for `list_strategies()`, and a reason if full budget is not dense."""
        kind = type(self.strategy)
        assert (kind.__doc__ or "").strip(), "write a docstring; its first line is the summary"
        assert kind.exact_at_full or kind.inexact_reason, "set inexact_reason"

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
        """They also do after a warm-up in inference mode, whose tensors must not be cached."""
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
        """Whether a weight of the host gets no gradient, as its output is not used.

        Weights of queries and keys are an example, if attention is replaced.
        """
        return False

    def test_gradients_survive_checkpointing(self) -> None:
        model: Any = self.model()
        if not hasattr(model, "set_grad_checkpointing"):
            pytest.skip("the model does not support gradient checkpointing")
        x = self.images()
        with patch_quietly(model, self.strategy):
            direct = _gradients(model, x)
            model.set_grad_checkpointing(True)
            torch.testing.assert_close(_gradients(model, x), direct)

    def test_weights_of_planners_learn(self) -> None:
        """Planner weights get a gradient from the planner's loss or from the model's loss."""
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
        """Autocast and bfloat16 weights work; values are not compared, as selections may differ."""
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
        """MACs in the report, computed from shapes, equal those that `profile` counts."""
        if self._ragged():
            pytest.skip("the number of tokens depends on values")
        with self._patched() as (model, x, patched):
            model(x[:1])
            declared = {row.name: row for row in patched.report().sites}
            profiled = profile(model, x[:1])
        for site in profiled.sites:
            row = declared[site.name]
            if row.density is not None and row.macs is not None:
                assert site.density == pytest.approx(row.density, abs=1e-6), site.name
                assert site.pattern.mhsa == pytest.approx(row.macs, rel=1e-6), site.name
                if self.strategy.kind == "attention":  # else it includes the selection of tokens
                    planned = pytest.approx(row.predictor_macs, rel=0.02)
                    assert site.pattern.predictor == planned, site.name

    def test_windows(self) -> None:
        """A windowed model is patched, or refused with a reason and left unchanged."""
        windowed = self.windowed()
        if windowed is None:
            pytest.skip("windowed() returns no model")
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
    """Check after the block that the model has the same modules and weights, and no hooks."""
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
