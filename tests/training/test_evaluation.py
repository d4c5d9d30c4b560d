"""`evaluate`: counts by an oracle, both sides in one pass, state, processes, faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from conftest import SHARED
from sparsiattn import evaluate
from sparsiattn.errors import DataError, InvalidOption
from sparsiattn.testing import tiny_vit
from sparsiattn.training import Evaluation
from sparsiattn.training import processes as launched
from sparsiattn.training.two_sides import Tally
from tests.support.pictures import folder


def varied(**options: Any) -> nn.Module:
    """A model whose answers differ from image to image, and sparse ones from dense ones."""
    model = tiny_vit(global_pool="avg", **options)
    generator = torch.Generator().manual_seed(4)  # numbers of its own, whatever timm's version
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # or one class wins for all images
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def batches(*sizes: int, classes: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Noise on a colour of its own for every image."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=generator)
            + 2 * torch.randn(size, 3, 1, 1, generator=generator),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def rank_of(logits: Tensor, label: int) -> int:
    """How many classes score higher than the label's."""
    return sum(1 for score in logits.tolist() if score > logits[label].item())


def oracle(model: nn.Module, data: Any) -> list[list[int]]:
    """Rank of every label, image by image, and the first choice."""
    found = []
    with torch.no_grad():
        for images, labels in data:
            for image, label in zip(images, labels.tolist(), strict=True):
                logits = model(image[None])[0]
                best = max(range(len(logits)), key=logits.tolist().__getitem__)
                found.append([rank_of(logits, label), best])
    return found


def share(hits: list[bool]) -> float:
    return 100 * sum(hits) / len(hits)


def test_counts_are_those_of_an_oracle() -> None:
    model = varied(num_classes=11)
    data = batches(7, 7, 3, classes=11)
    dense = oracle(model, data)
    with sparsiattn.patch(model, "local", k=1, background=None) as live:
        patched = oracle(model, data)
        found = evaluate(model, data)
        assert live.active
    assert found.images == 17
    assert found.dense_top1 == pytest.approx(share([rank == 0 for rank, _ in dense]))
    assert found.dense_top5 == pytest.approx(share([rank < 5 for rank, _ in dense]))
    assert found.top1 == pytest.approx(share([rank == 0 for rank, _ in patched]))
    assert found.top5 == pytest.approx(share([rank < 5 for rank, _ in patched]))
    same = [one[1] == other[1] for one, other in zip(dense, patched, strict=True)]
    assert found.agreement == pytest.approx(share(same))
    assert 0 < share(same) < 100  # so that the figures above tell the two apart
    assert found.images_per_second is not None
    assert found.images_per_second > 0
    assert found.dense_images_per_second > 0


def test_an_unpatched_model_gives_dense_figures_alone() -> None:
    model, data = tiny_vit(num_classes=4), batches(6, classes=4)
    found = evaluate(model, data)
    assert found.dense_top1 == pytest.approx(share([r == 0 for r, _ in oracle(model, data)]))
    nothing = (found.top1, found.top5, found.agreement, found.images_per_second, found.dense_top5)
    assert nothing == (None,) * 5  # four classes have no top five
    assert "patched" not in str(found)
    assert evaluate(tiny_vit(), batches(2)).dense_top5 == 100.0


def test_both_sides_take_turns_and_one_pass_is_enough() -> None:
    model, seen, passes = tiny_vit(), [], []
    live = sparsiattn.patch(model, "topk", k=0.5)
    model.register_forward_pre_hook(lambda *_: seen.append(live.disabled_here))

    def once() -> Any:
        passes.append(1)
        yield from batches(2, 2, 2)

    evaluate(model, once())
    assert seen == [True, False, False, True, True, False]
    assert passes == [1]


def test_speed_is_the_median_of_whole_batches_without_the_first() -> None:
    tally = Tally(times={"dense": [(4, 9.0), (4, 2.0), (4, 1.0), (4, 4.0), (1, 0.001)]})
    assert tally.speed("dense") == 2.0
    assert Tally(times={"dense": [(4, 2.0)]}).speed("dense") == 2.0
    assert Tally().speed("dense") == 0.0


def test_ratios_are_of_pairs_of_whole_batches_without_the_first() -> None:
    dense = [(4, 9.0), (4, 2.0), (4, 3.0), (1, 50.0)]
    patched = [(4, 1.0), (4, 1.0), (4, 2.0), (1, 1.0)]
    assert Tally(times={"dense": dense, "patched": patched}).ratios() == [2.0, 1.5]
    assert Tally(times={"dense": dense[:1], "patched": patched[:1]}).ratios() == [9.0]
    assert Tally(times={"dense": dense}).ratios() == []


