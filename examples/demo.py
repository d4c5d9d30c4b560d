"""Compare all strategies on real images: train a small ViT, patch it, and measure.

    python examples/demo.py                                  # scikit-learn's scanned digits
    python examples/demo.py --model deit_small_patch16_224 --pretrained --images DIR

Without ``--model`` it trains a timm ViT on 1,797 scanned digits, and measures accuracy. With it, it
measures how often the top-1 of that timm model stays the same on a folder of images. Both write a
picture of the keys that some query patches attend to.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn.attention import AttentionInputs, Site
from sparsiattn.strategies import Planner, finish

BUDGETS = (0.5, 0.25, 0.1)
TOKENS: dict[str, dict[str, Any]] = {
    "token_drop keep=0.7": {"strategy": "token_drop", "keep": 0.7},
    "token_drop keep=0.5": {"strategy": "token_drop", "keep": 0.5},
    "token_drop keep=0.5, fused": {"strategy": "token_drop", "keep": 0.5, "fuse": True},
    "token_drop adaptive": {"strategy": "token_drop", "keep": "adaptive"},
    "token_merge, r = an 18th": {"strategy": "token_merge", "r": lambda site: site.tokens // 18},
    "hybrid k=0.25 keep=0.5": {"strategy": "hybrid", "k": 0.25, "keep": 0.5},
}
console = Console(width=None if sys.stdout.isatty() else 100)


@dataclass(frozen=True)
class Data:
    """Images for training and testing, ``[N, C, H, W]``, and their labels if there are any."""

    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        strategy: Name of the strategy.
        k: Share of keys kept; None if it does not apply.
        score: Accuracy or agreement, in per cent.
        mhsa_macs: MACs of attention with planning; None if they depend on values.
        macs: MACs of the whole model; None if they depend on values.
        rate: Images per second.
        ratio: Images per second divided by those of the dense model, in paired runs.
    """

    strategy: str
    k: float | None
    score: float
    mhsa_macs: int | None
    macs: int | None
    rate: float
    ratio: float


