"""A folder that does not fit, or is damaged, is refused with the model as it was."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import MismatchedPatch, SparsiattnError, load, patch
from sparsiattn.serialization.files import checksum, with_checksum
from tests.support import zoo
from tests.support.refusals import untouched

CONFIG, WEIGHTS = "sparsiattn.json", "planners.safetensors"
SITE = "blocks.0.attn"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model and a saved patch of it, for tests to copy."""
    model = zoo.build("vit")
    with patch(model, "connectivity", k=0.2) as live:
        return model, live.save(tmp_path_factory.mktemp("template"))


@pytest.fixture
def model(template: tuple[nn.Module, Path]) -> nn.Module:
    return copy.deepcopy(template[0])


@pytest.fixture
def saved(template: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(template[1], tmp_path / "saved"))


def refused(model: nn.Module, folder: Path, *says: str) -> SparsiattnError:
    with untouched(model, zoo.images(model)), pytest.raises(SparsiattnError) as caught:
        load(model, folder)
    assert isinstance(caught.value, (ValueError, LookupError, TypeError))
    for part in says:
        assert part in str(caught.value)
    return caught.value


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """With a checksum that fits again, so that other checks have their say."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    text = json.dumps(with_checksum(config) if "seal" in config else config)
    (folder / CONFIG).write_text(text)


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    edit(folder, lambda config: config["files"].update({WEIGHTS: checksum(folder / WEIGHTS)}))


def test_the_fixture_itself_loads(model: nn.Module, saved: Path) -> None:
    """Else every refusal below would pass for the wrong reason."""
    edit(saved, lambda config: None)
    edit_weights(saved, lambda tensors: None)
    load(model, saved).unpatch()


class TestAnotherModel:
    @pytest.mark.parametrize("family", ["swin", "hiera", "vit_registers", "deit_distilled"])
    def test_family(self, saved: Path, family: str) -> None:
        refused(zoo.build(family), saved, "another model")

    def test_class(self, model: nn.Module, saved: Path) -> None:
        model.__class__ = type("MyTransformer", (type(model),), {})
        refused(model, saved, "another model", "was 'VisionTransformer'", "is 'MyTransformer' here")

    @pytest.mark.parametrize(
        "options", [{"depth": 3}, {"num_classes": 7}, {"embed_dim": 24}, {"img_size": 64}], ids=str
    )
    def test_shape(self, saved: Path, options: dict[str, int]) -> None:
        model = zoo.models.VisionTransformer(**{**zoo.TINY, **options}).eval()
        assert isinstance(refused(model, saved, "another model"), MismatchedPatch)

    def test_heads(self, saved: Path) -> None:
        """The weights fit, but attention would be cut into other heads."""
        model = zoo.models.VisionTransformer(
            **{**zoo.TINY, "global_pool": "avg", "num_heads": 6}
        ).eval()
        refused(model, saved, SITE, "heads")

    def test_no_attention(self, saved: Path) -> None:
        class Pixels(nn.Flatten):
            pretrained_cfg = {"input_size": (3, 64, 64)}  # noqa: RUF012

        refused(Pixels(), saved, "another model")

    @pytest.mark.parametrize("thing", [None, "vit", nn.Linear], ids=str)
    def test_not_a_module(self, saved: Path, thing: Any) -> None:
        with pytest.raises(SparsiattnError, match=r"torch\.nn\.Module") as caught:
            load(thing, saved)
        assert isinstance(caught.value, TypeError)

    def test_model_that_is_patched(self, model: nn.Module, saved: Path) -> None:
        with untouched(model, zoo.images(model)), patch(model, "topk", k=0.5) as live:
            with pytest.raises(sparsiattn.AlreadyPatched):
                load(model, saved)
            assert sparsiattn.patch_of(model) is live


class TestFiles:
    def test_missing_folder(self, model: nn.Module, tmp_path: Path) -> None:
        refused(model, tmp_path / "nowhere", "no saved patch", "nowhere")

    def test_empty_folder(self, model: nn.Module, tmp_path: Path) -> None:
        refused(model, tmp_path, "no saved patch", tmp_path.name)

    def test_file_instead_of_folder(self, model: nn.Module, saved: Path) -> None:
        refused(model, saved / CONFIG, "no saved patch")

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b'"text"', b"{}"],
        ids=["empty", "open brace", "not text", "null", "list", "number", "string", "no keys"],
    )
    def test_corrupted_json(self, model: nn.Module, saved: Path, content: bytes) -> None:
        (saved / CONFIG).write_bytes(content)
        assert isinstance(refused(model, saved, CONFIG), MismatchedPatch)

    @pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
    def test_truncated_safetensors(self, model: nn.Module, saved: Path, size: int) -> None:
        content = (saved / WEIGHTS).read_bytes()
        (saved / WEIGHTS).write_bytes(content[:size])
        assert isinstance(refused(model, saved, WEIGHTS), MismatchedPatch)

    def test_missing_safetensors(self, model: nn.Module, saved: Path) -> None:
        (saved / WEIGHTS).unlink()
        refused(model, saved, WEIGHTS)

    def test_pickle_in_place_of_safetensors_is_not_run(
        self, model: nn.Module, saved: Path, tmp_path: Path
    ) -> None:
        torch.save({f"{SITE}.down": torch.zeros(1)}, saved / WEIGHTS)
        refused(model, saved, WEIGHTS)


KEYS = ["format", "host", "strategy", "kernel", "input_shape", "sites", "schedule", "files"]
SITE_KEYS = ["k", "tokens", "heads", "head_dim", "dense"]


class TestConfig:
    @pytest.mark.parametrize("key", KEYS)
    def test_missing_key(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config.pop(key))
        refused(model, saved, repr(key))

    @pytest.mark.parametrize("key", ["name", "version", "options"])
    def test_missing_key_of_strategy(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config["strategy"].pop(key))
        refused(model, saved, repr(key))

    @pytest.mark.parametrize("key", SITE_KEYS)
    def test_missing_key_of_site(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config["sites"]["blocks.1.attn"].pop(key))
        refused(model, saved, "blocks.1.attn", repr(key))

    @pytest.mark.parametrize("key", ["class", "weights", "sha256"])
    def test_missing_key_of_host(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config["host"].pop(key))
        refused(model, saved, key)

    @pytest.mark.parametrize("key", KEYS)
    @pytest.mark.parametrize("value", [None, [], "text"], ids=repr)
    def test_value_of_the_wrong_type(
        self, model: nn.Module, saved: Path, key: str, value: Any
    ) -> None:
        edit(saved, lambda config: config.update({key: value}))
        refused(model, saved)

    @pytest.mark.parametrize("value", [None, [], "text"], ids=repr)
    def test_site_of_the_wrong_type(self, model: nn.Module, saved: Path, value: Any) -> None:
        edit(saved, lambda config: config["sites"].update({SITE: value}))
        refused(model, saved)

    def test_newer_format(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config.update(format=3))
        refused(model, saved, "format 3", "update sparsiattn")

    def test_newer_format_with_other_keys(self, model: nn.Module, saved: Path) -> None:
        (saved / CONFIG).write_text(json.dumps({"format": 3, "patches": []}))
        refused(model, saved, "format 3", "update sparsiattn")

    def test_other_version_of_the_strategy(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config["strategy"].update(version=2))
        refused(model, saved, "'connectivity'", "version 2", "version 1")

    def test_unknown_strategy(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config["strategy"].update(name="conectivity"))
        error = refused(model, saved, "'conectivity'", "Did you mean 'connectivity'")
        assert isinstance(error, LookupError)

    def test_unknown_option(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config["strategy"]["options"].update(reduced=2))
        refused(model, saved, "'reduced'", "reduce")

    def test_unknown_kernel(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config.update(kernel="gahter"))
        refused(model, saved, "'gahter'", "'gather'")

    @pytest.mark.parametrize("k", [0, 1.5, True, "0.5", [0.5]], ids=repr)
    def test_budget_of_a_site(self, model: nn.Module, saved: Path, k: Any) -> None:
        edit(saved, lambda config: config["sites"][SITE].update(k=k))
        refused(model, saved, "float in (0, 1]")

    @pytest.mark.parametrize("key", ["tokens", "heads", "head_dim"])
    def test_other_attention(self, model: nn.Module, saved: Path, key: str) -> None:
        edit(saved, lambda config: config["sites"][SITE].update({key: 7}))
        refused(model, saved, SITE, key, "7")

    def test_site_that_the_model_lacks(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda c: c["sites"].update({"blocks.9.attn": c["sites"][SITE]}))
        refused(model, saved, "blocks.9.attn")

    def test_no_site(self, model: nn.Module, saved: Path) -> None:
        edit(saved, lambda config: config["sites"].clear())
        refused(model, saved)

    @pytest.mark.parametrize("shape", [[], [1], [1, 3, 0, 32], ["a"] * 4, [1, 3, 33, 33]], ids=str)
    def test_input_shape(self, model: nn.Module, saved: Path, shape: list[Any]) -> None:
        edit(saved, lambda config: config.update(input_shape=shape))
        with untouched(model, zoo.images(model)), pytest.raises(SparsiattnError):
            load(model, saved)


class TestWeights:
    def test_missing(self, model: nn.Module, saved: Path) -> None:
        edit_weights(saved, lambda tensors: tensors.pop(f"{SITE}.up"))
        refused(model, saved, "missing", f"{SITE}.up")

    def test_extra(self, model: nn.Module, saved: Path) -> None:
        edit_weights(saved, lambda tensors: tensors.update({f"{SITE}.more": torch.zeros(2)}))
        refused(model, saved, "unexpected", f"{SITE}.more")

    def test_extra_for_a_strategy_without_weights(self, model: nn.Module, saved: Path) -> None:
        with patch(model, "topk", k=0.2) as live:
            live.save(saved)
        edit_weights(saved, lambda tensors: tensors.update({f"{SITE}.down": torch.zeros(2)}))
        refused(model, saved, "unexpected", f"{SITE}.down")

    @pytest.mark.parametrize("name", ["down", "up"])
    def test_wrong_shape(self, model: nn.Module, saved: Path, name: str) -> None:
        full = f"blocks.1.attn.{name}"
        edit_weights(saved, lambda tensors: tensors.update({full: torch.zeros(3, 5)}))
        refused(model, saved, repr(full), "(3, 5)")

    def test_saving_again_leaves_no_old_weights(self, model: nn.Module, saved: Path) -> None:
        with patch(model, "topk", k=0.2) as live:
            live.save(saved)
        assert safetensors.torch.load_file(saved / WEIGHTS) == {}
        load(model, saved).unpatch()
