"""Fitting planners to dense attention."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsiattn
from sparsiattn.errors import CalibrationDiscarded
from sparsiattn.strategies import Connectivity, predictor
from sparsiattn.testing import tiny_images, tiny_vit
from tests.support import zoo


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("tile", [1, (2, 2)])
def test_it_lowers_the_loss_and_leaves_the_host_alone(tile: object) -> None:
    model = tiny_vit()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    seen: list[int] = []
    with sparsiattn.patch(model, k=0.2, scores="predictor", tile=tile) as live:
        for runtime in live.runtimes:  # a start as bad as can be, so that there is much to learn
            runtime.planner.up.data.uniform_(0, 1)  # type: ignore[attr-defined]
        losses = sparsiattn.calibrate(
            model, batches(40), steps=30, lr=1e-2, on_step=lambda step, loss: seen.append(step)
        )
        assert live.has_learned_planners
        assert not any(p.requires_grad for p in live.runtimes[0].planner.parameters())  # type: ignore[attr-defined]
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
        assert all(p.grad is None for p in model.parameters())
    assert len(losses) == 30
    assert seen == list(range(30))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_channel_maps_learn_too() -> None:
    with sparsiattn.patch(tiny_vit(), k=0.2, channels=4) as live:
        planner = live.runtimes[0].planner
        first = planner.project_q.weight.clone()  # type: ignore[attr-defined]
        sparsiattn.calibrate(live.model, batches(2))
        assert not torch.equal(first, planner.project_q.weight)  # type: ignore[attr-defined]


def test_training_mode_is_given_back() -> None:
    with sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor") as live:
        live.model.train()
        sparsiattn.calibrate(live.model, batches(1))
        assert live.model.training


@pytest.mark.parametrize("strategy", [None, "topk"])
def test_nothing_to_fit_is_an_error(strategy: str | None) -> None:
    model = zoo.build("vit")
    if strategy:
        sparsiattn.patch(model, strategy)
    with pytest.raises(sparsiattn.InvalidOption, match="with learned planners"):
        sparsiattn.calibrate(model, [tiny_images()])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen = max(self.seen, tensor.numel())
        return out


def at_site(tile: Any, block: Any) -> tuple[Any, sparsiattn.AttentionInputs]:
    """A planner of 16 x 16 patches and a CLS token, and operands for it."""
    site = sparsiattn.Site(
        name="site", index=0, depth=1, tokens=257, keys=257, heads=2, head_dim=8, value_dim=8,
        grid=(16, 16), key_grid=(16, 16), prefix_tokens=1,
    )  # fmt: skip
    planner = Connectivity(k=0.1, tile=tile, block=block).planner(site)
    q, k, v = torch.randn(3, 3, 2, 257, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    return planner, sparsiattn.AttentionInputs(q, k, v, 0.4, None, site, tile=tile, block=block)


@pytest.mark.parametrize(
    ("tile", "block"), [(1, 1), ((4, 4), 1), ((4, 4), (2, 2)), ((3, 5), (4, 3))]
)
@pytest.mark.parametrize("most", [1, 50_000, 1 << 24])
def test_the_target_is_exact_attention_averaged(
    tile: Any, block: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "MAX_ELEMENTS", most)
    _, inputs = at_site(tile, block)
    exact = (inputs.q @ inputs.k.mT * inputs.scale).softmax(-1)[..., 1:, :]
    rows = cells(tile)
    expected = torch.stack([exact[..., row, :].mean(-2) for row in rows], dim=-2)
    if block != 1:
        expected = torch.stack([expected[..., 1:][..., c].mean(-1) for c in cells(block)], dim=-1)
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(predictor.exact_rows(inputs), expected)


def cells(size: Any) -> list[list[int]]:
    """Patches of every tile of a 16 x 16 grid, row by row; sides that do not divide it are cut as
    evenly as they can be."""
    if size == 1:
        return [[i] for i in range(256)]
    counts = [math.ceil(16 / side) for side in size]
    rows, columns = ([[i for i in range(16) if i * n // 16 == p] for p in range(n)] for n in counts)
    return [[16 * y + x for y in ys for x in xs] for ys in rows for xs in columns]


def test_fitting_tiles_makes_no_tensor_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "MAX_ELEMENTS", 1)
    planner, inputs = at_site((8, 8), (4, 4))
    for weight in planner.parameters():
        weight.requires_grad_(True)
    with Largest() as largest:
        planner.loss(inputs).backward()
    pairs = 3 * 2 * 257 * 257
    assert largest.seen <= pairs // 4  # one tile of queries against all keys
    assert planner.up.grad is not None
    assert planner.up.grad.any()


def planners(live: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in live.model.state_dict().items() if ".sparsiattn." in n}


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("killed_at", "options"),
    [
        (5, {}),
        (4, {"channels": 4}),
        (6, {"tile": (2, 2)}),
        *(pytest.param(at, {}, marks=pytest.mark.slow) for at in (4, 6)),
        *(pytest.param(at, {"channels": 4}, marks=pytest.mark.slow) for at in (5, 6)),
        *(pytest.param(at, {"tile": (2, 2)}, marks=pytest.mark.slow) for at in (4, 5)),
    ],
)
def test_it_goes_on_exactly_where_it_was_killed(
    killed_at: int, options: dict[str, Any], tmp_path: Any
) -> None:
    data = batches(3)

    def run(out: Any, stop: int | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
        def on_step(step: int, loss: float) -> None:
            if step + 1 == stop:
                raise Killed

        with sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor", **options) as live:
            losses = sparsiattn.calibrate(
                live.model, data, steps=8, out=out, checkpoint_steps=2, on_step=on_step
            )
            return losses, planners(live)

    whole = run(None)
    with pytest.raises(Killed):
        run(tmp_path, stop=killed_at)
    losses, weights = run(tmp_path)
    assert losses == whole[0]
    assert len(losses) == 8
    for name, wanted in whole[1].items():
        assert torch.equal(weights[name], wanted), name
    again = run(tmp_path)  # finished: nothing is left to do, and nothing changes
    assert again[0] == losses


@pytest.mark.parametrize(
    ("options", "arguments", "where"),
    [({"k": 0.3}, {}, "strategy"), ({}, {"lr": 0.5}, "calibration"), ({}, {"steps": 9}, "steps")],
)
def test_another_calibrations_checkpoint_is_refused(
    options: dict[str, Any], arguments: dict[str, Any], where: str, tmp_path: Any
) -> None:
    with sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor") as live:
        sparsiattn.calibrate(live.model, batches(2), steps=2, out=tmp_path)
    with sparsiattn.patch(tiny_vit(), **{"k": 0.2, "scores": "predictor", **options}) as live:
        before = planners(live)
        with pytest.raises(sparsiattn.MismatchedCheckpoint, match=where):
            sparsiattn.calibrate(live.model, batches(2), **{"steps": 2, **arguments}, out=tmp_path)
        assert all(torch.equal(before[name], t) for name, t in planners(live).items())


@pytest.mark.parametrize("channels", [2, 4, 12])
def test_channel_maps_start_at_the_best_of_their_rank(channels: int) -> None:
    """No map of the same rank has products nearer to q k^T, in the mean over all queries and all
    centred basis keys: here against the truncated SVD of all pairs' products at once."""
    site = sparsiattn.Site(
        name="site", index=0, depth=1, tokens=64, keys=64, heads=2, head_dim=8, value_dim=8,
        grid=(8, 8), key_grid=(8, 8), prefix_tokens=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 3, 2, 64, 8, generator=generator).unbind(0)
    q = q * torch.linspace(0.1, 3, 8)
    planner: Any = Connectivity(k=0.1, channels=channels).planner(site)
    inputs = sparsiattn.AttentionInputs(q, k, v, 0.4, None, site)
    planner.init_from_batch(inputs)
    keys = planner.down.mT @ k
    keys = keys - keys.mean(-2, keepdim=True)
    with torch.no_grad():
        products = planner.project_q(q).flatten(0, -2) @ planner.project_k(keys).flatten(0, -2).mT
    whole = q.flatten(0, -2) @ keys.flatten(0, -2).mT
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    best = u[:, :channels] * s[:channels] @ vh[:channels]
    torch.testing.assert_close(products, best, rtol=1e-3, atol=1e-3)


