"""Reading images: every kind of source, sizes, classes, faults, and what an epoch depends on."""

from __future__ import annotations

import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.utils.data import Subset, TensorDataset

import sparsiattn
from conftest import SHARED
from sparsiattn.errors import DataError
from sparsiattn.testing import tiny_images, tiny_vit
from sparsiattn.training import Batches, data_config, loader
from sparsiattn.training.preprocess import seeded
from tests.support.pictures import (
    Flow,
    Pictures,
    everything,
    folder,
    labels_of,
    picture,
    pixels,
    tar,
)

PLAIN = {"mean": [0.0], "std": [1.0]}


@pytest.fixture(autouse=True)
def _own_numbers() -> Any:
    """Python's and numpy's random numbers are those of the tests before, so put them back."""
    before = random.getstate(), np.random.get_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])


@pytest.mark.parametrize("kind", ["folder", "split folder", "tar", "split tar", "dataset"])
def test_every_kind_of_source_gives_the_same_pixels(kind: str, tmp_path: Path) -> None:
    split = "val" if "split" in kind else ""
    if "tar" in kind:
        source: Any = tar(tmp_path / "images.tar", splits=(split,) if split else ("",))
    elif "folder" in kind:
        source = folder(tmp_path / "images" / split)
        source = source.parent if split else source
    else:
        source = [(picture(100 * c + i), c) for c in range(5) for i in range(3)]
        source = Subset(source, range(15))  # type: ignore[arg-type]
    batches = loader(source, tiny_vit(), batch_size=4, augment=PLAIN)
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 3]
    assert len(batches) == 4
    images, labels = everything(batches)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    expected = torch.stack([pixels(picture(100 * c + i)) for c in range(5) for i in range(3)])
    # not cropped and not resized, though timm's default keeps 87.5 % of the side
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == [c for c in range(5) for _ in range(3)]


@pytest.mark.parametrize(("split", "first"), [("train", 0), ("training", 0), ("test", 1000)])
def test_splits_in_a_tar(split: str, first: int, tmp_path: Path) -> None:
    source = tar(tmp_path / "all.tar", splits=("train", "test"), each=1)
    images, labels = everything(loader(source, tiny_vit(), split=split, augment=PLAIN))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(images[0], pixels(picture(first)))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_split_that_is_not_there_is_never_replaced_by_all_of_them(
    kind: str, tmp_path: Path
) -> None:
    source = tmp_path / "all.tar"
    if kind == "tar":
        tar(source, splits=("train", "test"), each=1)
    else:
        folder(source / "train", each=1)
        folder(source / "test", each=1)
    with pytest.raises(DataError, match=r"no split 'validation', only test, train: pass split='te"):
        loader(source, tiny_vit())


@pytest.mark.parametrize("give", [np.asarray, lambda i: (255 * pixels(i)).byte()])
def test_a_dataset_may_give_arrays_and_tensors(give: Any) -> None:
    images, _ = everything(loader(Pictures(give=give), tiny_vit(), augment=PLAIN))
    torch.testing.assert_close(images[3], pixels(picture(3)))


def test_finished_tensors_and_ready_batches_are_used_as_they_are() -> None:
    images, labels = tiny_images(4), torch.tensor([0, 1, 2, 3])
    found, same = everything(loader(TensorDataset(images, labels), tiny_vit(), batch_size=3))
    assert torch.equal(found, images)
    assert torch.equal(same, labels)
    ready = [(images, labels), (images[:3], labels[:3])]
    batches = loader(ready, tiny_vit(), limit=5)
    assert isinstance(batches, Batches)
    assert [len(x) for x, _ in batches] == [4, 1]
    assert len(loader(ready, tiny_vit())) == 2


def test_streams_give_their_first_images() -> None:
    batches = loader(Flow(), tiny_vit(), batch_size=2, limit=5, augment=PLAIN)
    images, labels = everything(batches)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(images[4], pixels(picture(4)))


def test_a_limit_keeps_all_classes(tmp_path: Path) -> None:
    assert labels_of(loader(folder(tmp_path / "x"), tiny_vit(), limit=5)) == [0, 1, 2, 3, 4]


