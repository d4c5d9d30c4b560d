"""`Patch.disabled` holds for the code inside its block: by call and by context."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from tests.support import zoo

transformers = pytest.importorskip("transformers")


def _timm(fused: bool) -> nn.Module:
    model = zoo.build("vit")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


class _States(nn.Module):
    """A transformers model that returns one tensor."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
        config = transformers.ViTConfig(
            **sizes, intermediate_size=96, image_size=32, patch_size=4, attn_implementation=how
        )
        self.body = transformers.ViTModel(config).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(pixel_values=x).last_hidden_state


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: _timm(True),
    "not fused": lambda: _timm(False),
    "transformers eager": lambda: _States("eager"),
}


class _Answers:
    """A patched model, and what it answered before and after."""

    def __init__(self, name: str = "fused", strategy: str = "topk", **options: Any) -> None:
        self.model, self.x = HOSTS[name](), torch.randn(2, 3, 32, 32)
        options = options or {"k": 0.1}
        with torch.no_grad():
            self.dense = self.model(self.x)
            # dense runs as without a patch, so its bits are the same
            self.patch = sparsiattn.patch(self.model, strategy, input=self.x, **options)
            self.sparse = self.model(self.x)
        assert not torch.allclose(self.dense, self.sparse, atol=1e-4)

    def __call__(self, call: Callable[[Tensor], Tensor] | None = None) -> str:
        with torch.no_grad():
            y = (self.model if call is None else call)(self.x)
        if torch.equal(y, self.dense):
            return "dense"
        return "sparse" if torch.allclose(y, self.sparse, atol=1e-6) else "neither"


both = pytest.mark.parametrize("host", list(HOSTS))


@both
def test_coroutines_that_overlap(host: str) -> None:
    answer, seen = _Answers(host), []

    async def shadow(first: int, then: int) -> None:
        with answer.patch.disabled():
            for _ in range(first):
                await asyncio.sleep(0)
            seen.append(answer())
            for _ in range(then):
                await asyncio.sleep(0)

    async def serve() -> None:
        for _ in range(3):
            seen.append(answer())
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(shadow(1, 0), serve(), shadow(3, 1))

    asyncio.run(main())
    assert sorted(seen) == ["dense"] * 2 + ["sparse"] * 3
    assert answer() == "sparse"


@both
def test_another_thread_serves_meanwhile(host: str) -> None:
    answer, inside, served, seen = _Answers(host), threading.Event(), threading.Event(), []

    def shadow() -> None:
        with answer.patch.disabled():
            inside.set()
            served.wait(30)
            seen.append(answer())

    worker = threading.Thread(target=shadow)
    worker.start()
    inside.wait(30)
    assert answer() == "sparse"
    served.set()
    worker.join()
    assert seen == ["dense"]


@both
def test_a_generator_and_its_reader(host: str) -> None:
    answer = _Answers(host)

    def answers() -> Iterator[str]:
        with answer.patch.disabled():
            yield answer()
            yield from (answer() for _ in range(1))

    reading = answers()
    assert [next(reading), answer(), next(reading), answer()] == ["dense", "sparse"] * 2
    other = answers()
    assert next(other) == "dense"
    assert answer() == "sparse"
    del other
    assert list(reading) == []
    assert answer() == "sparse"


def test_an_asynchronous_generator_and_its_reader() -> None:
    answer = _Answers()

    async def answers() -> AsyncIterator[str]:
        with answer.patch.disabled():
            yield await asyncio.to_thread(answer)
            await asyncio.sleep(0)
            yield answer()

    async def main() -> list[str]:
        seen = []
        async for inside in answers():
            seen += [inside, answer(), await asyncio.to_thread(answer)]
        return seen

    assert asyncio.run(main()) == ["dense", "sparse", "sparse"] * 2


def test_coroutines_driven_by_hand() -> None:
    answer = _Answers()

    class Pause:
        def __await__(self) -> Iterator[None]:
            yield

    async def shadow() -> str:
        with answer.patch.disabled():
            await Pause()
            return answer()

    first, second = shadow(), shadow()
    first.send(None)
    second.send(None)
    assert answer() == "sparse"
    for coroutine in (first, second):
        with pytest.raises(StopIteration) as end:
            coroutine.send(None)
        assert end.value.value == "dense"
        assert answer() == "sparse"


