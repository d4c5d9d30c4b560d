"""`torch.compile` keeps the native operators; exported programs, which run elsewhere, do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsiattn
from sparsiattn.testing.hosts import tiny_images, tiny_vit

pytestmark = pytest.mark.usefixtures("compiled_native")

# a line, and the operator that does its work in one call
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "native_attend_to_best": ("connectivity", {"k": 0.25, "kernel": "native"}),
    "native_voted_keys": ("connectivity", {"k": 0.25, "tile": (2, 2), "kernel": "native"}),
    "native_scores": (
        "connectivity",
        {"k": 0.25, "tile": (2, 2), "block": (2, 2), "scores": "predictor"},
    ),
    "native_merged": ("token_merge", {"ratio": 0.8}),
}


class Recorder:
    """A backend that runs what it is given, and remembers the operators."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.names |= operators(graph)
        return graph.forward


def operators(graph: torch.fx.GraphModule) -> set[str]:
    """Names of the library's operators in a graph."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return {target.split(".")[1] for target in targets if target.startswith("sparsiattn.")}


@pytest.mark.parametrize("operator", LINES)
def test_a_compiled_program_calls_it(operator: str) -> None:
    strategy, options = LINES[operator]
    model, images, recorder = tiny_vit(), tiny_images(), Recorder()
    with torch.no_grad(), sparsiattn.patch(model, strategy, **options):
        eager = model(images)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend=recorder)(images)
        torch.compiler.reset()
    assert operator in recorder.names
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("operator", LINES)
def test_an_exported_program_chooses_with_torch(operator: str) -> None:
    strategy, options = LINES[operator]
    options = {name: value for name, value in options.items() if name != "kernel"}
    model, images = tiny_vit(), tiny_images()
    with torch.no_grad(), sparsiattn.patch(model, strategy, **options):
        eager = model(images)
        program = torch.export.export(model, (images,))
    assert operator not in operators(program.graph_module)
    torch.testing.assert_close(program.module()(images), eager, rtol=1e-4, atol=1e-5)


def test_training_takes_what_has_a_gradient() -> None:
    model, images, recorder = tiny_vit(), tiny_images(), Recorder()
    with sparsiattn.patch(model, "connectivity", k=0.25):
        torch.compiler.reset()
        loss = torch.compile(model, backend=recorder)(images).square().sum()
        loss.backward()
        torch.compiler.reset()
    assert "native_attend_to_best" not in recorder.names
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(isinstance(g, torch.Tensor) and g.isfinite().all() for g in gradients)


def test_lists_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that need lists ask for them several times."""
    from sparsiattn.attention.top_logits import TopKeys

    calls = []
    lists = torch.zeros(1, 1, 4, 2, dtype=torch.int64)
    keys = TopKeys(4, 4, keys=2, prefix=0, make_index=lambda: calls.append(1) or lists)
    assert keys.index is keys.index
    assert len(calls) == 1