def digits() -> Data:
    """scikit-learn's 1,797 scanned 8 x 8 digits: 1,347 to train on, 450 to test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fit, test = order[:1347], order[1347:]
    return Data(images[fit], images[test], labels[fit], labels[test])


def photos(folder: Path, model: nn.Module) -> Data:
    """The images of a folder, preprocessed for the model; the first quarter is for fitting."""
    from PIL import Image

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    kinds = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in kinds)
    if len(paths) < 4:
        raise SystemExit(f"{folder} must contain at least 4 images, got {len(paths)}")
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    count = max(1, len(images) // 4)
    return Data(images[:count], images[count:])


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


def small_vit() -> nn.Module:
    """A timm ViT with a token per pixel, a 3 x 3 stem, and fixed positions (few images)."""
    width = 64
    model: Any = timm.models.VisionTransformer(
        img_size=8, patch_size=1, in_chans=1, num_classes=10, embed_dim=width, depth=4, num_heads=4
    )
    model.patch_embed.proj = nn.Conv2d(1, width, 3, padding=1)
    sines = timm.layers.build_sincos2d_pos_embed([8, 8], dim=width, temperature=10.0)
    model.pos_embed.data[:, 1:] = sines
    network: nn.Module = model
    return network


def train(data: Data, epochs: int = 20, batch: int = 32) -> nn.Module:
    """The small ViT, trained from scratch on shifted and slightly noisy digits."""
    model = small_vit()
    assert data.train_labels is not None
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    total = epochs * (len(data.train) // batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
    with progress() as bar:
        task = bar.add_task("training on digits", total=total, note="")
        for _ in range(epochs):
            for images, labels in batches(data.train, data.train_labels, batch):
                loss = F.cross_entropy(model(shifted(images)), labels, label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                bar.update(task, advance=1, note=f"loss {loss.item():.3f}")
    return model.eval()


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images))
    for start in range(0, len(order) - size + 1, size):
        pick = order[start : start + size]
        yield images[pick], labels[pick]


def shifted(images: Tensor) -> Tensor:
    """Shift a batch by up to one pixel in each direction, and add a little noise."""
    rows, columns = torch.randint(-1, 2, (2,)).tolist()
    moved = F.pad(images, (1, 1, 1, 1), value=-1.0)
    moved = moved[..., 1 + rows : 9 + rows, 1 + columns : 9 + columns]
    return moved + 0.1 * torch.randn_like(moved)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(64)]).argmax(-1)


def score(model: nn.Module, data: Data, dense: Tensor) -> float:
    """Accuracy in per cent, or agreement with the dense model if there are no labels."""
    expected = dense if data.test_labels is None else data.test_labels
    return 100 * (predict(model, data.test) == expected).float().mean().item()


@torch.inference_mode()
def speed(patch: sparsiattn.Patch, images: Tensor, rounds: int) -> tuple[float, float]:
    """Images per second patched, and the median ratio to dense over paired runs."""
    model, rates, ratios = patch.model, [], []
    for round_ in range(rounds + 1):
        sparse = timed(model, images)
        with patch.disabled():
            dense = timed(model, images)
        if round_:  # the first pair warms up
            rates.append(len(images) / sparse)
            ratios.append(dense / sparse)
    return median(rates), median(ratios)


def timed(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def measure(patch: sparsiattn.Patch, data: Data, dense: Tensor, name: str, rounds: int) -> Row:
    report = patch.report()
    rate, ratio = speed(patch, data.test[:64], rounds)
    k = None if patch.tokens is not None else getattr(patch.strategy, "k", None)
    mhsa = None if report.mhsa_macs is None else report.mhsa_macs + report.predictor_macs
    return Row(name, k, score(patch.model, data, dense), mhsa, report.macs, rate, ratio)


def compare(model: nn.Module, data: Data, fit_steps: int, rounds: int) -> Iterator[Row]:
    """Yield the row of the dense model, and those of every strategy at every budget.

    Strategies with learned planners have a second row with fitted predictors.
    """
    dense = predict(model, data.test)
    with sparsiattn.patch(model, "dense", input=data.test[:1]) as patch:
        yield measure(patch, data, dense, "dense", rounds)
    for name in attention_strategies():
        for k in BUDGETS:
            with sparsiattn.patch(model, name, k=k, input=data.test[:1]) as patch:
                yield measure(patch, data, dense, name, rounds)
                learns = patch.has_learned_planners
            if learns:
                options: dict[str, Any] = {"scores": "predictor", "input": data.test[:1]}
                with sparsiattn.patch(model, name, k=k, **options) as patch:
                    fit(patch, data, fit_steps)
                    yield measure(patch, data, dense, f"{name}, predictor fitted", rounds)


def attention_strategies() -> list[str]:
    """Names of the built-in attention strategies; published methods are compared in the docs."""
    strategies = sparsiattn.list_strategies().items()
    core = [(name, info) for name, info in strategies if info.plugin != "sparsiattn.methods"]
    return [name for name, info in core if info.kind == "attention" and name != "dense"]


def compare_tokens(model: nn.Module, data: Data, rounds: int) -> Iterator[Row]:
    """Yield the rows of the token strategies."""
    dense = predict(model, data.test)
    for name, schedule in TOKENS.items():
        with sparsiattn.patch(model, input=data.test[:1], **schedule) as patch:
            yield measure(patch, data, dense, name, rounds)


def fit(patch: sparsiattn.Patch, data: Data, steps: int) -> None:
    """Calibrate briefly: the predictor learns the model's own attention, without labels."""
    size = min(64, len(data.train))
    draws = (data.train[torch.randperm(len(data.train))[:size]] for _ in range(steps))
    sparsiattn.calibrate(patch.model, draws, steps=steps, lr=3e-3)


def show(rows: list[Row], labelled: bool) -> None:
    table = Table(title="paired with the dense model in the same run", title_justify="left")
    first = "accuracy %" if labelled else "agreement %"
    for name in ("strategy", "k", first, "MHSA MACs", "model MACs", "images/s", "x dense"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.strategy, "" if row.k is None else f"{row.k}", f"{row.score:.1f}",
            millions(row.mhsa_macs, 2), millions(row.macs, 1), f"{row.rate:.0f}",
            f"{row.ratio:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "MHSA MACs count QK^T, AV and the selection of keys; they are not known in advance where\n"
        "images keep different numbers of tokens. With few tokens and one key list per query,\n"
        "sparse attention saves few MACs and no time. It needs many tokens and shared key lists:"
    )


def millions(macs: int | None, digits: int) -> str:
    return "by image" if macs is None else f"{macs / 1e6:.{digits}f} M"


def high_resolution(rounds: int) -> None:
    """Measure a model with 4,097 tokens and random weights; 8 x 8 queries share a key list."""
    model = timm.models.VisionTransformer(
        img_size=512, patch_size=8, embed_dim=192, depth=4, num_heads=3, num_classes=10
    ).eval()
    image = torch.randn(1, 3, 512, 512)
    for k in BUDGETS[1:]:
        with sparsiattn.patch(model, "connectivity", k=k) as patch:
            _, ratio = speed(patch, image, rounds)
            report = patch.report()
        assert report.macs is not None
        console.print(
            f"  ViT of 4,097 tokens, connectivity k={k}: {ratio:.2f}x the images/s of dense, "
            f"{report.macs_dense / 1e9:.1f} -> {report.macs / 1e9:.1f} G MACs"
        )