def test_speed_is_one_of_pairs_with_quartiles() -> None:
    model = tiny_vit()
    sparsiattn.patch(model, "topk", k=0.5)
    found = evaluate(model, batches(4, 4, 4, 4, 1))
    assert found.speedup_batches == 3
    assert found.speedup is not None
    assert found.speedup_quartiles is not None
    assert found.speedup_quartiles[0] <= found.speedup <= found.speedup_quartiles[1]
    assert f"{found.speedup:.2f}x of dense" in str(found)
    assert "3 paired batches, without the first" in str(found)
    dense = evaluate(tiny_vit(), batches(4))
    assert (dense.speedup, dense.speedup_quartiles, dense.speedup_batches) == (None, None, 0)


def cosines(model: nn.Module, live: Any, data: Any) -> list[float]:
    """By image: mean over positions of the cosine of dense and patched features."""
    found = []
    with torch.no_grad():
        for images, _ in data:
            with live.disabled():
                dense = model.forward_features(images)  # type: ignore[operator]
            patched = model.forward_features(images)  # type: ignore[operator]
            dots = torch.einsum("bnd,bnd->bn", dense, patched)
            found += (dots / dense.norm(dim=-1) / patched.norm(dim=-1)).mean(1).tolist()
    return found


@pytest.mark.parametrize("named", [None, "features"])
def test_headless_models_give_features_and_need_no_labels(named: Any) -> None:
    model = varied(num_classes=0)
    data = batches(7, 7, 3)
    live = sparsiattn.patch(model, "local", k=1, background=None)
    expected = sorted(cosines(model, live, data))
    found = evaluate(model, [images for images, _ in data], metric=named)
    assert (found.images, found.metric, found.metric_guessed) == (17, "features", named is None)
    assert found.similarity_mean == pytest.approx(sum(expected) / 17, rel=1e-4)
    assert found.similarity_median == pytest.approx(expected[8], rel=1e-4)
    # 5 % of 16 gaps between 17 values: 0.8 of the way from the lowest to the next
    assert found.similarity_p5 == pytest.approx(0.2 * expected[0] + 0.8 * expected[1], rel=1e-4)
    nothing = (found.top1, found.dense_top1, found.dense_top5, found.agreement)
    assert nothing == (None,) * 4
    assert "cosine of features: mean" in str(found)
    assert ("metric= sets another" in str(found)) is (named is None)
    assert "top-1" not in str(found)


def test_models_that_show_features_only_when_they_run() -> None:
    """No attribute says so here; labels are there, and are not counted."""
    inner = varied(num_classes=0)
    model = nn.Sequential(inner)
    sparsiattn.patch(model, "local", k=1, background=None, input=(1, 3, 32, 32))
    found = evaluate(model, batches(4, 4))
    assert (found.metric, found.metric_guessed, found.dense_top1) == ("features", True, None)


def test_classes_and_functions_look_at_no_label() -> None:
    model = varied()
    data = batches(5, 3)
    sparsiattn.patch(model, "local", k=1, background=None)
    by_labels = evaluate(model, data)
    unlabelled = [(images, None) for images, _ in data]
    classes = evaluate(model, unlabelled, metric="classes")
    assert classes.agreement == by_labels.agreement
    assert classes.similarity_mean == pytest.approx(by_labels.agreement / 100)  # type: ignore[operator]
    assert (classes.top1, classes.metric, classes.metric_guessed) == (None, "classes", False)
    assert "first choices kept: mean" in str(classes)
    calls = []

    def distance(dense: Tensor, patched: Tensor) -> Tensor:
        calls.append(len(dense))
        return (dense - patched).abs().amax(1)

    found = evaluate(model, unlabelled, metric=distance)
    assert calls == [5, 3]
    assert found.metric == "callable"
    assert found.similarity_mean is not None
    assert found.similarity_mean > 0
    # a number counts for every image of its batch
    numbers = iter([1.0, 5.0])
    counted = evaluate(model, unlabelled, metric=lambda dense, patched: next(numbers))
    assert counted.similarity_mean == pytest.approx((5 * 1.0 + 3 * 5.0) / 8)
    with pytest.raises(DataError, match="got 2 values for 5 images"):
        evaluate(model, unlabelled, metric=lambda dense, patched: torch.zeros(2))