def test_shares_together_are_the_whole_and_of_one_length() -> None:
    parts = [loader(Pictures(7), tiny_vit(), share=(rank, 3)) for rank in range(3)]
    assert [part.image_count for part in parts] == [3, 2, 2]  # type: ignore[union-attr]
    assert [len(labels_of(part)) for part in parts] == [3, 3, 3]
    own = [labels_of(part)[: part.image_count] for part in parts]  # type: ignore[union-attr]
    assert own == [[0, 3, 1], [1, 4], [2, 0]]
    flows = [labels_of(loader(Flow(), tiny_vit(), share=(rank, 2))) for rank in range(2)]
    assert flows == [[0, 2, 4, 1], [1, 3, 0]]


def training(workers: int = 0, seed: int = 0, **augment: Any) -> Any:
    options = {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5, "mixup_alpha": 0.8}
    return loader(
        Pictures(12), tiny_vit(), batch_size=4, training=True, seed=seed, workers=workers,
        augment={**options, "cutmix_alpha": 1.0, **augment},
    )  # fmt: skip


def test_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    batches = training()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    batches.set_epoch(3)
    first = everything(batches)
    # nothing was drawn from anybody else's numbers
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # type: ignore[index]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    again = training()
    again.set_epoch(0)
    other = everything(again)
    again.set_epoch(3)
    resumed = everything(again)
    assert torch.equal(first[0], resumed[0])
    assert torch.equal(first[1], resumed[1])
    assert not torch.equal(first[0], other[0])
    seeded = training(seed=1)
    seeded.set_epoch(3)
    assert not torch.equal(first[0], everything(seeded)[0])
    assert first[1].shape == (12, 5)  # mixed labels are shares of classes
    torch.testing.assert_close(first[1].sum(1), torch.ones(12))


def test_worker_processes_change_nothing() -> None:
    alone, helped = training(), training(workers=2)
    for batches in (alone, helped):
        batches.set_epoch(2)
    for one, other in zip(everything(alone), everything(helped), strict=True):
        assert torch.equal(one, other)


def test_random_numbers_go_on_as_if_nothing_was_drawn() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with seeded(1, 2):
        inside = torch.rand(1)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    with seeded(1, 2):
        assert torch.equal(inside, torch.rand(1))


def test_small_images_are_shifted_in_training_not_cut_up() -> None:
    plain = {**PLAIN, "hflip": 0.0, "color_jitter": None}
    batches = loader(Pictures(4), tiny_vit(), batch_size=4, training=True, augment=plain)
    images, labels = everything(batches)
    for image, label in zip(images, labels.tolist(), strict=True):
        padded = torch.nn.functional.pad(pixels(picture(label)), (4, 4, 4, 4))
        windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).flatten(1, 2)  # [3, 81, 32, 32]
        assert (windows - image[:, None]).abs().amax((0, 2, 3)).min() < 1e-6
    cropped = loader(
        Pictures(4), tiny_vit(), batch_size=4, training=True, augment={**plain, "scale": [0.3, 0.5]}
    )
    assert not torch.equal(everything(cropped)[0], images)


def test_the_data_config_is_the_models_own() -> None:
    config = data_config(timm.create_model("test_vit"))
    assert config["input_size"] == (3, 160, 160)
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert config["crop_pct"] == 0.95
    # built for another size than its card says: small images stay whole
    resized = data_config(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
    assert resized["input_size"] == (3, 32, 32)
    assert resized["crop_pct"] == 1.0
    assert data_config(tiny_vit(), options={"crop_pct": 0.9})["crop_pct"] == 0.9
    assert data_config(tiny_vit(), (48, 64))["input_size"] == (3, 48, 64)
    grey = data_config(tiny_vit(in_chans=1), options={"mean": [0.2, 0.4, 0.6]})
    assert grey["mean"] == pytest.approx((0.4,))
    images, _ = next(iter(loader(Pictures(2), tiny_vit(in_chans=1))))
    assert images.shape == (2, 1, 32, 32)


def test_models_of_transformers_and_torchvision_get_their_size() -> None:
    vision = pytest.importorskip("torchvision.models")
    model = vision.VisionTransformer(64, 16, 1, 2, 32, 64, num_classes=5)
    config = data_config(model)
    assert config["input_size"] == (3, 64, 64)
    assert config["mean"] == (0.485, 0.456, 0.406)
    transformers = pytest.importorskip("transformers")
    small = transformers.ViTConfig(
        image_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=4,
    )  # fmt: skip
    host = transformers.ViTForImageClassification(small)
    assert data_config(host)["input_size"] == (3, 48, 48)
    with pytest.raises(DataError, match="label 4, but the model's head has 4 classes"):
        everything(loader(Pictures(), host))


def test_torchvision_by_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "images" / "val", each=1)
    found = loader(f"torch/image_folder@{root.parent}", tiny_vit(), augment=PLAIN)
    images, labels = everything(found)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(images[2], pixels(picture(200)))


