"""What people do with models, done with patched ones."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparsiattn
from tests.support import environment, zoo
from tests.support.patched_vit import STRATEGIES, images, patched

each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
some_strategies = pytest.mark.parametrize("strategy", ["connectivity", "token_merge"])


@some_strategies
def test_a_loop_as_in_timms_train_script(strategy: str) -> None:
    """timm's optimizer, scheduler, loss, mixup, EMA and `ModelEma.module` for evaluation."""
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    with patched(strategy) as (model, _):
        classes = model(images()).shape[1]
        mixup, loss_of = Mixup(mixup_alpha=0.8, num_classes=classes), SoftTargetCrossEntropy()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
        schedule = CosineLRScheduler(optimizer, t_initial=4, t_in_epochs=False)
        average = ModelEmaV3(model, decay=0.5)
        before = copy.deepcopy(model.state_dict())
        model.train()
        for step in range(4):
            x, target = mixup(images(4), torch.arange(4))
            loss = loss_of(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step_update(step)
            average.update(model)
        assert torch.isfinite(loss)
        host = [name for name in before if ".sparsiattn." not in name]
        assert any(not torch.equal(before[name], model.state_dict()[name]) for name in host)
        own = sparsiattn.patch_of(average.module)
        assert own is not None
        with torch.no_grad():
            mean = average.module.eval()(images())
            assert not torch.equal(mean, model.eval()(images()))
            with own.disabled():
                assert not torch.equal(average.module(images()), mean)


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": images(8)[index], "labels": torch.tensor(index % 3)}


@pytest.mark.slow
@some_strategies
def test_the_trainer_of_transformers(strategy: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    with patched(strategy, model):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, save_steps=2,
            report_to=[], use_cpu=True, learning_rate=1e-2, logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_Rows())
        found = trainer.train()
        assert found.global_step == 3
        assert sparsiattn.patch_of(model) is not None
        saved = tmp_path / "checkpoint-2" / "model.safetensors"
        assert saved.exists()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own: pytrees, few workers, no logger
@some_strategies
def test_lightning(strategy: str, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")

    with patched(strategy) as (model, _):

        class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: list[Tensor], _: int) -> Tensor:
                return F.cross_entropy(self.model(batch[0]), batch[1])

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=1e-2)

        data = DataLoader(TensorDataset(images(8), torch.arange(8) % 3), batch_size=4)
        trainer = lightning.Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        module = Module().train()
        trainer.fit(module, data)
        assert trainer.global_step == 2
        saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
        fresh = Module()
        fresh.load_state_dict(saved["state_dict"])