def test_metrics_need_a_patch_and_a_head() -> None:
    with pytest.raises(InvalidOption, match="is not patched"):
        evaluate(tiny_vit(), batches(2), metric="features")
    with pytest.raises(InvalidOption, match="is not patched"):
        evaluate(tiny_vit(num_classes=0), batches(2))
    model = tiny_vit(num_classes=0)
    sparsiattn.patch(model, "topk", k=0.5)
    with pytest.raises(InvalidOption, match="needs a head"):
        evaluate(model, batches(2), metric="classes")
    with pytest.raises(InvalidOption, match="metric must be 'features' or 'classes'"):
        evaluate(model, batches(2), metric="top1")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"every batch must be images \[B, C, H, W\], or a tuple"):
        evaluate(model, [torch.zeros(2, 3)])


def test_it_says_how_images_were_read(tmp_path: Path) -> None:
    model = tiny_vit()
    found = evaluate(
        model, folder(tmp_path / "x"), augment={"mean": [0.4], "interpolation": "bilinear"}
    )
    how = found.preprocessing
    assert how is not None
    assert (how.size, how.interpolation, how.crop_pct) == ((32, 32), "bilinear", 1.0)
    assert how.mean == (0.4,) * 3
    assert found.images_from == "files"
    says = "32 x 32 pixels, bilinear, crop 1 (center), mean (0.4, 0.4, 0.4), std (0.229"
    assert f"read     {says}" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["preprocessing"]["size"] == [32, 32]
    ready = evaluate(model, batches(2))
    assert (ready.preprocessing, ready.images_from) == (None, "batches")
    assert "read     batches, used unchanged" in str(ready)
    tensors = torch.utils.data.TensorDataset(*batches(2)[0])
    given = evaluate(model, tensors)
    assert given.images_from == "dataset"
    assert "read     tensors as the dataset gives them, else 32 x 32" in str(given)


def test_it_reads_as_text_and_as_json() -> None:
    found = Evaluation(200, 12.5, 60.0, 13.0, 61.0, 99.5, 1234.56, 2000.0)
    assert json.loads(json.dumps(found.to_dict()))["agreement"] == 99.5
    for word in ("200 images", "12.50 %", "61.00 %", "99.50 % agree", "1234.6 images/s"):
        assert word in str(found)


def test_modes_device_and_patch_are_as_before_also_after_an_error() -> None:
    model = tiny_vit().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    live = sparsiattn.patch(model, "topk", k=0.5)
    modes_patched = [module.training for module in model.modules()]
    seen: list[bool] = []
    hook = model.register_forward_pre_hook(lambda module, _: seen.append(module.training))

    def breaks() -> Any:
        yield batches(2)[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(model, breaks(), device="cpu")
    assert [module.training for module in model.modules()] == modes_patched
    assert seen == [False, False]
    assert live.active
    assert not live.disabled_here
    hook.remove()
    evaluate(model, batches(2))
    live.unpatch()
    assert [module.training for module in model.modules()] == modes


class Answers(nn.Module):
    """Gives what it is told, in some wrapping."""

    def __init__(self, wrap: Any, logits: Tensor) -> None:
        super().__init__()
        self.wrap, self.weight = wrap, nn.Parameter(logits)

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.weight[: len(x)])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t, lambda t: (t, "more"), lambda t: {"logits": t},
        lambda t: SimpleNamespace(logits=t),
    ],
)  # fmt: skip
def test_logits_come_in_several_ways(wrap: Any) -> None:
    model = Answers(wrap, torch.eye(6))
    found = evaluate(model, [(torch.zeros(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 0, 0]))])
    assert found.dense_top1 == 50.0


def test_what_is_not_a_number_is_never_right() -> None:
    model = Answers(lambda t: t, torch.full((2, 6), float("nan")))
    found = evaluate(model, [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))])
    assert (found.dense_top1, found.dense_top5) == (0.0, 0.0)


def test_transformers_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=4, hidden_size=48, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=48, num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    data = batches(4)
    with torch.no_grad():
        right = (model(data[0][0]).logits.argmax(1) == data[0][1]).float().mean()
    with sparsiattn.patch(model, "topk", k=0.25):
        assert evaluate(model, data).dense_top1 == pytest.approx(100 * float(right))


