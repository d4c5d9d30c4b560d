"""A small timm ViT trained on CIFAR-10: the "real trained weights" of the accuracy benchmarks.

Run ``python benchmarks/cifar.py --data DIR --out cifar-vit.safetensors`` where ``DIR`` holds
``cifar10-train.tar`` and ``cifar10-test.tar`` (JPEGs in one folder a class). About an hour on two
cores; a checkpoint is written after every epoch and picked up again by the same command.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def build(**options: object) -> nn.Module:
    """A ViT with 64 patch tokens and a CLS token, depth 6, width 128, four heads."""
    model: nn.Module = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, num_classes=10, **options
    )
    return model


def read(tar: Path) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` as uint8 and class indices ``[N]``, classes in sorted order."""
    images, names = [], []
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.isfile():
                data = archive.extractfile(member)
                assert data is not None
                images.append(np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB")))
                names.append(member.name.split("/")[0])
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random flips and 4-pixel shifts, one per image."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, (4, 4, 4, 4))
    shift = torch.randint(0, 9, (2, len(images)), generator=generator)
    rows = shift[0].view(-1, 1, 1) + torch.arange(32).view(1, -1, 1)
    columns = shift[1].view(-1, 1, 1) + torch.arange(32).view(1, 1, -1)
    return padded[torch.arange(len(images)).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Top-1 in per cent."""
    model.eval()
    hits = sum(
        (model(normalise(x)).argmax(-1) == y).sum().item()
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )
    return float(100 * hits / len(labels))


def one_cycle(done: float) -> float:
    """Learning rate factor: up over the first 30 %, down to zero along a cosine."""
    if done < 0.3:
        return 0.04 + 0.96 * done / 0.3
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.3) / 0.7)))


def epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    data: tuple[Tensor, Tensor],
    generator: torch.Generator,
    batch: int,
) -> float:
    model.train()
    images, labels = data
    order = torch.randperm(len(labels), generator=generator)
    for step in range(len(labels) // batch):
        pick = order[step * batch : (step + 1) * batch]
        logits = model(augment(normalise(images[pick]), generator))
        loss = F.cross_entropy(logits, labels[pick], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return float(loss.detach())


def train(data: Path, out: Path, epochs: int, batch: int) -> None:
    torch.manual_seed(0)
    train_set, test_set = read(data / "cifar10-train.tar"), read(data / "cifar10-test.tar")
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    per_epoch = len(train_set[1]) // batch
    state, start = out.with_suffix(".checkpoint"), 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epoch"]
    for group in optimizer.param_groups:
        group["initial_lr"] = 1e-3
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle(step / (epochs * per_epoch)), start * per_epoch - 1
    )
    for index in range(start, epochs):
        began = time.time()
        generator = torch.Generator().manual_seed(index)
        loss = epoch(model, optimizer, scheduler, train_set, generator, batch)
        top1 = accuracy(model, *test_set)
        record = {"epoch": index + 1, "loss": loss, "top1": top1, "s": time.time() - began}
        print(json.dumps(record), flush=True)
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": index + 1,
            },
            state,
        )
    save_file(model.state_dict(), out)


def load(path: Path) -> nn.Module:
    model = build()
    model.load_state_dict(load_file(path))
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("cifar-vit.safetensors"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    train(arguments.data, arguments.out, arguments.epochs, arguments.batch)
