"""Models that do not run without data are patched by one forward pass of a copy with data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn import InvalidOption, NothingToPatch, ProbeFailed
from tests.support.strongest_keys import SIZE, Blocks, TokenAttention, photos, strongest_keys

# where numbers pass through numpy, and in text, nothing tells where in the image tokens are
pytestmark = pytest.mark.filterwarnings("ignore:which tokens")


def attention(host: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Plain(Blocks):
    """A model that runs without data, and what the others below share."""

    def __init__(self) -> None:
        super().__init__(TokenAttention(attention), TokenAttention(attention))
        self.norm = nn.BatchNorm2d(3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(self.norm(x))


class ReadsANumber(Plain):
    """Scales by a number that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / max(1e-6, x.abs().max().item()))


class DecidesByValues(Plain):
    """Goes on where something in the image is bright."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if (x > 0.1).any() else x


class CountsByValues(Plain):
    """Takes as many rows as are not black."""

    def forward(self, x: Tensor) -> Tensor:
        rows = [row for row in range(x.shape[-2]) if x[..., row, :].abs().sum() > 0]
        return super().forward(x[..., : len(rows), :])


class ThroughNumpy(Plain):
    """Makes its image in numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(x.detach().numpy() * 1.0))


class Drawing(Plain):
    """Draws random numbers, and reads one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + 0 * torch.rand(()).item()))


MEAN = torch.full((1, 3, 1, 1), 0.5)


class CachedElsewhere(Plain):
    """Adds a tensor that is kept outside the model."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + MEAN)


NEED_VALUES = [
    CachedElsewhere,
    ReadsANumber,
    DecidesByValues,
    CountsByValues,
    ThroughNumpy,
    Drawing,
]


def made(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("given", [SIZE, photos()], ids=["shape", "tensor"])
@pytest.mark.parametrize("build", NEED_VALUES)
@torch.no_grad()
def test_they_are_patched_and_counted_like_others(build: Any, given: Any) -> None:
    model, x = made(build), photos()
    dense = model(x)
    with strongest_keys(0.25):
        expected = model(x)
    with sparsiattn.patch(model, "topk", k=0.25, input=given) as patch:
        torch.testing.assert_close(model(x), expected)
        report = patch.report()
    with sparsiattn.patch(made(Plain), "topk", k=0.25, input=SIZE) as plain:
        sites = [(site.name, site.macs, site.macs_dense) for site in report.sites]
        assert sites == [(s.name, s.macs, s.macs_dense) for s in plain.report().sites]
        assert (report.macs, report.macs_dense) == (plain.report().macs, plain.report().macs_dense)
    assert torch.equal(model(x), dense)
    inspection = sparsiattn.inspect(model, given, strategies=["topk"])
    assert inspection.macs == report.macs_dense


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", NEED_VALUES)
def test_the_model_does_not_notice(build: Any, training: bool) -> None:
    model, seen = made(build).train(training), []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    state, given = copy.deepcopy(model.state_dict()), photos()
    image, random = given.clone(), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    with sparsiattn.patch(model, "topk", k=0.25, input=given) as patch:
        patch.report()
    assert not seen
    assert model.calls == 0
    assert torch.equal(given, image)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_fails_with_data_too_is_named_with_the_place() -> None:
    model = made(Plain)
    model.blocks[1].qkv = nn.Linear(40, 144)
    with pytest.raises(ProbeFailed) as caught:
        sparsiattn.patch(model, "topk", input=SIZE)
    message = str(caught.value)
    assert "blocks.1.qkv (Linear)" in message
    assert "F.linear" in message
    assert "this input=" in message
    assert "Pass input=" not in message


class Fussy(Plain):
    pretrained_cfg = {"input_size": (3, 64, 64)}  # noqa: RUF012

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x * scale)


@torch.no_grad()
def test_a_model_that_takes_more_asks_for_input_and_takes_it() -> None:
    model, x = made(Fussy), photos()
    with pytest.raises(ProbeFailed, match="Pass input="):
        sparsiattn.patch(model, "topk")
    call = (x, torch.tensor(2.0))
    with strongest_keys(0.25):
        expected = model(*call)
    with sparsiattn.patch(model, "topk", k=0.25, input=call):
        torch.testing.assert_close(model(*call), expected)


