"""`token_drop` with ``skip="window"``: windows that are chosen take a block, the others do not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

import sparsiattn
from sparsiattn.attention.windows import window_mask, window_order
from sparsiattn.runtime.thread_state import BLOCK_CALL
from tests.support import zoo

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip


def transformers_swin(version: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"Swin{version}Config")(**SMALL)
    return getattr(transformers, f"Swin{version}Model")(config)


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4],
        num_classes=5,
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: zoo.build("swin"),
    "swinv2": lambda: zoo.build("swinv2"),
    "swinv2_cr": lambda: zoo.build("swinv2_cr"),
    "transformers swin": lambda: zoo.drawn(lambda: transformers_swin("")),
    "transformers swinv2": lambda: zoo.drawn(lambda: transformers_swin("v2")),
}
TORCHVISION = {"torchvision swin": lambda: zoo.drawn(torchvision_swin)}
SKIP = {"strategy": "token_drop", "score": "norm", "skip": "window"}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def answer(model: nn.Module, x: Tensor = IMAGES) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Modules that hold an MLP behind a window attention, in order."""
    found = [
        m for m in model.modules()
        if any(hasattr(m, name) for name in ("mlp", "intermediate")) and hasattr(m, "forward")
        and any(hasattr(m, name) for name in ("attn", "attention"))
    ]  # fmt: skip
    assert len(found) == 4
    return found


def windows_of(side: int, size: int, shift: int) -> list[list[int]]:
    """Tokens of every window by plain loops: window (r, c) holds what the roll brought there."""
    return [
        [
            ((r * size + a + shift) % side) * side + (c * size + b + shift) % side
            for a in range(size) for b in range(size)
        ]
        for r in range(side // size) for c in range(side // size)
    ]  # fmt: skip


class PlainSkip:
    """Forward hook: what a block gives if all but the windows of largest mean pass through it."""

    def __init__(self, keep: int, shift: int) -> None:
        self.keep, self.shift = keep, shift

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        x, host = args[0], output[0] if isinstance(output, tuple) else output
        flat, out = (
            x.reshape(x.shape[0], -1, x.shape[-1]),
            host.reshape(x.shape[0], -1, x.shape[-1]),
        )
        side = round(flat.shape[1] ** 0.5)
        mixed = flat.clone()
        for image in range(len(flat)):
            windows = windows_of(side, 4, self.shift)
            norms = [float(flat[image, window].mean(0).norm()) for window in windows]
            best = sorted(range(len(windows)), key=lambda w: -norms[w])[: self.keep]
            for window in best:
                mixed[image, windows[window]] = out[image, windows[window]]
        mixed = mixed.view(host.shape)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        *(("swin", layer) for layer in range(4)), ("swinv2", 1), ("swinv2_cr", 1),
        ("transformers swin", 1), ("transformers swin", 2), ("transformers swinv2", 1),
    ],
)  # fmt: skip
def test_chosen_windows_get_what_the_block_gives_them_and_others_nothing(
    family: str, layer: int
) -> None:
    """Tokens meet in their window alone, so the block on the whole map is the oracle."""
    model = MODELS[family]()
    host = copy.deepcopy(model)
    windows = 16 if layer < 2 else 4
    plain = PlainSkip(windows // 4, shift=2 if layer % 2 else 0)
    blocks_of(host)[layer].register_forward_hook(plain)
    with torch.no_grad():
        expected, dense = answer(host), answer(model)
        with sparsiattn.patch(model, **SKIP, keep=0.25, layers=[layer]):
            found = answer(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - dense).abs().max() > 3e-3  # it is another model


@pytest.mark.parametrize("family", {**MODELS, **TORCHVISION})
def test_the_line_of_the_report_works_and_saves(family: str) -> None:
    model = {**MODELS, **TORCHVISION}[family]()
    options = {"input": (3, 64, 64)} if family in TORCHVISION else {}
    with pytest.warns(sparsiattn.SlowerThanDense, match="skip='window'"):
        live = sparsiattn.patch(model, "connectivity", k=0.1, **options)
    first, *_ = str(live.report()).splitlines()
    live.unpatch()
    assert "windows of 16 tokens gain nothing from sparse attention; try " in first
    line = first.partition("; try ")[2]
    if options:
        line = line.replace("keep=", "input=(3, 64, 64), keep=")
    patch = eval(line, {"sparsiattn": sparsiattn, "model": model})
    with torch.no_grad():
        answer(model)
    report = patch.report()
    assert report.macs is not None
    assert report.macs < 0.97 * report.macs_dense
    assert any("which skip the block" in text for text in report.reductions)
    assert report.windows == ""
    patch.unpatch()


def test_attention_in_the_whole_image_has_no_such_line() -> None:
    with sparsiattn.patch(zoo.build("vit"), "connectivity", k=0.1) as live:
        assert live.report().windows == ""
        assert "windows of" not in str(live.report())


@pytest.mark.parametrize("family", MODELS)
def test_all_windows_give_the_model_itself_and_unpatching_undoes_it(family: str) -> None:
    model = MODELS[family]()
    with torch.no_grad():
        dense = answer(model)
        with sparsiattn.patch(model, **SKIP, keep=1.0, layers=[0, 1, 2, 3]) as live:
            torch.testing.assert_close(answer(model), dense, rtol=1e-4, atol=1e-5)
            with live.disabled():
                assert torch.equal(answer(model), dense)
        with sparsiattn.patch(model, **SKIP, keep=0.5, layers=[0, 1]):
            assert not torch.allclose(answer(model), dense, atol=1e-3)
        assert torch.equal(answer(model), dense)
    assert BLOCK_CALL.windows is None


def test_an_image_is_the_same_alone_and_in_a_batch() -> None:
    model = zoo.build("swin")
    with torch.no_grad(), sparsiattn.patch(model, **SKIP, keep=0.5, layers=[0, 1]):
        together = answer(model)
        alone = torch.cat([answer(model, image[None]) for image in IMAGES])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["norm", "random"])