def test_the_closed_form_start_is_taken_only_where_it_helps() -> None:
    with sparsiattn.patch(tiny_vit(), k=0.2, channels=4) as live:
        first = planners(live)
        sparsiattn.calibrate(live.model, batches(1), closed_form=False, lr=1e-9)
        for name, value in planners(live).items():
            torch.testing.assert_close(value, first[name])
    with sparsiattn.patch(tiny_vit(), k=0.2, channels=4) as live:
        plain = sparsiattn.calibrate(live.model, batches(1), closed_form=False)
    with sparsiattn.patch(tiny_vit(), k=0.2, channels=4) as live:
        closed = sparsiattn.calibrate(live.model, batches(1))
    assert closed[0] <= plain[0]


def test_images_are_gone_through_again() -> None:
    with sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor") as live:
        assert len(sparsiattn.calibrate(live.model, batches(2), steps=5)) == 5
        assert len(sparsiattn.calibrate(live.model, iter(batches(2)), steps=5)) == 2
        assert len(sparsiattn.calibrate(live.model, batches(2))) == 2


def test_the_order_of_a_dataset_depends_on_the_seed_alone() -> None:
    """Labels do not matter: this dataset has none, and one more class than the head."""
    data = torch.utils.data.TensorDataset(torch.cat(batches(4)))

    def run(seed: int) -> list[float]:
        with sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor") as live:
            return sparsiattn.calibrate(live.model, data, steps=6, batch_size=4, seed=seed)

    first = run(0)
    torch.rand(3)
    assert run(0) == first
    assert run(1) != first


