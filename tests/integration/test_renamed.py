"""Old names of options and of contracts work for one more minor version, with a warning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import sparsiattn
from sparsiattn import (
    AttentionInputs,
    Backbone,
    Kernel,
    LearnedPlanner,
    Pattern,
    Reduction,
    Strategy,
    TokenInputs,
    TokenStrategy,
)
from sparsiattn.attention.cross_layer_state import CrossLayerState
from sparsiattn.errors import RenamedMembers
from sparsiattn.strategies.connectivity import Connectivity
from sparsiattn.strategies.hybrid import Hybrid
from sparsiattn.testing.hosts import random_inputs, tiny_images, tiny_vit
from sparsiattn.training import checkpoint

OPTIONS = [
    ("own", "self_weight", 0.3), ("salience", "mean_query_boost", False),
    ("reduce", "tokens_per_basis", 4.0),
]  # fmt: skip
SAVED = Path(__file__).parents[1] / "serialization" / "saved_by_0_1"


@contextmanager
def renamed(old: str, new: str) -> Iterator[None]:
    """What is done inside warns that ``old`` is now ``new``, and names this file."""
    with pytest.warns(DeprecationWarning, match=f"{old}.* is now {new}") as caught:
        yield
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("old", "new", "value"), OPTIONS)
class TestOptions:
    def test_constructor(self, old: str, new: str, value: Any) -> None:
        with renamed(old, new):
            strategy = Connectivity(**{old: value})
        assert strategy == Connectivity(**{new: value})
        with renamed(old, new):
            assert getattr(strategy, old) == value

    def test_build(self, old: str, new: str, value: Any) -> None:
        with pytest.warns(DeprecationWarning, match=f"{old}=.* is now {new}="):
            strategy = Connectivity.build({old: value})
        assert strategy == Connectivity(**{new: value})

    def test_patch(self, old: str, new: str, value: Any) -> None:
        model = tiny_vit()
        with pytest.warns(DeprecationWarning, match=new):
            patched = sparsiattn.patch(model, "connectivity", **{old: value})
        assert patched.strategy == Connectivity(**{new: value})

    def test_saved_options_warn_nobody(self, old: str, new: str, value: Any) -> None:
        saved = {"name": "connectivity", "version": 1, "options": {old: value}}
        loaded = Connectivity(scores="predictor", **{new: value})
        assert Connectivity.from_dict(saved) == loaded
        assert Hybrid(attention=saved).attention == loaded

    def test_old_names_are_not_offered(self, old: str, new: str, value: Any) -> None:
        assert old not in Connectivity.option_names()
        assert old not in Connectivity().to_dict()["options"]


def test_a_wrong_name_is_still_an_error() -> None:
    with pytest.raises(sparsiattn.UnknownName, match="self_weight"):
        Connectivity.build({"owner": 0.1})
    with pytest.raises(TypeError, match="owner"):
        Connectivity(owner=0.1)  # type: ignore[call-arg]


class TestWeights:
    def test_an_old_state_dict_loads(self) -> None:
        planner: Any = Connectivity().planner(random_inputs((8, 8)).site)
        state = {"own": torch.tensor([0.7]), "down": planner.down, "up": planner.up}
        planner.load_state_dict(state)
        assert planner.self_weight.item() == pytest.approx(0.7)
        with renamed("own", "self_weight"):
            assert planner.own is planner.self_weight

    def test_an_old_checkpoint_of_a_model_loads(self) -> None:
        model, old = tiny_vit(), tiny_vit()
        sparsiattn.patch(model, "connectivity")
        sparsiattn.patch(old, "connectivity", self_weight=0.7)
        state = {
            name.replace("self_weight", "own"): tensor for name, tensor in old.state_dict().items()
        }
        assert any(name.endswith(".own") for name in state)
        model.load_state_dict(state)
        for name, tensor in old.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["connectivity", "hybrid"])
def test_a_folder_that_version_0_1_wrote_loads(name: str) -> None:
    """Old option names, nested ones too, and the planner weight `own`; answers of that version."""
    model: Any = tiny_vit()
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_((0.3 if weight.dim() == 1 else 0.15) * noise)
    answers = safetensors.torch.load_file(SAVED / "answers.safetensors")
    with torch.no_grad():
        dense = model.forward_features(answers["images"])
        patched = sparsiattn.load(model, SAVED / name)
        sparse = model.forward_features(answers["images"])
    attention: Any = patched.runtimes[0].strategy
    assert (attention.self_weight, attention.mean_query_boost) == (0.2, False)
    assert attention.tokens_per_basis == 4.0
    torch.testing.assert_close(sparse, answers[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dense, sparse, rtol=1e-3, atol=1e-3)


# base class -> its old members -> a value or method that a subclass may have given
OVERRIDES: list[tuple[type[RenamedMembers], str, str]] = [
    (base, old, new)
    for base in (Strategy, TokenStrategy, LearnedPlanner, Kernel, Backbone)
    for old, new in base.renamed_members.items()
]


@pytest.mark.parametrize(
    ("base", "old", "new"), OVERRIDES, ids=[f"{b.__name__}.{old}" for b, old, _ in OVERRIDES]
)
class TestContracts:
    def test_an_override_by_the_old_name_is_taken(
        self, base: type[RenamedMembers], old: str, new: str
    ) -> None:
        member = lambda *_: "mine"  # noqa: E731
        with pytest.warns(DeprecationWarning, match=f"Mine.{old} is now {new}"):
            kind = type("Mine", (base,), {old: member})
        assert vars(kind)[new] is member

    def test_super_by_the_old_name_gives_the_base(
        self, base: type[RenamedMembers], old: str, new: str
    ) -> None:
        with pytest.warns(DeprecationWarning, match=new):
            kind = type("Mine", (base,), {old: "mine"})
        with pytest.warns(DeprecationWarning, match=new):
            inherited = getattr(super(kind, kind), old)
        assert inherited == getattr(base, new)
        assert getattr(kind, new) == "mine"

    def test_a_call_by_the_old_name_warns(
        self, base: type[RenamedMembers], old: str, new: str
    ) -> None:
        kind = type("Mine", (base,), {new: "mine"})
        with renamed(f"Mine.{old}", new):
            assert getattr(kind, old) == "mine"


def test_an_option_by_an_old_name_is_no_override() -> None:
    @dataclass(frozen=True)
    class Mine(Strategy):
        name = "mine"
        at: int = 3

    assert Mine(at=4).at == 4
    assert Mine.resolve_for is Strategy.resolve_for


def test_an_old_strategy_plans_as_before() -> None:
    with pytest.warns(DeprecationWarning, match="is now"):

        @dataclass(frozen=True)
        class Old(Strategy):
            name = "old"
            chooses = False
            k: float = 0.5

            def at(self, site: Any, position: int, count: int) -> Strategy:
                return Old(k=1.0 if position else 0.25)

            def plan(self, inputs: AttentionInputs) -> Pattern:
                return Pattern.over(inputs, inputs.k, inputs.v)  # type: ignore[attr-defined,no-any-return]

    model = tiny_vit()
    patched = sparsiattn.patch(model, Old())
    with torch.no_grad(), pytest.warns(DeprecationWarning, match="Pattern.over is now"):
        model(tiny_images())
    assert [runtime.strategy.k for runtime in patched.runtimes] == [0.25, 1.0]  # type: ignore[attr-defined]


def test_an_old_token_strategy_reduces_as_before() -> None:
    with pytest.warns(DeprecationWarning, match="is now"):

        @dataclass(frozen=True)
        class Old(TokenStrategy):
            name = "old"
            keep: float = 0.5

            def reduces_at(self) -> Any:
                return "entry"

            def at(self, site: Any, position: int, count: int) -> TokenStrategy:
                return super().at(site, position, count)  # type: ignore[misc,no-any-return]

            def reduce(self, tokens: TokenInputs) -> Reduction | None:
                return Reduction.top(tokens.x.norm(dim=-1), self.keep)

    with pytest.warns(DeprecationWarning, match="Old.at is now resolve_for"):
        patched = sparsiattn.patch(tiny_vit(), Old(layers=[1]))
    assert [block.placement for block in patched.blocks] == ["entry"]


@pytest.mark.parametrize(("old", "new"), AttentionInputs.renamed_members.items())
def test_attention_inputs(old: str, new: str) -> None:
    inputs = random_inputs((4, 4)).replace(cross_layer=CrossLayerState())
    with renamed(f"AttentionInputs.{old}", new):
        member = getattr(inputs, old)
    expected = getattr(inputs, new)
    assert member is expected if isinstance(expected, Tensor) else member == expected


def test_a_checkpoint_with_old_option_names_is_of_the_same_run(tmp_path: Path) -> None:
    live = sparsiattn.patch(tiny_vit(), "connectivity", self_weight=0.2, tokens_per_basis=4.0)
    identity = checkpoint.patch_identity(live)
    text = json.dumps({"format": checkpoint.FORMAT, **identity, "progress": {}})
    for new, old in (("self_weight", "own"), ("tokens_per_basis", "reduce")):
        assert new in text
        text = text.replace(f'"{new}"', f'"{old}"')
    (tmp_path / checkpoint.STATE).write_text(text)
    assert checkpoint.load_state(tmp_path, identity) == checkpoint.TrainState()


def test_old_names_compile() -> None:
    inputs = random_inputs((4, 4), prefix=1)

    def keys(x: torch.Tensor) -> torch.Tensor:
        return x * inputs.keys_grid[0]  # type: ignore[attr-defined]

    with pytest.warns(DeprecationWarning, match="keys_grid"):
        expected = keys(inputs.q)
    compiled = torch.compile(keys, fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs.q), expected)