def test_blocks_made_of_generators() -> None:
    """A context manager written as a generator sets what its block sees."""
    answer = _Answers()

    @contextlib.contextmanager
    def dense() -> Iterator[None]:
        with answer.patch.disabled():
            yield

    @contextlib.asynccontextmanager
    async def dense_later() -> AsyncIterator[None]:
        with dense():
            await asyncio.sleep(0)
            yield

    class Dense:
        async def __aenter__(self) -> None:
            self.stack = contextlib.ExitStack()
            self.stack.enter_context(answer.patch.disabled())

        async def __aexit__(self, *_: object) -> None:
            self.stack.close()

    async def main() -> list[str]:
        seen = []
        async with dense_later():
            seen.append(answer())
        seen.append(answer())
        async with Dense():
            seen.append(answer())
            seen.append(await asyncio.create_task(asyncio.to_thread(answer)))
        return [*seen, answer()]

    with dense():
        assert answer() == "dense"
    assert answer() == "sparse"
    assert asyncio.run(main()) == ["dense", "sparse", "dense", "dense", "sparse"]
    assert answer.patch.disabled()(answer)() == "dense"


def test_blocks_that_end_in_any_order() -> None:
    answer = _Answers()
    first, second = answer.patch.disabled(), answer.patch.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert answer() == "dense"
    second.__exit__(None, None, None)
    assert answer() == "sparse"


def test_a_block_that_ends_in_another_thread() -> None:
    answer = _Answers()
    block = answer.patch.disabled()
    block.__enter__()
    worker = threading.Thread(target=block.__exit__, args=(None, None, None))
    worker.start()
    worker.join()
    assert answer() == "sparse"


@pytest.mark.parametrize(
    ("strategy", "options"), [("topk", {"k": 0.1}), ("token_drop", {"keep": 0.5})]
)
@pytest.mark.parametrize("host", ["fused", "not fused"])
def test_compiled_code_follows_the_context(
    host: str, strategy: str, options: dict[str, float]
) -> None:
    answer = _Answers(host, strategy, **options)
    torch.compiler.reset()
    compiled, seen = torch.compile(answer.model, fullgraph=True, backend="eager"), []

    async def shadow() -> None:
        with answer.patch.disabled():
            for _ in range(3):
                seen.append(("dense", answer(compiled)))
                await asyncio.sleep(0)

    async def serve() -> None:
        for _ in range(4):
            seen.append(("sparse", answer(compiled)))
            await asyncio.sleep(0)

    def answers() -> Iterator[str]:
        with answer.patch.disabled():
            yield answer(compiled)

    async def main() -> None:
        await asyncio.gather(shadow(), serve(), shadow())

    asyncio.run(main())
    assert len(seen) == 10
    assert [right for right, _ in seen] == [given for _, given in seen]
    reading = answers()
    assert (next(reading), answer(compiled)) == ("dense", "sparse")
    torch.compiler.reset()


def test_observers_by_turns() -> None:
    answer, seen = _Answers(), {"a": 0, "b": 0}

    async def watch(name: str) -> None:
        def count(*_: object) -> None:
            seen[name] += 1

        with answer.patch.observing(count):
            await asyncio.sleep(0)
            assert answer() == "dense"
            await asyncio.sleep(0)

    async def main() -> str:
        tasks = asyncio.gather(watch("a"), watch("b"))
        await asyncio.sleep(0)
        plain = answer()
        await tasks
        return plain

    assert asyncio.run(main()) == "sparse"
    assert seen["a"] == seen["b"] == len(answer.patch.sites)


@pytest.mark.parametrize("host", ["not fused", "transformers eager"])
def test_copies_of_a_host_that_was_switched(host: str) -> None:
    answer = _Answers(host)
    with answer.patch.disabled():
        twins = [copy.deepcopy(answer.model)]
    twins.append(pickle.loads(pickle.dumps(answer.model)))
    for twin in twins:
        assert answer(twin) == "sparse"
        patch = sparsiattn.patch_of(twin)
        assert patch is not None
        with patch.disabled():
            assert answer(twin) == "dense"
            assert answer() == "sparse"
        patch.unpatch()
        assert answer(twin) == "dense"
    assert answer() == "sparse"
    answer.patch.unpatch()
    assert answer() == "dense"


def test_what_a_host_stores_stays_as_it_is() -> None:
    answer = _Answers("transformers eager")
    config = answer.model.body.config
    before = type(config), config.to_dict()
    assert vars(config)["_attn_implementation_internal"] == "eager"
    assert copy.deepcopy(config)._attn_implementation == "eager"
    answer.patch.unpatch()
    assert type(config) is transformers.ViTConfig
    assert config._attn_implementation == "eager"
    assert config.to_dict() == before[1]


def test_what_is_switched_by_hand_later_holds() -> None:
    answer = _Answers("not fused")
    answer.model.blocks[1].attn.fused_attn = False
    with pytest.raises(sparsiattn.ModelChanged, match="fused_attn"):
        answer()
    with answer.patch.disabled():
        assert answer() == "dense"
    answer.patch.unpatch()
    assert answer() == "dense"