def test_folders_need_no_labels(tmp_path: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    for i in range(4):
        image.new("RGB", (40, 36), (60 * i, 10, 200 - 50 * i)).save(tmp_path / f"{i}.png")
    with sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor") as live:
        losses = sparsiattn.calibrate(live.model, tmp_path, steps=3, batch_size=2)
    assert len(losses) == 3
    with (
        sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor") as live,
        pytest.raises(sparsiattn.DataError),
    ):
        sparsiattn.calibrate(live.model, tmp_path / "nowhere", steps=3)


def test_bad_numbers_stop_it_before_a_step() -> None:
    with sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor") as live:
        sparsiattn.calibrate(live.model, batches(1))
        before = planners(live)
        bad = batches(1)[0]
        bad[0, 0, 0, 0] = math.nan
        with pytest.raises(sparsiattn.TrainingDiverged, match="step 0"):
            sparsiattn.calibrate(live.model, [bad])
        assert all(torch.equal(before[name], t) for name, t in planners(live).items())


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"lr": 0.0}, {"checkpoint_steps": 0}])
def test_wrong_numbers_are_errors(arguments: dict[str, Any]) -> None:
    with (
        sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor") as live,
        pytest.raises(sparsiattn.InvalidOption, match=next(iter(arguments))),
    ):
        sparsiattn.calibrate(live.model, batches(1), **arguments)


