"""Derivatives of derivatives, forward mode and `torch.func`: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import sparsiattn
from sparsiattn import Pattern
from sparsiattn.attention import Lengths, geometry
from sparsiattn.kernels import (
    FlashAttention4,
    Flex,
    Kernel,
    Native,
    Natten,
    Reference,
    Triton,
    Varlen,
    XFormers,
    varlen,
)
from sparsiattn.kernels import xformers as fmha
from sparsiattn.kernels.varlen import Shim
from sparsiattn.kernels.xformers import Operators
from sparsiattn.strategies import finish
from sparsiattn.testing import random_inputs

STEP = 1e-6
X, U = torch.randn(2, 2, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))
SITES: dict[str, tuple[str, dict[str, Any]]] = {
    "reference": ("local", {"k": 0.4}),
    "sdpa": ("topk", {"k": 0.4}),
    "gather": ("topk", {"k": 0.4, "tile": (2, 2)}),
    "gather by block": ("connectivity", {"k": 0.4, "tile": (2, 2), "block": (2, 2)}),
    "gather without background": ("local", {"k": 0.4, "background": None}),
    "auto": ("connectivity", {"k": 0.4}),
}


@pytest.fixture(params=SITES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A small ViT in double precision, with a class token, patched with the kernel of that name."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )
    vit = vit.double().eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    strategy, options = SITES[request.param]
    sparsiattn.patch(vit, strategy, kernel=request.param.split()[0], **options)
    return vit


def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda images: model(images).square().sum()


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    """By one backward pass."""
    images = images.detach().requires_grad_()
    return torch.autograd.grad(loss(model)(images), images)[0]


def hessian_product(model: nn.Module) -> Tensor:
    """By differences of gradients."""
    return (gradient(model, X + STEP * U) - gradient(model, X - STEP * U)) / (2 * STEP)


def penalty(model: nn.Module, images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(model)(images), images, create_graph=True)
    return torch.autograd.grad((grad * U).sum(), images)[0]


def backward_twice(model: nn.Module, images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(model)(images), images, create_graph=True)
    (grad * U).sum().backward()
    assert images.grad is not None
    return images.grad


SECOND: dict[str, Callable[[nn.Module], Tensor]] = {
    "a penalty on the gradient": lambda m: penalty(m, X),
    "backward twice": lambda m: backward_twice(m, X),
    "functional.hvp": lambda m: torch.autograd.functional.hvp(loss(m), X, U)[1],
    "func.jvp of func.grad": lambda m: torch.func.jvp(torch.func.grad(loss(m)), (X,), (U,))[1],
}


@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives(model: nn.Module, way: str) -> None:
    torch.testing.assert_close(SECOND[way](model), hessian_product(model), rtol=1e-4, atol=1e-6)


FORWARD: dict[str, Callable[[nn.Module], Tensor]] = {
    "functional.jvp": lambda m: torch.autograd.functional.jvp(m, X, U)[1],
    "func.jvp": lambda m: torch.func.jvp(m, (X,), (U,))[1],
}


@pytest.mark.parametrize("way", FORWARD)
def test_forward_mode(model: nn.Module, way: str) -> None:
    with torch.no_grad():
        expected = (model(X + STEP * U) - model(X - STEP * U)) / (2 * STEP)
    torch.testing.assert_close(FORWARD[way](model), expected, rtol=1e-4, atol=1e-6)


def test_gradients_of_each_image(model: nn.Module) -> None:
    """Eval mode mixes no images, so they are the rows of the batch's gradient."""
    each = torch.vmap(torch.func.grad(lambda image: loss(model)(image[None])))(X)
    torch.testing.assert_close(each, gradient(model, X))


def test_gradients_of_weights_for_each_image(model: nn.Module) -> None:
    def of_one(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (image[None],))
        return logits.square().sum()  # type: ignore[no-any-return]

    weights = {name: p.detach() for name, p in model.named_parameters()}
    each = torch.vmap(torch.func.grad(of_one), (None, 0))(weights, X)
    name = "blocks.0.attn.qkv.weight"
    for image, found in zip(X, each[name], strict=True):
        model.zero_grad()
        loss(model)(image[None]).backward()
        torch.testing.assert_close(found, model.get_parameter(name).grad)


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians(model: nn.Module, vectorize: bool) -> None:
    x = X.clone().requires_grad_()
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in model(x)[:, 0]]
    found = torch.autograd.functional.jacobian(lambda x: model(x)[:, 0], X, vectorize=vectorize)
    torch.testing.assert_close(found, torch.stack(rows))


def test_vmap_over_images(model: nn.Module) -> None:
    with torch.no_grad():
        found = torch.vmap(lambda image: model(image[None])[0])(X)
        torch.testing.assert_close(found, model(X))


