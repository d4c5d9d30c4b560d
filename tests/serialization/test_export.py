"""Exported programs answer as the model does, for every strategy with static budgets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import ExportFailed, InvalidOption
from sparsiattn.kernels import gather_ops
from sparsiattn.serialization import exporters
from sparsiattn.serialization.exporters import formats
from sparsiattn.strategies import TokenMerge
from tests.support import zoo

# name of the case -> arguments of `patch` and of `export`
BUILT_IN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({"strategy": "dense"}, {}),
    "topk": ({"strategy": "topk", "k": 0.25}, {}),
    "random": ({"strategy": "random", "k": 0.25}, {}),
    "local": ({"strategy": "local", "k": 0.25}, {}),
    "connectivity": ({"strategy": "connectivity", "k": 0.25}, {}),
    "token_drop": ({"strategy": "token_drop", "keep": 0.6, "layers": [0]}, {}),
    "token_merge": ({"strategy": "token_merge", "r": 6}, {}),
    "hybrid": (
        {"strategy": "hybrid", "k": 0.25, "keep": 0.6, "layers": [0], "only_if_faster": False}, {}
    ),
}  # fmt: skip
VARIANTS = {
    **BUILT_IN,
    "tiles, gather": (
        {"strategy": "connectivity", "k": 0.25, "tile": (4, 4)}, {"kernel": "gather"}
    ),
    "one by one, gather": ({"strategy": "topk", "k": 9}, {"kernel": "gather"}),
    "reference": ({"strategy": "topk", "k": 9}, {"kernel": "reference"}),
    "fuse": ({"strategy": "token_drop", "keep": 0.5, "fuse": True, "layers": [0, 1]}, {}),
    "learned": ({"strategy": "token_drop", "score": "learned", "keep": 0.6, "layers": [0]}, {}),
    "drawn": ({"strategy": "token_drop", "score": "random", "keep": 0.6, "layers": [0]}, {}),
    "pitome": ({"strategy": "token_merge", "method": "pitome", "ratio": 0.8}, {}),
    "hybrid_merge": (
        {
            "strategy": "hybrid", "k": 0.4, "attention": "topk", "tokens": TokenMerge(r=12),
            "only_if_faster": False,
        }, {},
    ),
}  # fmt: skip
QUICK = ["connectivity", "token_drop"]


def made(case: str, format: str, folder: Path) -> tuple[sparsiattn.ExportResult, nn.Module]:
    model = zoo.build("vit")
    options, given = VARIANTS[case]
    sparsiattn.patch(model, **options)
    path = folder / f"vit{formats.FORMATS[format].suffix}"
    return sparsiattn.export(model, images(2), path, format, **given), model


def images(batch: int, seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_no_strategy_is_forgotten() -> None:
    assert set(BUILT_IN) >= set(zoo.CORE)  # the suites of `sparsiattn.methods` export those


@pytest.mark.parametrize("case", zoo.slow_but(QUICK, *[c for c in VARIANTS if c not in QUICK]))
def test_pt2(case: str, tmp_path: Path) -> None:
    found, model = made(case, "pt2", tmp_path)
    assert found.max_difference <= 1e-4
    assert found.dynamic_batch
    program = torch.export.load(found.path).module()
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = images(batch, seed=batch)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", zoo.slow_but(["local"], *[c for c in VARIANTS if c != "local"]))
def test_onnx(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found, model = made(case, "onnx", tmp_path)
    assert found.max_difference <= 1e-4
    run = formats.FORMATS["onnx"].read(found.path)
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = images(batch, seed=batch)
            torch.testing.assert_close(run(x)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["connectivity", "token_merge", "hybrid"])
def test_aoti(case: str, tmp_path: Path) -> None:
    found, model = made(case, "aoti", tmp_path)
    assert found.max_difference <= 1e-4
    run = formats.FORMATS["aoti"].read(found.path)
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = images(batch, seed=batch)
            torch.testing.assert_close(run(x)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_program_needs_nothing_of_this_library(tmp_path: Path) -> None:
    found, model = made("local", "pt2", tmp_path)
    torch.save(images(3), tmp_path / "x.pt")
    code = (
        "import sys, torch; x = torch.load(sys.argv[2])\n"
        "y = torch.export.load(sys.argv[1]).module()(x)\n"
        "torch.save(y, sys.argv[3]); assert 'sparsiattn' not in sys.modules\n"
    )
    files = [str(found.path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code, *files], check=True, env=clean, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(files[2]), model(images(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_tables_are_computed_once() -> None:
    """The keys of `local` depend on no image: nothing is left that ranks them."""
    model = zoo.build("vit")
    sparsiattn.patch(model, "local", k=0.25)
    twin = exporters.program.exportable_copy(model, None)
    program = exporters.program.traced(twin, images(2), dynamic=True)
    assert "topk" not in str(program.graph)


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = zoo.build("vit").train()
    live = sparsiattn.patch(model, "topk", k=9)
    kernels, state = [r.kernels for r in live.runtimes], list(model.state_dict())
    sparsiattn.export(model, images(2), tmp_path / "a.pt2")
    assert [r.kernels for r in live.runtimes] == kernels
    assert not any(runtime.explicit for runtime in live.runtimes)
    assert list(model.state_dict()) == state
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert sparsiattn.patch_of(model) is live


def test_unpatched_and_of_one_batch(tmp_path: Path) -> None:
    found = sparsiattn.export(zoo.build("vit"), images(1), tmp_path / "a.pt2", dynamic_batch=False)
    assert (found.strategy, found.kernels, found.batches) == (None, {}, (1,))
    program = torch.export.load(found.path).module()
    assert program(images(1)).shape == (1, 5)


class TestRefusals:
    def refused(self, folder: Path, says: str, kind: Any = InvalidOption, **given: Any) -> None:
        path = folder / given.pop("name", "a.pt2")
        options = given.pop("patch", {"strategy": "topk", "k": 9})
        model = zoo.build("vit")
        sparsiattn.patch(model, **options)
        with pytest.raises(kind, match=says):
            sparsiattn.export(model, given.pop("input", images(2)), path, **given)
        assert not list(folder.iterdir())

    def test_counts_that_depend_on_values(self, tmp_path: Path) -> None:
        adaptive = {"strategy": "token_drop", "keep": "adaptive", "layers": [0]}
        self.refused(tmp_path, "a different number of tokens for every image", patch=adaptive)

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"format": "tflite"}, "onnx, pt2, aoti"),
            ({"format": "onnx"}, "must end in '.onnx'"),
            ({"kernel": "flex"}, "cannot be exported"),
            ({"tolerance": 0.0}, "tolerance"),
            ({"input": images(0)}, "must be floating-point images"),
        ],
        ids=str,
    )
    def test_options(self, tmp_path: Path, given: dict[str, Any], says: str) -> None:
        self.refused(tmp_path, says, **given)

    def test_not_a_tensor(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "tensor of images", sparsiattn.InvalidType, input=[1, 2])

    @pytest.mark.slow
    def test_another_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        form = formats.FORMATS["pt2"]

        def wrong(path: Path) -> formats.Run:
            run = form.read(path)
            return lambda x: [out + 1e-3 for out in run(x)]

        monkeypatch.setitem(formats.FORMATS, "pt2", form._replace(read=wrong))
        self.refused(tmp_path, "differs from the model by 1.0e-03", ExportFailed)

    def test_what_torch_cannot_trace(self, tmp_path: Path) -> None:
        class Chooses(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * 2 if x.sum() > 0 else x

        with pytest.raises(ExportFailed, match="cannot trace this Chooses"):
            sparsiattn.export(Chooses(), images(2), tmp_path / "a.pt2")

    def test_packages_that_are_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(formats, "find_spec", lambda name: None)
        self.refused(tmp_path, r"sparsiattn\[export\]", format="onnx", name="a.onnx")


class TestLean:
    """Programs of many tokens hold no more nodes than those of few."""

    def program(self, pixels: int) -> Any:
        vit = timm.create_model(
            "test_vit", img_size=pixels, patch_size=4, depth=1, global_pool="avg"
        ).eval()
        sparsiattn.patch(vit, "connectivity", k=0.25, tile=(4, 4), kernel="gather")
        twin, x = exporters.program.exportable_copy(vit, None), torch.randn(2, 3, pixels, pixels)
        exporters.program.kernels_used(exporters.state_of(twin), x, twin)
        return exporters.program.traced(twin, x, dynamic=True)

    def test_nodes_do_not_grow_with_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gather_ops, "CACHED", 1 << 12)  # eager runs in many chunks
        few, many = (self.program(pixels).graph.nodes for pixels in (32, 96))
        assert len(few) == len(many) < 200
        assert not {"argsort", "cumsum"} & {
            str(node.target).split(".")[1] for node in many if str(node.target).startswith("aten.")
        }  # index tables


@pytest.mark.slow
def test_batches_in_openvino(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    found, model = made("tiles, gather", "onnx", tmp_path)
    hints = {"INFERENCE_PRECISION_HINT": "f32"}  # else it takes bfloat16 where the processor can
    program = openvino.Core().compile_model(str(found.path), "CPU", hints)
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = images(batch, seed=batch)
            out = torch.from_numpy(program(x.numpy())[0])
            torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-4)


def test_equal_calls_are_one_and_constants_folded() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.arange(4.0) + torch.arange(4.0)
            return x.exp() * table + x.exp() + torch.rand_like(x) - torch.rand_like(x)

    module = torch.export.export(Twice(), (torch.zeros(2, 4),)).module(check_guards=False)
    exporters.program.fold(module)
    names = [str(node.target) for node in module.graph.nodes]
    assert names.count("aten.exp.default") == 1
    assert names.count("aten.rand_like.default") == 2  # each draws numbers of its own
    assert "aten.arange.default" not in names