def test_a_bar_is_shown_on_stderr_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with sparsiattn.patch(tiny_vit(), k=0.2, scores="predictor") as live:
        sparsiattn.calibrate(live.model, batches(1), steps=2)
        assert capsys.readouterr() == ("", "")
        sparsiattn.calibrate(live.model, batches(1), steps=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


def lost(live: Any, images: torch.Tensor) -> float:
    """Mean over sites of the error of attention's output with the keys that are kept, relative to
    dense attention, in plain torch."""
    shares: list[float] = []

    def compare(site: Any, planner: Any, inputs: sparsiattn.AttentionInputs) -> None:
        logits = inputs.q @ inputs.k.mT * inputs.scale
        runtime = next(r for r in live.runtimes if r.site is site)
        kept = runtime.finish(planner(inputs), inputs).to_mask()
        dense = logits.softmax(-1) @ inputs.v
        sparse = logits.masked_fill(~kept, -math.inf).softmax(-1) @ inputs.v
        shares.append(float((sparse - dense).norm() / dense.norm()))

    with torch.no_grad(), live.observing(compare):
        live.model(images)
    return sum(shares) / len(shares)


def sharp_vit() -> Any:
    """A model whose queries see a few keys each."""
    model: Any = tiny_vit()
    for block in model.blocks:
        block.attn.qkv.weight.data[: 2 * 48] *= 8**0.5
    return model


def test_a_fit_that_loses_more_than_exact_ranking_is_discarded() -> None:
    data = batches(3)
    options: dict[str, Any] = {"k": 0.2, "background": None}
    with sparsiattn.patch(sharp_vit(), **options, scores="predictor") as live:
        sparsiattn.calibrate(live.model, data, steps=8)
        by_predictor = lost(live, data[1])  # batch 8 is the second again
    with sparsiattn.patch(sharp_vit(), **options) as live:
        first, by_logits = planners(live), lost(live, data[1])
        with pytest.warns(CalibrationDiscarded, match="at 2 of 2 sites") as caught:
            sparsiattn.calibrate(live.model, data, steps=8)
        assert all(torch.equal(first[name], t) for name, t in planners(live).items())
        assert lost(live, data[1]) == by_logits
    said = [float(text) / 100 for text in re.findall(r"([\d.]+)%", str(caught[0].message))]
    assert said == pytest.approx([by_predictor, by_logits], abs=5e-4)
    assert by_predictor > by_logits


def test_a_fit_that_loses_less_is_kept() -> None:
    """Where attention is nearly flat, the largest logits tell little of what is lost."""
    data = batches(3)
    with sparsiattn.patch(tiny_vit(), k=0.2, background=None) as live:
        before = lost(live, data[1])
        sparsiattn.calibrate(live.model, data, steps=8)
        assert lost(live, data[1]) < before


def test_a_discarded_fit_stays_discarded_when_it_goes_on(tmp_path: Any) -> None:
    for stop in (5, 8, None, None):  # on the way, after the last checkpoint, at the end, finished

        def on_step(step: int, loss: float, stop: int | None = stop) -> None:
            if step + 1 == stop:
                raise Killed

        with sparsiattn.patch(sharp_vit(), k=0.2) as live:
            first = planners(live)
            with pytest.raises(Killed) if stop else pytest.warns(CalibrationDiscarded):
                sparsiattn.calibrate(
                    live.model, batches(3), steps=8, out=tmp_path, checkpoint_steps=2,
                    on_step=on_step,
                )  # fmt: skip
            kept = all(torch.equal(first[name], t) for name, t in planners(live).items())
            assert kept is (stop is None)


@dataclass(frozen=True)
class Signed(sparsiattn.Strategy):
    """Fitted, it keeps the keys of largest logits at the first site and of smallest at others."""

    name = "signed"
    k: float = 0.2

    def planner(self, site: sparsiattn.Site) -> Any:
        return SignedPlanner(1.0 if site.index == 0 else -1.0, self.k)


class SignedPlanner(sparsiattn.LearnedPlanner):
    def __init__(self, sign: float, k: float) -> None:
        super().__init__()
        self.sign, self.k = sign, k
        self.gain = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, inputs: sparsiattn.AttentionInputs) -> sparsiattn.Pattern:
        return sparsiattn.Pattern.top(self.sign * inputs.logits(), self.k)

    def unfitted_plan(self, inputs: sparsiattn.AttentionInputs) -> sparsiattn.Pattern:
        return sparsiattn.Pattern.top(-self.sign * inputs.logits(), self.k)

    def loss(self, inputs: sparsiattn.AttentionInputs) -> torch.Tensor:
        return self.gain.square().sum()


def test_every_site_decides_for_itself() -> None:
    with sparsiattn.patch(tiny_vit(), Signed()) as live:
        with pytest.warns(CalibrationDiscarded, match="at 1 of 2 sites"):
            sparsiattn.calibrate(live.model, batches(1), steps=2)
        gains = [runtime.planner.gain.item() for runtime in live.runtimes]  # type: ignore[attr-defined]
    assert gains[0] < 1.0
    assert gains[1] == 1.0


def test_where_every_key_is_kept_there_is_nothing_to_compare() -> None:
    with sparsiattn.patch(tiny_vit(), k=1.0) as live:
        first = planners(live)
        sparsiattn.calibrate(live.model, batches(1), steps=2)
        assert not any(torch.equal(first[name], t) for name, t in planners(live).items())
