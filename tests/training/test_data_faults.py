"""Data that cannot be read or does not fit the model: one clear error each."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from sparsiattn.errors import DataError, InvalidOption, UnknownName
from sparsiattn.testing import tiny_images, tiny_vit
from sparsiattn.training import loader
from tests.support.pictures import Pictures, everything, folder, picture


def test_other_classes_than_the_heads_are_refused(tmp_path: Path) -> None:
    model = tiny_vit(num_classes=7)
    with pytest.raises(DataError, match=r"has 5 classes, the model's head 7: .*num_classes=5\)"):
        loader(folder(tmp_path / "x", each=1), model)
    with pytest.raises(DataError, match="image 3 has label 3, but the model's head has 3 "):
        everything(loader(Pictures(), tiny_vit(num_classes=3)))
    with pytest.raises(DataError, match="has label -1, but class indices start at 0"):
        everything(loader(TensorDataset(tiny_images(1), torch.tensor([-1])), model))
    with pytest.raises(DataError, match=r"has no head \(num_classes=0\)"):
        loader(Pictures(), tiny_vit(num_classes=0))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_corrupt_image_is_named(kind: str, workers: int, tmp_path: Path) -> None:
    place = folder(tmp_path / "images", each=2)
    broken = place / "c1" / "0.png"
    broken.write_bytes(broken.read_bytes()[:300])
    source = place
    if kind == "tar":
        source = tmp_path / "images.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(place, arcname=".")
    with pytest.raises(DataError, match=r"c1/0\.png cannot be read as an image") as caught:
        everything(loader(source, tiny_vit(), workers=workers))
    assert len(str(caught.value).splitlines()) == 1


def test_empty_and_unreadable_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.tar").write_bytes(b"no tar at all, " * 100)
    (tmp_path / "images.zip").touch()
    with tarfile.open(tmp_path / "void.tar", "w"):
        pass
    for name, says in (
        ("empty", "no images can be read from .*Found 0 images"),
        ("no.tar", "no images can be read from .*no.tar"),
        ("void.tar", "no images can be read from .*void.tar"),
        ("images.zip", "must be a folder or a .tar"),
        ("missing", "no such folder or file"),
    ):
        with pytest.raises(DataError, match=says):
            loader(tmp_path / name, tiny_vit())
    with pytest.raises(DataError, match="has no images"):
        loader(Pictures(0), tiny_vit())
    with pytest.raises(DataError, match="got int"):
        loader(3, tiny_vit())
    with pytest.raises(DataError, match=r"from 'torch/nothing@.*Unknown torchvision dataset"):
        loader(f"torch/nothing@{tmp_path}", tiny_vit())
    with pytest.raises(DataError, match="6 images do not fill one batch of batch_size=64"):
        loader(Pictures(), tiny_vit(), training=True)


def test_wrong_batches_and_items_are_described() -> None:
    with pytest.raises(DataError, match=r"got a tensor of shape \(3, 3, 32, 32\)"):
        everything(loader([tiny_images()], tiny_vit()))
    with pytest.raises(DataError, match=r"got \(str, int\)"):
        everything(loader([("x", 1)], tiny_vit()))
    with pytest.raises(DataError, match=r"image 0: the image must be .* tensor .*, got str"):
        everything(loader(Pictures(give=lambda _: "x"), tiny_vit()))
    with pytest.raises(DataError, match="the label must be a class index, got 'cat'"):
        everything(loader(Subset([(picture(0), "cat")], [0]), tiny_vit()))  # type: ignore[arg-type]


def test_wrong_options() -> None:
    data = Pictures()
    with pytest.raises(UnknownName, match=r"unknown augment option 'mixup'\. Did you mean"):
        loader(data, tiny_vit(), augment={"mixup": 0.8})
    with pytest.raises(InvalidOption, match="label_smoothing in augment belongs to mixup"):
        loader(data, tiny_vit(), batch_size=2, training=True, augment={"label_smoothing": 0.1})
    with pytest.raises(InvalidOption, match="batch_size must be even, got 3"):
        loader(data, tiny_vit(), batch_size=3, training=True, augment={"mixup_alpha": 1.0})
    with pytest.raises(InvalidOption, match="create_transform does not accept"):
        loader(data, tiny_vit(), batch_size=2, training=True, augment={"color_jitter": [1, 2]})
    with pytest.raises(InvalidOption, match="mean must have one value or 3"):
        loader(data, tiny_vit(), augment={"mean": [1.0, 2.0]})
    for wrong in ({"batch_size": 0}, {"workers": -1}, {"limit": 0}, {"seed": -1}):
        with pytest.raises(InvalidOption, match=next(iter(wrong))):
            loader(data, tiny_vit(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="share must be"):
        loader(data, tiny_vit(), share=(2, 2))
    with pytest.raises(InvalidOption, match="image_size must be"):
        loader(data, tiny_vit(), image_size=(32, 32, 3))  # type: ignore[arg-type]
