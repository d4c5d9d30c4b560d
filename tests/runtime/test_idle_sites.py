"""Sites at which the host's own attention runs whatever comes: hooks leave them alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn.patching.dry_run import dry_run
from sparsiattn.runtime import site_hooks
from sparsiattn.runtime.patch_state import set_dense
from sparsiattn.testing import tiny_images, tiny_vit


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Keys of the scopes that were opened."""
    keys: list[int] = []

    def push(route: site_hooks.Route | None, key: int) -> None:
        keys.append(key)
        plain(route, key)

    plain = site_hooks.push
    monkeypatch.setattr(site_hooks, "push", push)
    return keys


def left_dense(model: nn.Module) -> sparsiattn.Patch:
    """A patch that leaves every site dense, since nothing pays on so few tokens."""
    patch = sparsiattn.patch(model, "topk", k=0.25, only_if_faster=True)
    assert all(runtime.dense for runtime in patch.runtimes)
    return patch


def dense(model: nn.Module) -> sparsiattn.Patch:
    return sparsiattn.patch(model, "dense")


@pytest.mark.parametrize("patched", [left_dense, dense])
@torch.no_grad()
def test_nothing_is_opened_and_outputs_are_the_hosts(patched: object, opened: list[int]) -> None:
    model, images = tiny_vit(), tiny_images(2)
    expected = model(images)
    patch = patched(model)  # type: ignore[operator]
    assert torch.equal(model(images), expected)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    assert not opened
    patch.unpatch()
    assert torch.equal(model(images), expected)


def hooks_of_sites(patch: sparsiattn.Patch) -> int:
    modules = [patch.model.get_submodule(site.name) for site in patch.sites]
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)


@pytest.mark.parametrize("patched", [left_dense, dense])
@torch.no_grad()
def test_their_modules_have_hooks_only_once_someone_looks(patched: object) -> None:
    model, images, seen = tiny_vit(), tiny_images(1), []
    patch = patched(model)  # type: ignore[operator]
    copied = copy.deepcopy(model)
    assert hooks_of_sites(patch) == 0
    with patch.observing(lambda site, *_: seen.append(site.name)):
        model(images)
    assert hooks_of_sites(patch) == 2 * len(patch.sites)
    other = sparsiattn.patch_of(copied)
    with other.observing(lambda site, *_: seen.append(site.name)):
        copied(images)
    assert seen == 2 * [site.name for site in patch.sites]
    attributes = [set(vars(module)) for module in tiny_vit().modules()]
    for patched_model in (model, copied):
        sparsiattn.unpatch(patched_model)
        assert [set(vars(module)) for module in patched_model.modules()] == attributes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in patched_model.modules())


def test_their_patch_is_known_from_a_part() -> None:
    model = tiny_vit()
    patch = dense(model)
    part = model.get_submodule(patch.sites[0].name)
    with pytest.raises(sparsiattn.AlreadyPatched):
        sparsiattn.patch(part, "topk", k=0.25, input=(torch.randn(1, 17, 48),))
    copied = copy.deepcopy(part)
    sparsiattn.unpatch(copied)
    assert not [name for name in vars(copied) if "sparsiattn" in name]
    assert patch.active


def test_compiled_code_is_forgotten_only_when_their_hooks_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch = dense(tiny_vit())
    resets: list[None] = []
    torch.compile(lambda x: x, backend="eager")(torch.ones(1))  # or there is nothing to forget
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    dry_run(patch)
    assert len(resets) == 0
    for _ in range(2):
        with patch.observing(lambda *_: None):
            assert len(resets) == 1


@torch.no_grad()
def test_they_are_counted() -> None:
    model, images = tiny_vit(), tiny_images(1)
    dense(model)
    profiled = sparsiattn.profile(model, images)
    plain = sparsiattn.profile(tiny_vit(), images)
    assert profiled.macs == plain.macs


@pytest.mark.parametrize("patched", [left_dense, dense])
@torch.no_grad()
def test_who_looks_sees_every_site(patched: object, opened: list[int]) -> None:
    model, seen = tiny_vit(), []
    patch = patched(model)  # type: ignore[operator]
    with patch.observing(lambda site, planner, inputs: seen.append(site.name)):
        model(tiny_images(1))
    assert seen == [site.name for site in patch.sites]
    assert len(opened) == len(seen)


@torch.no_grad()
def test_an_observer_may_come_while_a_site_runs() -> None:
    model, patch = (vit := tiny_vit()), dense(vit)
    block, seen = model.get_submodule(patch.sites[0].name), []
    blocks: list[object] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # after the scope would open
        block_of_code = patch.observing(lambda site, *_: seen.append(site.name))
        block_of_code.__enter__()
        blocks.append(block_of_code)

    with block.register_forward_pre_hook(look):
        model(tiny_images(1))
    blocks[0].__exit__(None, None, None)  # type: ignore[attr-defined]
    assert seen == [site.name for site in patch.sites][1:]


@torch.no_grad()
def test_a_site_is_idle_only_while_it_is_dense() -> None:
    model, images = tiny_vit(), tiny_images(1)
    patch = left_dense(model)
    expected = model(images)
    for runtime in patch.runtimes:
        set_dense(patch, runtime, False)
    sparse = model(images)
    assert not torch.equal(sparse, expected)
    with sparsiattn.patch(tiny_vit(), "topk", k=0.25) as other:
        assert torch.equal(other.model(images), sparse)


class Outer(nn.Module):
    """Attention whose values come from attention of a patched part that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_vit().blocks[0].attn  # type: ignore[index, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (3, -1)).transpose(1, 2)
        v = self.inner(x).unflatten(-1, (3, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_inside_a_sparse_site_it_stays_dense() -> None:
    host = nn.Sequential(Outer()).eval()
    x = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(0))
    options = {"input": (x,), "grid": (4, 4), "prefix": 1}
    with sparsiattn.patch(host, "topk", k=0.25, sites="0", **options) as patch:
        expected = host(x)
    with sparsiattn.patch(host, "topk", k=0.25, **options) as patch:
        assert len(patch.runtimes) == 2
        inner = next(r for r in patch.runtimes if r.site.name == "0.inner")
        set_dense(patch, inner, True)
        assert torch.equal(host(x), expected)


@torch.no_grad()
def test_inside_a_sparse_site_it_stays_dense_in_compiled_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def settle(state: sparsiattn.Patch, *_: object) -> None:
        for runtime in state.runtimes:
            runtime.dense = runtime.site.name == "0.inner"

    monkeypatch.setattr("sparsiattn.patching.apply.settle_sites", settle)
    host = nn.Sequential(Outer()).eval()
    x = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(0))
    options = {"input": (x,), "grid": (4, 4), "prefix": 1}
    with sparsiattn.patch(host, "topk", k=0.25, sites="0", **options):
        expected = host(x)
    with sparsiattn.patch(host, "topk", k=0.25, **options) as patch:
        assert {r.site.name: r.dense for r in patch.runtimes} == {"0": False, "0.inner": True}
        compiled = torch.compile(host, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


@torch.no_grad()
def test_planners_of_sites_left_dense_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    model, images = tiny_vit(), tiny_images(2)
    sparsiattn.patch(model, "connectivity", k=0.25, only_if_faster=True)
    planner = type(sparsiattn.patch_of(model).runtimes[0].planner)
    monkeypatch.setattr(planner, "plans_by_shape", property(lambda self: asked.append(self)))
    model(images)
    assert not asked
    sparsiattn.unpatch(model)
    sparsiattn.patch(model, "connectivity", k=0.25)
    model(images)
    assert asked