def draw(model: nn.Module, image: Tensor, path: Path) -> None:
    """Draw the keys that a few query patches keep, at the middle site, averaged over heads."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = ("topk", "connectivity", "local", "random")
    picture = image.permute(1, 2, 0)
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    kept = {name: keys_kept(model, image, name) for name in names}
    grid = next(iter(kept.values()))[1]
    queries = [(grid[0] // 3, grid[1] // 3), (grid[0] // 2, grid[1] // 2),
               (2 * grid[0] // 3, 3 * grid[1] // 4)]  # fmt: skip
    figure, axes = plt.subplots(
        len(queries), len(names), figsize=(2.6 * len(names), 2.7 * len(queries)), squeeze=False
    )
    for line, (row, column) in zip(axes, queries, strict=True):
        for axis, name in zip(line, names, strict=True):
            share = kept[name][0][row * grid[1] + column].view(grid)
            overlay(axis, picture, share, (row, column))
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=13)
    figure.suptitle(
        "Keys that the query in the blue square keeps at k = 0.1; deeper orange means that more "
        "heads keep the key",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def overlay(axis: object, picture: Tensor, share: Tensor, query: tuple[int, int]) -> None:
    """Draw the image in grey with the kept keys on top and the query marked."""
    from matplotlib.patches import Rectangle

    height, width = picture.shape[:2]
    cell = height / share.shape[0], width / share.shape[1]
    box = (0, width, height, 0)
    axis.imshow(picture.mean(-1), cmap="gray", extent=box)  # type: ignore[attr-defined]
    colour = torch.tensor([1.0, 0.45, 0.0]).expand(*share.shape, 3)
    veil = torch.cat([colour, (share > 0).float()[..., None] * (0.3 + 0.6 * share[..., None])], -1)
    axis.imshow(veil.numpy(), extent=box, interpolation="nearest")  # type: ignore[attr-defined]
    corner = (query[1] * cell[1], query[0] * cell[0])
    mark = Rectangle(corner, cell[1], cell[0], fill=False, edgecolor="deepskyblue", linewidth=2.5)
    axis.add_patch(mark)  # type: ignore[attr-defined]
    axis.set_axis_off()  # type: ignore[attr-defined]


def keys_kept(model: nn.Module, image: Tensor, name: str) -> tuple[Tensor, tuple[int, int]]:
    """Share of heads that keep each patch key, ``[n, n]``, and the patch grid."""
    shares: list[tuple[Tensor, tuple[int, int]]] = []

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        pattern = finish(planner(inputs), inputs)
        mask = pattern.to_mask()[..., inputs.prefix :, inputs.prefix :]
        shares.append((mask.float().mean((0, 1)), inputs.query_grid))

    # an unfitted connectivity keeps the same keys as topk, so use its predictor explicitly
    rule: dict[str, Any] = {"scores": "predictor"} if name == "connectivity" else {}
    with sparsiattn.patch(model, name, k=0.1, input=image[None], tile=1, **rule) as patch:
        global_sites = [s for s in patch.sites if s.windows == 1 and s.raster] or patch.sites
        middle = global_sites[len(global_sites) // 2].name
        with patch.observing(observe), torch.no_grad():
            model(image[None])
        names = [site.name for site in patch.sites]
    return shares[names.index(middle)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="a timm name; without it, a ViT is trained on digits")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights (network)")
    parser.add_argument("--images", type=Path, help="folder of images, needed with --model")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--rounds", type=int, default=8, help="paired timings per row")
    options = parser.parse_args()
    # every row is timed, and the model for digits is too small to become faster
    warnings.simplefilter("ignore", sparsiattn.SlowerThanDense)
    torch.manual_seed(0)
    if options.model is None:
        data = digits()
        model = train(data)
        steps = 60
    else:
        if options.images is None:
            parser.error("--model needs --images DIR")
        model = timm.create_model(options.model, pretrained=options.pretrained).eval()
        data, steps = photos(options.images, model), 4
        if not options.pretrained:
            console.print("random weights (no --pretrained): agreement says nothing about accuracy")
    rows: list[Row] = []
    with progress() as bar:
        total = 1 + len(BUDGETS) * len(attention_strategies()) + len(TOKENS)
        task = bar.add_task("measuring", total=total, note="")
        sources = (
            compare(model, data, steps, options.rounds), compare_tokens(model, data, options.rounds)
        )  # fmt: skip
        for row in chain(*sources):
            rows.append(row)
            bar.update(task, advance=float("fitted" not in row.strategy), note=row.strategy)
    show(rows, data.test_labels is not None)
    high_resolution(options.rounds)
    picture = options.out / "keys.png"
    draw(model, data.test[0], picture)
    console.print(f"picture of the keys: {picture}")


if __name__ == "__main__":
    main()