@each_strategy
def test_accelerate(strategy: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        with patched(strategy) as (model, live):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            prepared, optimizer = accelerator.prepare(model, optimizer)
            loss = prepared(images()).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            assert torch.isfinite(loss)
            assert sparsiattn.patch_of(accelerator.unwrap_model(prepared)) is live
    finally:  # its precision is that of the whole process, and other tests train, too
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


@pytest.mark.slow
@each_strategy
def test_lora_on_top_of_a_patch_and_below_it(strategy: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["qkv"], "r": 4, "init_lora_weights": False}

    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(5)
        return peft.get_peft_model(model, peft.LoraConfig(**options))

    with patched(strategy) as (model, live):
        above = adapted(model)
        on_top = above(images())
        on_top.sum().backward()
        names = [name for name, p in above.named_parameters() if p.grad is not None]
        assert names
        assert all("lora" in name for name in names)
        merged = above.merge_and_unload()
        torch.testing.assert_close(merged(images()), on_top, rtol=1e-4, atol=1e-5)
        live.unpatch()
    below = adapted(zoo.build("vit"))
    with patched(strategy, below):
        torch.testing.assert_close(below(images()), on_top)


SHARDED = """
import sys
import torch
import torch.distributed as dist
from tests.support.patched_vit import images, patched
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for strategy in ("connectivity", "token_merge", "hybrid"):
    with patched(strategy) as (model, _):
        expected = model(images(4))
        expected.square().mean().backward()
        name = "blocks.0.mlp.fc1.weight"
        gradient = model.get_parameter(name).grad.clone()
        model.zero_grad()
        share = images(4)[2 * dist.get_rank() :][:2]
        if sys.argv[1] == "fsdp":
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            run = fully_shard(model, mesh=mesh)
        else:
            run = DistributedDataParallel(model)
        found = run(share)
        torch.testing.assert_close(found, expected[2 * dist.get_rank() :][:2])
        found.square().mean().backward()
        mine = model.get_parameter(name).grad
        mine = mine.full_tensor() if sys.argv[1] == "fsdp" else mine
        torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-6)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    """Outputs and gradients of sharded and replicated models are those of one process."""
    script = tmp_path / "run.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script), kind]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@each_strategy
def test_data_parallel(strategy: str) -> None:
    """Without a GPU it hands the call on; replicas are a test of the laws."""
    with patched(strategy) as (model, _), torch.no_grad():
        torch.testing.assert_close(nn.DataParallel(model)(images()), model(images()))


@each_strategy
@pytest.mark.parametrize("reentrant", [True, False])
def test_both_kinds_of_gradient_checkpointing(strategy: str, reentrant: bool) -> None:
    """Around calls of blocks, as timm's `checkpoint_seq` has them."""
    from torch.utils.checkpoint import checkpoint

    with patched(strategy) as (model, _):
        direct = _gradients(model, images())

        def blocks(x: Tensor) -> Tensor:
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

        model.blocks.forward = blocks
        found = _gradients(model, images().requires_grad_())
        del model.blocks.forward
    for mine, theirs in zip(found, direct, strict=True):
        torch.testing.assert_close(mine, theirs)


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in wanted if p.grad is not None]


@each_strategy
def test_autocast_and_channels_last(strategy: str) -> None:
    with patched(strategy) as (model, _), torch.no_grad():
        expected = model(images())
        model.to(memory_format=torch.channels_last)
        last = images().to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(last), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(model(last)).all()


@pytest.mark.slow
@each_strategy
def test_quantised_linears(strategy: str) -> None:
    """torchao's int8 weights before and after patching."""
    quantization = pytest.importorskip("torchao.quantization")
    with patched(strategy) as (model, _), torch.no_grad():
        exact = model(images())
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        after = model(images())
        assert (after - exact).abs().max() < 0.1 * exact.abs().max()
    model = zoo.build("vit")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with patched(strategy, model), torch.no_grad():
        torch.testing.assert_close(model(images()), after)


@each_strategy
def test_functional_calls(strategy: str) -> None:
    """`torch.func`: gradients by a dictionary of weights equal those by backward."""
    with patched(strategy) as (model, _):
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def loss(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, values, (images(),)).square().sum()

        found = torch.func.grad(loss)(weights)
        model(images()).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad)


@each_strategy
def test_models_made_on_the_meta_device(strategy: str) -> None:
    """Patched without data, then given weights: the same as patched with them."""
    real = zoo.build("vit")
    with torch.device("meta"):
        empty = copy.deepcopy(real).to("meta")
    with patched(strategy, real), patched(strategy, empty), torch.no_grad():
        expected = real(images())
        assert empty(images().to("meta")).shape == expected.shape
        empty.to_empty(device="cpu")
        empty.load_state_dict(real.state_dict())
        torch.testing.assert_close(empty.eval()(images()), expected)


@each_strategy
def test_averages_of_weights(strategy: str) -> None:
    from torch.optim.swa_utils import AveragedModel

    with patched(strategy) as (model, _), torch.no_grad():
        average = AveragedModel(model)
        average.update_parameters(model)
        torch.testing.assert_close(average(images()), model(images()))


def test_timms_benchmark_of_features_and_pruned_heads() -> None:
    """`reset_classifier` and another input size while patched."""
    model = timm.create_model("test_vit", num_classes=5).eval()
    with sparsiattn.patch(model, "connectivity", k=0.25), torch.no_grad():
        model.reset_classifier(7)
        assert model(torch.randn(1, 3, 160, 160)).shape == (1, 7)
        model.reset_classifier(0)
        assert model(torch.randn(1, 3, 160, 160)).shape == (1, model.num_features)
