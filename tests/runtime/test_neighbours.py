"""What others see of torch: with no patch alive, it is as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import sparsiattn
from tests.support import zoo

ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _as_it_was() -> None:
    gc.collect()
    for patch in [x for x in gc.get_objects() if type(x) is sparsiattn.Patch]:
        patch.unpatch()  # torch.jit and tracebacks keep models of other tests
    assert F.scaled_dot_product_attention is ORIGINAL


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class _Names(TorchFunctionMode):
    """Which functions were called, and whether one was attention by the name in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []
        self.attention = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        self.attention += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _graph() -> Any:
    nodes = fx.symbolic_trace(_Attention()).graph.nodes
    return next(node.target for node in nodes if node.op == "call_function")


@pytest.mark.parametrize(("strategy", "options"), [("topk", {"k": 0.1}), ("token_drop", {})])
def test_torch_is_as_it_was_once_the_last_patch_is_gone(
    strategy: str, options: dict[str, Any]
) -> None:
    models = zoo.build("vit"), zoo.build("vit")
    first, second = (sparsiattn.patch(m, strategy, **options) for m in models)
    first.report()
    models[0](torch.randn(1, 3, 32, 32))
    first.unpatch()
    assert F.scaled_dot_product_attention is not ORIGINAL
    second.unpatch()
    assert F.scaled_dot_product_attention is ORIGINAL
    x, names = torch.randn(1, 1, 4, 8), _Names()
    with names:
        _Attention()(x)
    assert names.called == [ORIGINAL]
    assert _graph() is ORIGINAL
    assert pickle.loads(pickle.dumps(F.scaled_dot_product_attention)) is ORIGINAL


def _deleted(model: nn.Module) -> None:
    sparsiattn.patch(model, k=0.25)


def _refused(model: nn.Module) -> None:
    with pytest.raises(sparsiattn.SparsiattnError):
        sparsiattn.patch(model, k=0.25, sites=["none"])


def _no_attention(_: nn.Module) -> None:
    with pytest.raises(sparsiattn.NothingToPatch):
        sparsiattn.patch(nn.Linear(8, 2), k=0.25, input=(1, 3, 8, 8))


def _copied(model: nn.Module) -> None:
    with sparsiattn.patch(model, k=0.25):
        twin, part = copy.deepcopy(model), copy.deepcopy(model.blocks[0])
        file = pickle.dumps(model)
    assert F.scaled_dot_product_attention is not ORIGINAL  # copies live
    sparsiattn.unpatch(twin)
    assert F.scaled_dot_product_attention is not ORIGINAL
    sparsiattn.unpatch(part)
    assert F.scaled_dot_product_attention is ORIGINAL
    loaded = pickle.loads(file)
    assert F.scaled_dot_product_attention is not ORIGINAL
    sparsiattn.unpatch(loaded)
    assert F.scaled_dot_product_attention is ORIGINAL
    pickle.loads(file)


def _loaded(model: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with sparsiattn.patch(model, k=0.25) as patch:
            patch.save(folder)
        assert F.scaled_dot_product_attention is ORIGINAL
        with sparsiattn.load(model, folder):
            assert F.scaled_dot_product_attention is not ORIGINAL


def _nested(model: nn.Module) -> None:
    with sparsiattn.patch(model, k=0.25):
        with sparsiattn.patch(zoo.build("vit"), "token_drop"):
            pass
        assert F.scaled_dot_product_attention is not ORIGINAL


def _in_threads(model: nn.Module) -> None:
    others = [zoo.build("vit") for _ in range(3)]
    x = torch.randn(1, 3, 32, 32)

    def serve(other: nn.Module) -> bool:
        with torch.no_grad(), sparsiattn.patch(other, k=0.1) as patch:
            sparse = other(x)
            with patch.disabled():
                return not torch.allclose(sparse, other(x), atol=1e-4)

    with ThreadPoolExecutor(3) as workers:
        for _ in range(2):
            assert all(workers.map(serve, others))


@pytest.mark.parametrize(
    "use", [_deleted, _refused, _no_attention, _copied, _loaded, _nested, _in_threads]
)
def test_nothing_else_keeps_the_replacement(use: Callable[[nn.Module], None]) -> None:
    use(zoo.build("vit"))
    gc.collect()
    assert F.scaled_dot_product_attention is ORIGINAL


def test_inspecting_a_model_replaces_nothing() -> None:
    sparsiattn.inspect(zoo.build("vit"))
    assert F.scaled_dot_product_attention is ORIGINAL


def test_what_was_made_while_a_patch_lived_is_fine_later() -> None:
    x = torch.randn(1, 1, 4, 8)
    with sparsiattn.patch(zoo.build("vit"), k=0.25):
        name = pickle.dumps(F.scaled_dot_product_attention)
        held, names = F.scaled_dot_product_attention, _Names()
        traced = fx.symbolic_trace(_Attention())
        target = _graph()
        with names:
            _Attention()(x)
        assert names.attention >= 1
    assert target is ORIGINAL
    assert pickle.loads(name) is ORIGINAL
    assert torch.equal(traced(x), ORIGINAL(x, x, x))
    assert torch.equal(held(x, x, x), ORIGINAL(x, x, x))


def test_a_replacement_of_others_stays_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    @wraps(ORIGINAL)
    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return ORIGINAL(*args, **kwargs)

    model = zoo.build("vit")
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for _ in range(2):
        with sparsiattn.patch(model, k=0.25) as patch:
            assert F.scaled_dot_product_attention is not counted
            with patch.disabled():
                model(torch.randn(1, 3, 32, 32))
            assert calls
        assert F.scaled_dot_product_attention is counted


def test_others_who_wrap_the_replacement_keep_what_they_wrapped() -> None:
    model, x, calls = zoo.build("vit"), torch.randn(1, 3, 32, 32), []
    with torch.no_grad(), sparsiattn.patch(model, k=0.1):
        sparse, replacement = model(x), F.scaled_dot_product_attention

        @wraps(replacement)
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return replacement(*args, **kwargs)

        F.scaled_dot_product_attention = counted
        assert torch.equal(model(x), sparse)
    assert F.scaled_dot_product_attention is counted
    q = torch.randn(1, 1, 4, 8)
    assert torch.equal(counted(q, q, q), ORIGINAL(q, q, q))
    F.scaled_dot_product_attention = ORIGINAL
    with torch.no_grad(), sparsiattn.patch(model, k=0.1):
        calls.clear()
        assert torch.equal(model(x), sparse)
        assert not calls


def test_compiled_code_follows() -> None:
    torch.compiler.reset()
    model, plain, x = zoo.build("vit"), zoo.build("vit"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        dense, other = model(x), plain(x)
        with sparsiattn.patch(model, k=0.1):
            sparse, file = model(x), pickle.dumps(model)
        neighbour = torch.compile(plain, backend="eager")
        torch.testing.assert_close(neighbour(x), other)
        twin = pickle.loads(file)  # code that was compiled meanwhile goes on to be right
        torch.testing.assert_close(torch.compile(twin, backend="eager")(x), sparse)
        torch.testing.assert_close(neighbour(x), other)
        del twin
        gc.collect()
        assert F.scaled_dot_product_attention is ORIGINAL
        torch.testing.assert_close(neighbour(x), other)
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            with sparsiattn.patch(model, k=0.1):
                torch.testing.assert_close(compiled(x), sparse)
            torch.testing.assert_close(compiled(x), dense)