def test_a_saved_folder_skips_the_same_windows(score: str, tmp_path: Any) -> None:
    model = zoo.build("swin")
    other = copy.deepcopy(model)
    options = {**SKIP, "score": score}
    with torch.no_grad():
        live = sparsiattn.patch(model, **options, keep=[0.5, 0.25], layers=[0, 1])
        live.save(tmp_path / "saved")
        sparsiattn.load(other, tmp_path / "saved")
        assert torch.equal(answer(other), answer(model))


def test_checkpoints_inside_a_shifted_block_are_refused() -> None:
    """Run again without the block's hooks, its attention would get another mask."""
    model = MODELS["transformers swin"]().train()
    layers = [m for m in model.modules() if type(m).__name__ == "SwinLayer"]
    if not hasattr(layers[0], "gradient_checkpointing"):
        pytest.skip("this transformers has no checkpoints inside of Swin's blocks")
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
        module._gradient_checkpointing_func = partial(
            torch.utils.checkpoint.checkpoint, use_reentrant=False
        )
    with sparsiattn.patch(model, **SKIP, keep=0.5, layers=[0, 1]):
        out = answer(model, IMAGES.clone().requires_grad_())
        with pytest.raises(sparsiattn.ModelChanged, match="checkpoints its own forward"):
            out.square().sum().backward()


def test_gradients_are_those_of_windows_that_took_the_block() -> None:
    """Skipped windows pass gradients through, and checkpoints around blocks change nothing."""
    model = zoo.build("swin").train()
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        with sparsiattn.patch(model, **SKIP, keep=0.5, layers=[0, 1]):
            torch.manual_seed(0)  # of stochastic depth
            x = IMAGES.clone().requires_grad_()
            model.zero_grad()
            answer(model, x).square().sum().backward()
            assert x.grad is not None
            norms = [p.grad for p in model.parameters() if p.grad is not None]
            grads.append([x.grad, *norms])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)
    assert grads[0][0].abs().amax((0, 1)).gt(0).all()  # every pixel matters still


def test_it_compiles_as_one_graph() -> None:
    model = zoo.build("swin")
    with torch.no_grad(), sparsiattn.patch(model, **SKIP, keep=0.5, layers=[0, 1]):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IMAGES), answer(model))


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_it_exports(family: str) -> None:
    model = MODELS[family]()
    with torch.no_grad(), sparsiattn.patch(model, **SKIP, keep=0.5, layers=[0, 1]):
        expected = answer(model)
        exported = torch.export.export(model, (IMAGES,)).module()
        torch.testing.assert_close(answer(exported), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("swin", {"score": "cls"}, "needs score='norm' or score='random'"),
        ("swin", {"score": "learned"}, "needs score='norm' or score='random'"),
        ("swin", {"keep": "adaptive"}, "needs a fixed keep, the same for every image"),
        ("swin", {"skip": "block"}, "skip must be one of"),
        ("swin", {"input": (3, 72, 64)}, "multiples of the window .4, 4., got .18, 16."),
        ("vit", {}, "needs blocks that attend in windows, and VisionTransformer has none"),
        ("torchvision swin", {"layers": [1], "input": (3, 64, 64)}, "'features.1.1' cannot run on"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    family: str, options: dict[str, Any], says: str
) -> None:
    if "input" in options and family == "swin":
        model: nn.Module = zoo.drawn(
            lambda: zoo.models.SwinTransformer(**{**zoo._WINDOWS, "img_size": (72, 64)})
        )
        options = {}
    else:
        model = TORCHVISION[family]() if family in TORCHVISION else zoo.build(family)
    before = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(sparsiattn.InvalidOption, match=says):
        sparsiattn.patch(model, **{**SKIP, **options})
    assert before == {name: dict(module._forward_hooks) for name, module in model.named_modules()}


def test_beside_sparse_attention_it_is_refused() -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="use token_drop alone"):
        sparsiattn.patch(
            zoo.build("swin"), "hybrid", attention="local",
            tokens=sparsiattn.strategies.TokenDrop(score="norm", skip="window"),
        )  # fmt: skip


class LooksFar(SwinTransformerBlock):
    """A block that says it has windows, and whose attention branch looks at the whole map."""

    def _attn(self, x: Tensor) -> Tensor:
        out: Tensor = super()._attn(x) + x.mean((1, 2), keepdim=True)
        return out


def test_a_block_that_is_not_what_its_windows_say_is_found_out() -> None:
    model = zoo.build("swin")
    model.layers[0].blocks[0].__class__ = LooksFar
    with pytest.raises(sparsiattn.InvalidOption, match=r"differs from that on the full map"):
        sparsiattn.patch(model, **SKIP, keep=0.5, layers=[0])


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_tables_against_loops(shift: int) -> None:
    order = window_order((8, 8), (4, 4), (shift, shift), device=CPU)
    unrolled = order.view(-1, 4, 4).roll((-shift, -shift), (1, 2)).flatten(1)
    assert unrolled.tolist() == windows_of(8, 4, shift)
    assert sorted(order.flatten().tolist()) == list(range(64))
    mask = window_mask((8, 8), (4, 4), (shift, shift), device=CPU)
    for w, tokens in enumerate(windows_of(8, 4, shift)):
        for i, a in enumerate(tokens):
            for j, b in enumerate(tokens):
                # neighbours in the image are less than a window apart
                near = abs(a // 8 - b // 8) < 4 and abs(a % 8 - b % 8) < 4
                assert (mask[w, i, j] == 0) == near