def test_faults_say_what_is_needed() -> None:
    model, images = tiny_vit(), torch.zeros(2, 3, 32, 32)
    for labels, says in (
        (torch.tensor([0, 5]), "label 5, but the model's head has 5 classes"),
        (torch.tensor([0, -1]), "label -1, but class indices start at 0"),
        (torch.tensor([0.0, 1.0]), "must be class indices .int64., got torch.float32"),
        (torch.zeros(2, 5), r"labels must be class indices \[2\], got \(2, 5\)"),
    ):
        with pytest.raises(DataError, match=says):
            evaluate(model, [(images, labels)])
    with pytest.raises(DataError, match="has no batches"):
        evaluate(model, [])
    with pytest.raises(DataError, match=r"needs a classifier .* returned \(2, 3, 4\)"):
        evaluate(Answers(lambda t: t, torch.zeros(2, 3, 4)), [(images, torch.tensor([0, 1]))])
    sampler: Any = torch.utils.data.DistributedSampler(batches(1), num_replicas=2, rank=0)
    prepared = torch.utils.data.DataLoader(batches(1), sampler=sampler)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="divides the data among processes itself"):
        evaluate(model, prepared)


def test_progress_and_limit(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    found = evaluate(
        tiny_vit(), folder(tmp_path / "x"), batch_size=4, limit=10,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert found.images == 10
    assert seen == [(4, 10), (8, 10), (10, 10)]


class _Alone(launched.World):
    """One process of several that hears of no other: it gathers its own values only."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("kind", ["folder", "batches"])
def test_shares_add_up_to_every_image_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data: Any = folder(tmp_path / "x", each=5) if kind == "folder" else batches(4, 4, 4, 1)
    model = varied()
    sparsiattn.patch(model, "local", k=1, background=None)
    whole = evaluate(model, data, batch_size=4)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(launched, "world", lambda device=None, rank=rank: _Alone(rank, 2))
        parts.append(evaluate(model, data, batch_size=4))
    assert sum(part.images for part in parts) == whole.images
    assert all(part.images for part in parts)
    for name in ("top1", "dense_top1", "agreement"):
        hits = [getattr(part, name) * part.images / 100 for part in parts]
        assert sum(hits) == pytest.approx(getattr(whole, name) * whole.images / 100)


class _Heard(launched.World):
    """One process of two, where the other has told what it counted before."""

    told: list[Any] = []  # noqa: RUF012

    def gather(self, value: Any) -> list[Any]:
        self.told.append(value)
        return list(self.told)


def test_processes_put_features_and_ratios_together(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [images for images, _ in batches(4, 4, 4, 4, 1)]
    model = varied(num_classes=0)
    sparsiattn.patch(model, "local", k=1, background=None)
    whole = evaluate(model, data)
    monkeypatch.setattr(_Heard, "told", [])
    for rank in range(2):
        monkeypatch.setattr(launched, "world", lambda device=None, rank=rank: _Heard(rank, 2))
        both = evaluate(model, data)
    assert both.images == whole.images
    for name in ("similarity_mean", "similarity_median", "similarity_p5"):
        assert getattr(both, name) == pytest.approx(getattr(whole, name))
    assert both.speedup_batches == 2  # each process has two whole batches, of which one counts


def test_launched_without_accelerate_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InvalidOption, match=r"pip install 'sparsiattn\[train\]'"):
        evaluate(tiny_vit(), batches(1))


SCRIPT = """
import json, sys, torch, sparsiattn
from sparsiattn.testing.hosts import tiny_vit
model = tiny_vit(global_pool="avg")
sparsiattn.patch(model, "local", k=1, background=None)
found = sparsiattn.evaluate(model, sys.argv[1], batch_size=4, device="cpu")
text = json.dumps(found.to_dict())
open(sys.argv[2] + str(torch.distributed.get_rank()), "w").write(text)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_count_as_one_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    data = folder(tmp_path / "x", each=5)  # 25 images: neither 2 processes nor batches of 4 divide
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(script), str(data), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    model = tiny_vit(global_pool="avg")
    sparsiattn.patch(model, "local", k=1, background=None)
    alone = evaluate(model, data, batch_size=4).to_dict()
    for rank in range(2):
        found = json.loads((tmp_path / f"found{rank}").read_text())
        for name in ("images", "top1", "top5", "dense_top1", "dense_top5", "agreement"):
            assert found[name] == pytest.approx(alone[name])


def test_cifar() -> None:
    source = SHARED / "data" / "cifar10-test.tar"
    if not source.is_file():
        pytest.skip("the CIFAR-10 images are not here")
    model = tiny_vit(num_classes=10)
    sparsiattn.patch(model, "connectivity", k=0.25)
    found = evaluate(model, source, limit=64)
    assert found.images == 64
    assert found.agreement is not None
    assert 0 <= found.agreement <= 100