TRANSFORMS: dict[str, Callable[[nn.Module], Tensor]] = {
    "func.jvp": FORWARD["func.jvp"],
    "func.grad": lambda m: torch.func.grad(loss(m))(X),
    "func.jvp of func.grad": SECOND["func.jvp of func.grad"],
    "vmap of func.grad": lambda m: torch.vmap(torch.func.grad(lambda x: loss(m)(x[None])))(X),
}


@pytest.mark.parametrize("first", TRANSFORMS)
def test_nothing_made_in_a_transform_outlasts_it(
    model: nn.Module, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first call fills caches: whatever comes next finds the same in them as without it."""
    expected = {name: transform(model) for name, transform in TRANSFORMS.items()}
    monkeypatch.setattr(geometry, "_TABLES", {})
    TRANSFORMS[first](model)
    for name, transform in TRANSFORMS.items():
        torch.testing.assert_close(transform(model), expected[name])
    torch.testing.assert_close(gradient(model, X), expected["func.grad"])


def test_a_choice_made_outside_of_a_transform_does_not_count_inside() -> None:
    """Kernels are chosen once for calls alike: a transform makes a call another."""
    vit = sparsiattn.testing.tiny_vit()
    images = sparsiattn.testing.tiny_images()
    sparsiattn.patch(vit, "topk", k=0.25, tile=(2, 2))
    with torch.no_grad():
        expected = vit(images)
        found = torch.vmap(lambda image: vit(image[None])[0])(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


OWN_CODE = [Native(), Flex(), Triton(), Varlen(), XFormers(), FlashAttention4(), Natten()]


@pytest.mark.parametrize("kernel", OWN_CODE, ids=lambda kernel: kernel.name)
def test_kernels_of_their_own_code_refuse_transforms(kernel: Kernel) -> None:
    inputs = random_inputs((4, 4), tile=(2, 2), block=(2, 2), batch=1)
    blocks = finish(Pattern.top(torch.randn(1, 1, 4, 4), 9), inputs)
    pattern: Pattern = Lengths(17, 17, (8, 9)) if isinstance(kernel, Varlen) else blocks
    outside, inside = kernel.why_not(inputs, pattern), []

    def ask(q: Tensor) -> Tensor:
        inside.extend(kernel.why_not(inputs.replace(q=q), pattern))
        return q

    torch.vmap(ask)(inputs.q[None])
    assert not any("vmap" in reason for reason in outside)
    (reason,) = (reason for reason in inside if "vmap" in reason)
    assert "kernel='reference'" in reason


class OnlyOnce(torch.autograd.Function):
    """Attention ``[N, H, D]`` image by image, its backward pass made as fused kernels make it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return OnlyOnce.compute(q, k, v, scale)

    @staticmethod
    def compute(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        image = torch.arange(2).repeat_interleave(torch.tensor([8, 9]))
        logits = torch.einsum("nhd,mhd->hnm", q, k) * scale
        logits = logits.masked_fill(image[:, None] != image, float("-inf"))
        return torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            operands = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = OnlyOnce.compute(*operands, ctx.scale)
        return *torch.autograd.grad(out, operands, grad), None


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *ends: Any, scale: float | None = None) -> Tensor:
    assert scale is not None
    return OnlyOnce.apply(q, k, v, scale)  # type: ignore[no-any-return]


def memory_efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any, p: float, scale: float
) -> Tensor:
    return OnlyOnce.apply(q[0], k[0], v[0], scale)[None]  # type: ignore[no-any-return]


class Images:
    """In the place of xformers' mask."""

    @staticmethod
    def from_seqlens(lengths: list[int], *, device: torch.device) -> list[int]:
        return lengths


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both operators for ragged batches as they are on a GPU: differentiable once."""
    ops = SimpleNamespace(
        attn_bias=SimpleNamespace(BlockDiagonalMask=Images),
        memory_efficient_attention=memory_efficient_attention,
    )
    monkeypatch.setattr(fmha, "probe", lambda: Operators(ops, ""))
    monkeypatch.setattr(varlen, "shim", lambda: Shim(varlen_attn))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("kernel", [Varlen(), XFormers()], ids=lambda kernel: kernel.name)
def test_fused_operators_for_ragged_batches(kernel: Kernel) -> None:
    inputs = random_inputs((4, 4), batch=1, dtype=torch.float64)
    pattern = Lengths(17, 17, (8, 9))

    def second(attend: Kernel, dropout: float = 0.0) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        q, k, v = leaves
        out = attend(inputs.replace(q=q, k=k, v=v, dropout=dropout), pattern)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
        return torch.autograd.grad(penalty, leaves)

    torch.testing.assert_close(second(kernel), second(Reference()))
    if isinstance(kernel, XFormers):
        with pytest.raises(sparsiattn.SparsiattnError, match=r"'xformers'.*kernel='reference'"):
            second(kernel, dropout=0.1)