def quantised(model: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


OPTIONS = [
    {"strategy": "topk", "k": 0.25},
    {"strategy": "connectivity", "k": 0.25},
    {"strategy": "token_drop", "keep": 0.5},
    {"strategy": "token_merge", "r": 4},
]
WARNINGS = pytest.mark.filterwarnings(
    "ignore:torch.quantize:UserWarning", "ignore:torch.ao.quantization:DeprecationWarning"
)


def vit() -> Any:
    return timm.create_model("test_vit")


@WARNINGS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_quantised_models(options: Any) -> None:
    model, x = quantised(made(vit)), torch.randn(2, 3, 160, 160)
    dense = model(x)
    with sparsiattn.patch(made(vit), **options) as patch:
        expected = patch.report()
    with sparsiattn.patch(model, **options) as patch:
        assert not torch.equal(model(x), dense)
        report = patch.report()
    assert report.macs_dense == expected.macs_dense
    if "keep" in options or "r" in options:
        # nothing tells that quantised operators treat tokens alike: reductions come after the MLP
        assert expected.macs < report.macs < report.macs_dense
    else:
        assert report.macs == expected.macs
    assert torch.equal(model(x), dense)


@WARNINGS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_report_after_quantising(options: Any) -> None:
    model = made(vit)
    expected = sparsiattn.patch(model, **options).report()
    patch = sparsiattn.patch_of(quantised(model))
    assert patch is not None
    report = patch.report()
    assert (report.macs, report.macs_dense) == (expected.macs, expected.macs_dense)
    assert sparsiattn.inspect(patch.model, strategies=[]).macs == expected.macs_dense


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_models_whose_weights_accelerate_keeps_elsewhere(options: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, model, x = made(vit), made(vit), torch.randn(2, 3, 160, 160)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    dense = model(x)
    with (
        sparsiattn.patch(plain, **options) as expected,
        sparsiattn.patch(model, **options) as patch,
    ):
        assert torch.equal(model(x), plain(x))
        assert patch.report().macs == expected.report().macs
    assert torch.equal(model(x), dense)
    assert all(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def test_a_model_that_needs_values_and_keeps_its_weights_elsewhere() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, x = made(ReadsANumber), photos()
    model = copy.deepcopy(plain)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with sparsiattn.patch(plain, "topk", k=0.25, input=SIZE) as expected:
        output, report = plain(x), expected.report()
    with sparsiattn.patch(model, "topk", k=0.25, input=SIZE) as patch:
        assert torch.equal(model(x), output)
        assert patch.report().macs == report.macs


class Handwritten(TokenAttention):
    """Has a parameter of its own, for which accelerate puts a function in front of its forward."""

    def __init__(self) -> None:
        super().__init__(Handwritten.by_hand)
        self.bias = nn.Parameter(torch.randn(3, 1, 64))

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + self.bias).softmax(-1) @ v


@torch.no_grad()
def test_handwritten_attention_whose_weights_accelerate_keeps_elsewhere() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, x = made(lambda: Blocks(Handwritten(), Handwritten())), photos()
    model = copy.deepcopy(plain)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    dense = model(x)
    with sparsiattn.patch(plain, "topk", k=0.25, input=SIZE):
        expected = plain(x)
    with sparsiattn.patch(model, "topk", k=0.25, input=SIZE):
        assert torch.equal(model(x), expected)
        assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(model(x), dense)
    assert not torch.equal(expected, dense)


def test_both_towers_of_clip() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 64, "patch_size": 8}
    )
    model = transformers.CLIPModel(config).eval()
    with pytest.raises(ProbeFailed, match=r"sparsiattn\.patch\(model\.vision_model, \.\.\.\)"):
        sparsiattn.patch(model, "topk", k=0.25)
    with sparsiattn.patch(model.vision_model, "topk", k=0.25) as patch:
        assert len(patch.sites) == 2
    ids = torch.zeros(1, 7, dtype=torch.long)
    with sparsiattn.patch(
        model, "topk", k=0.25, input={"input_ids": ids, "pixel_values": photos(1)}
    ) as patch:
        assert len(patch.sites) == 4


@pytest.mark.parametrize("name", ["swin_t", "vit_b_16", "maxvit_t"])
def test_classifiers_of_torchvision_take_224(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.get_model(name).eval()
    with sparsiattn.patch(model, "topk", k=0.25) as patch:
        assert patch.input_shape == (1, 3, 224, 224)


def graph_of(library: str, model: nn.Module) -> Any:
    names = {"timm": "models._features_fx", "torchvision": "models.feature_extraction"}
    extract = pytest.importorskip(f"{library}.{names[library]}").create_feature_extractor
    return extract(model, ["norm" if library == "timm" else "encoder.ln"])


def torchvision_vit() -> Any:
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(160, 16, 3, 2, 48, 96)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("library", "build"), [("timm", vit), ("torchvision", torchvision_vit)])
def test_graphs_of_a_patched_model_are_refused_in_words(
    library: str, build: Any, options: Any
) -> None:
    model, says = made(build), r"torch\.fx.*forward hooks"
    with sparsiattn.patch(model, **options), pytest.raises(InvalidOption, match=says):
        graph_of(library, model)
    graph_of(library, model)


def test_a_graph_without_modules_says_what_to_patch() -> None:
    with pytest.raises(NothingToPatch, match="patch the original model"):
        sparsiattn.patch(graph_of("timm", made(vit)), "topk", input=(1, 3, 160, 160))
