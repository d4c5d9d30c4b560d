"""`Patch.warmup`: kernels get ready, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import AttentionInputs, Kernel, Pattern, patch
from sparsiattn.kernels import Reference, warm_kernels
from sparsiattn.registry import REGISTRY
from sparsiattn.testing import random_inputs, tiny_images, tiny_vit


class Slow(Kernel):
    """Ready for the shapes it was warmed up for."""

    name = "slow"
    summary = "notes what it is asked"

    def __init__(self) -> None:
        self.warmed: list[tuple[tuple[int, ...], bool]] = []
        self.expected = 9.0

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        return ["has no dropout"] if inputs.dropout else []

    def not_ready(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        shapes = [shape for shape, _ in self.warmed]
        return [] if tuple(inputs.q.shape) in shapes else ["not ready"]

    def speed(self, inputs: AttentionInputs, pattern: Pattern) -> float:
        return self.expected

    def warmup(self, inputs: AttentionInputs, pattern: Pattern) -> None:
        assert torch.is_grad_enabled() == inputs.q.requires_grad
        assert not torch.is_inference_mode_enabled()
        self.warmed.append((tuple(inputs.q.shape), inputs.q.requires_grad))

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        return Reference()(inputs, pattern)


@pytest.fixture
def slow() -> Iterator[Slow]:
    kernel = Slow()
    plugin = SimpleNamespace(
        sparsiattn_kernels=sparsiattn.hookimpl(lambda: [kernel], specname="sparsiattn_kernels")
    )
    with REGISTRY.temporary(plugin):
        yield kernel


def kernels(handle: sparsiattn.Patch) -> list[str]:
    return [row.kernel for row in handle.report().sites]


def test_every_site_gets_ready_and_auto_takes_it(slow: Slow) -> None:
    with patch(tiny_vit(), "topk", k=0.3) as handle, torch.no_grad():
        handle.model(tiny_images(2))
        assert slow.warmed == []  # a forward pass warms nothing up
        assert "slow" not in kernels(handle)
        assert handle.warmup(tiny_images(2)) is handle
        assert slow.warmed == [((2, 3, 65, 16), False)] * 2
        assert kernels(handle) == ["slow", "slow"]
        handle.model(tiny_images(3))
        assert "slow" not in kernels(handle)
        handle.model(tiny_images(2))
        assert kernels(handle) == ["slow", "slow"]
        assert len(slow.warmed) == 2


def test_one_that_would_not_be_taken_is_not_warmed_up(slow: Slow) -> None:
    slow.expected = 0.01
    with patch(tiny_vit(), "topk", k=0.3) as handle:
        handle.warmup(tiny_images(2))
    assert slow.warmed == []
    with patch(tiny_vit(), "topk", k=0.3, kernel="slow") as handle:
        handle.warmup(tiny_images(2))
    assert len(slow.warmed) == 2


def test_by_name_it_is_warmed_up_as_well(slow: Slow) -> None:
    with patch(tiny_vit(), "topk", k=0.3, kernel="slow") as handle:
        handle.warmup(tiny_images(1))
    assert slow.warmed == [((1, 3, 65, 16), False)] * 2


def test_inference_mode_outside_leaves_nothing_that_breaks_training(slow: Slow) -> None:
    model = tiny_vit()
    with patch(model, "connectivity", k=0.3, tile=(4, 4), block=(2, 2)) as handle:
        with torch.inference_mode():
            handle.warmup(tiny_images(2))
        model(tiny_images(2)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "sparsiattn" not in n)


class _Host(nn.Module):
    """A ViT before whose head a batch is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.norm = tiny_vit(), nn.BatchNorm1d(5)
        self.rows: list[int] = []

    def forward(self, x: Tensor, *, noise: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        if noise is not None:
            x = x + noise
        return self.norm(self.vit(x) + torch.rand(5))  # type: ignore[no-any-return]


def test_a_training_model_is_left_as_it_was(slow: Slow) -> None:
    model = _Host().train()
    options = {"keep": 0.5, "layers": [0], "k": 0.3, "only_if_faster": False}
    with patch(model, "hybrid", input=(1, 3, 32, 32), **options) as handle:
        model(tiny_images(3))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        dice, source = torch.get_rng_state(), handle.source()
        handle.warmup(tiny_images(2))
        assert model.training
        assert model.norm.training
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], value) for name, value in state.items())
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), dice)
        assert torch.equal(handle.source(), source)
    assert slow.warmed


def test_a_model_that_raises_is_left_as_it_was() -> None:
    model = _Host().train()
    with patch(model, "topk", k=0.3, input=(1, 3, 32, 32)) as handle:
        dice, count = torch.get_rng_state(), model.norm.num_batches_tracked.clone()
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            handle.warmup(tiny_images(1))  # a batch of one has no variance
        assert torch.equal(torch.get_rng_state(), dice)
        assert torch.equal(model.norm.num_batches_tracked, count)
        model.eval()
        assert model(tiny_images(1)).shape == (1, 5)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_whatever_the_model_takes(form: str) -> None:
    model, x = _Host().eval(), tiny_images(2)
    forms = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"x": x, "noise": torch.ones(1)}}
    with patch(model, "topk", k=0.3, input=(1, 3, 32, 32)) as handle:
        model.rows.clear()
        handle.warmup(forms[form])
    assert model.rows == [2]


def test_errors_say_what_to_do() -> None:
    handle = patch(tiny_vit(), "topk", k=0.3)
    with pytest.raises(sparsiattn.InvalidType, match=r"image tensor \[B, C, H, W\].*got int"):
        handle.warmup(2)
    inside = r"warmup\(\) inside disabled\(\) or observing\(\) .* call it outside of that block"
    with handle.disabled(), pytest.raises(sparsiattn.InvalidOption, match=inside):
        handle.warmup(tiny_images(1))
    with (
        handle.observing(lambda *_: None),
        pytest.raises(sparsiattn.InvalidOption, match=inside),
    ):
        handle.warmup(tiny_images(1))
    handle.unpatch()
    with pytest.raises(sparsiattn.ModelChanged, match=r"warmup\(\) needs a live patch"):
        handle.warmup(tiny_images(1))


@pytest.mark.parametrize("training", [False, True])
def test_backward_passes_get_ready_where_the_model_trains_on_a_device(
    slow: Slow, training: bool
) -> None:
    inputs = random_inputs((4, 4))
    q, k, v = (x.to("meta") for x in (inputs.q, inputs.k, inputs.v))
    away, pattern = inputs.replace(q=q, k=k, v=v), Pattern.dense(17, 17)
    warm_kernels((slow,), away, pattern, training=training)
    warm_kernels((slow,), away.replace(dropout=0.1), pattern, training=training)  # refused
    warm_kernels((slow,), inputs, pattern, training=training)  # no kernel compiles one for the CPU
    shape = (2, 3, 17, 8)
    wanted = [(shape, False), (shape, True)] if training else [(shape, False)]
    assert slow.warmed == [*wanted, (shape, False)]
    assert torch.is_grad_enabled()
