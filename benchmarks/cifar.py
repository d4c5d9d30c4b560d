"""A small plain timm ViT trained on CIFAR-10: the real trained weights of the accuracy benchmarks.

Run ``python benchmarks/cifar.py --data DIR --out FILE`` where ``DIR`` holds ``cifar10-train.tar``
and ``cifar10-test.tar`` (JPEGs in one folder a class); without ``--out`` it makes the weights anew
that come along. Hours on two cores; a checkpoint is written after every epoch and picked up again
by the same command.

What makes a ViT learn from 50,000 small images in few epochs: attention that starts as that of
trained models does (mimetic initialisation, Trockman and Kolter, ICML 2023, arXiv 2305.09828) over
sine and cosine positions, the Muon optimiser for the blocks' matrices, and crops of 24 pixels (36
patches of 64) for the first two thirds of the epochs, which halve what they cost.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WEIGHTS = Path(__file__).resolve().parent / "weights" / "cifar-vit.safetensors"
SIDE, CROP, CROPPED = 32, 24, 2 / 3  # pixels; share of the epochs that see crops


def build(**options: object) -> nn.Module:
    """A ViT with 64 patch tokens and a CLS token, depth 6, width 128, four heads."""
    model: nn.Module = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, num_classes=10, **options
    )
    return model


@torch.no_grad()
def begin_like_trained(model: Any, generator: torch.Generator) -> None:
    """Mimetic initialisation (its section 4): products of queries and keys near the identity, of
    values and the projection near minus the identity, both with noise."""
    width = model.embed_dim
    grid = build_sincos2d_pos_embed(model.patch_embed.grid_size, width)
    model.pos_embed[:, 1:] = grid
    for block in model.blocks:
        attention = block.attn
        q, k, v = attention.qkv.weight.view(3, attention.num_heads, attention.head_dim, width)
        for head in range(attention.num_heads):
            left, right = _factors(0.7, 0.7, width, attention.head_dim, generator)
            q[head], k[head] = left, right
        left, right = _factors(0.4, -0.4, width, width, generator)
        v.copy_(left.view_as(v))
        attention.proj.weight.copy_(right.T)


def _factors(
    noise: float, identity: float, width: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``[rank, width]`` twice, whose product is the best one to ``noise Z + identity I``."""
    whole = noise * torch.randn(width, width, generator=generator) / math.sqrt(width)
    u, s, vh = torch.linalg.svd(whole + identity * torch.eye(width))
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).T, vh[:rank] * root[:, None]


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


def augment(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Random flips and, of images padded by 4 pixels, crops ``[N, 3, side, side]``."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, (4, 4, 4, 4))
    start = torch.randint(0, SIDE + 9 - side, (2, len(images)), generator=generator)
    rows = start[0].view(-1, 1, 1) + torch.arange(side).view(1, -1, 1)
    columns = start[1].view(-1, 1, 1) + torch.arange(side).view(1, 1, -1)
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
    """Learning rate factor: up over the first tenth, down to zero along a cosine."""
    if done < 0.1:
        return 0.04 + 0.96 * done / 0.1
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.1) / 0.9)))


@dataclass
class Run:
    """A training run: where it is, and what it needs to go on."""

    model: Any
    optimizers: list[torch.optim.Optimizer]
    epochs: int
    batch: int
    index: int = 0

    @classmethod
    def fresh(cls, epochs: int, batch: int, lr: float) -> Run:
        torch.manual_seed(0)
        model: Any = build(dynamic_img_size=True)
        begin_like_trained(model, torch.Generator().manual_seed(0))
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        muon = torch.optim.Muon(matrices, lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(others, lr, weight_decay=0.0)
        for optimizer in (muon, adam):
            optimizer.param_groups[0]["initial_lr"] = lr
        return cls(model, [muon, adam], epochs, batch)

    @property
    def side(self) -> int:
        return CROP if self.index < round(CROPPED * self.epochs) else SIDE

    def state(self) -> dict[str, Any]:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"model": self.model.state_dict(), "optimizers": states, "epoch": self.index}

    def resume(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.index = saved["epoch"]

    def set_lr(self, done: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * one_cycle(done)

    def epoch(self, images: Tensor, labels: Tensor) -> float:
        """Mean loss of one pass over the data; order and crops follow from the epoch's number."""
        self.model.train()
        generator, losses = torch.Generator().manual_seed(self.index), []
        order = torch.randperm(len(labels), generator=generator)
        steps = len(labels) // self.batch
        for step in range(steps):
            pick = order[step * self.batch : (step + 1) * self.batch]
            self.set_lr((self.index + step / steps) / self.epochs)
            inputs = augment(normalise(images[pick]), self.side, generator)
            loss = F.cross_entropy(self.model(inputs), labels[pick], label_smoothing=0.1)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            losses.append(loss.item())
        self.index += 1
        return sum(losses) / len(losses)


def train(data: Path, out: Path, epochs: int, batch: int, lr: float) -> None:
    train_set, test_set = read(data / "cifar10-train.tar"), read(data / "cifar10-test.tar")
    run, checkpoint = Run.fresh(epochs, batch, lr), out.with_suffix(".checkpoint")
    if checkpoint.exists():
        run.resume(torch.load(checkpoint, weights_only=True))
    while run.index < epochs:
        began = time.time()
        record: dict[str, Any] = {"epoch": run.index + 1, "side": run.side}
        record["loss"] = round(run.epoch(*train_set), 4)
        record |= {"top1": accuracy(run.model, *test_set), "s": round(time.time() - began)}
        print(json.dumps(record), flush=True)
        torch.save(run.state(), checkpoint)
    save_file(run.model.state_dict(), out)


def load(path: Path) -> nn.Module:
    model = build()
    model.load_state_dict(load_file(path))
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    given = parser.parse_args()
    train(given.data, given.out, given.epochs, given.batch, given.lr)