# webdataset leaves the shards that it opened to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    import io
    import json

    for shard in range(2):
        with tarfile.open(tmp_path / f"val-{shard:04}.tar", "w") as archive:
            for index in range(3):
                number, image = 3 * shard + index, io.BytesIO()
                picture(number).save(image, "PNG")
                for end, data in (("png", image.getvalue()), ("cls", str(number % 5).encode())):
                    info = tarfile.TarInfo(f"{number:03}.{end}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    names = ["val-0000.tar", "val-0001.tar"]
    told = {"name": "validation", "filenames": names, "shard_lengths": [3, 3], "num_samples": 6}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"validation": told}}))
    images, labels = everything(loader(f"wds/{tmp_path}", tiny_vit(), augment=PLAIN))
    assert labels.tolist() == [0, 1, 2, 3, 4, 0]
    torch.testing.assert_close(images[5], pixels(picture(5)))
    parts = [labels_of(loader(f"wds/{tmp_path}", tiny_vit(), share=(r, 2))) for r in range(2)]
    assert parts == [[0, 2, 4], [1, 3, 0]]


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """The library, whose settings of a whole process are forgotten afterwards."""
    found = pytest.importorskip("accelerate")
    yield found
    for state in (found.state.AcceleratorState, found.state.GradientState):
        state._reset_state()
    found.state.PartialState._reset_state()


def test_accelerate_prepares_it_and_epochs_stay_the_same(accelerate: Any) -> None:
    own = training()
    prepared = accelerate.Accelerator(cpu=True).prepare(training())
    for batches in (own, prepared):
        batches.set_epoch(4)
    for one, other in zip(everything(own), everything(prepared), strict=True):
        assert torch.equal(one, other)


def test_accelerate_deals_out_whole_epochs(accelerate: Any) -> None:
    data_loader = accelerate.data_loader
    accelerate.PartialState(cpu=True)

    def dealt(rank: int) -> torch.Tensor:
        plain = loader(
            Pictures(12), tiny_vit(), batch_size=3, training=True, augment={"color_jitter": None}
        )
        one = data_loader.prepare_data_loader(plain, num_processes=2, process_index=rank)
        one.set_epoch(2)
        return everything(one)[0]

    whole = loader(
        Pictures(12), tiny_vit(), batch_size=3, training=True, augment={"color_jitter": None}
    )
    whole.set_epoch(2)
    expected = everything(whole)[0].unflatten(0, (4, 3))
    for rank in range(2):  # every second batch
        assert torch.equal(dealt(rank), expected[rank::2].flatten(0, 1))


def test_nothing_heavy_is_imported_with_the_package() -> None:
    code = (
        "import sparsiattn, sparsiattn.training.evaluation, sparsiattn.training.data, sys;"
        "print({'timm', 'torchvision', 'accelerate', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_cifar() -> None:
    source = SHARED / "data" / "cifar10-test.tar"
    if not source.is_file():
        pytest.skip("the CIFAR-10 images are not here")
    batches = loader(source, tiny_vit(num_classes=10), limit=64, batch_size=32)
    images, labels = everything(batches)
    assert images.shape == (64, 3, 32, 32)
    assert set(labels.tolist()) == set(range(10))
    assert sparsiattn.DataError is DataError
